package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
)

func newTrace(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "Follow connections, the live ones first: one line per event",
		Long: "Shows the connections that are open, and then one line whenever one opens, closes or is denied, until Ctrl-C.\n" +
			"A reader that is too slow loses lines, is told how many, and holds nothing up.",
		Example: "  nodeproxy trace\n  nodeproxy trace --verdict denied\n  nodeproxy trace --service web --json | jq -r .reason",
		Args:    exactly(),
	}
	client, asJSON := socketFlag(cmd), jsonFlag(cmd)
	var f admin.Filter
	var verdict string
	cmd.Flags().StringVar(&f.Service, "service", "", "only connections from or to the service `NAME`")
	cmd.Flags().StringVar(&f.Workload, "workload", "", "only connections of the workload with this `CGROUP`, or end of its path")
	cmd.Flags().StringVar(&verdict, "verdict", "", "only those with this `VERDICT`: allowed or denied")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f.Verdict = admin.Verdict(verdict)
		if verdict != "" && f.Verdict != admin.Allowed && f.Verdict != admin.Denied {
			return &usageError{fmt.Errorf("--verdict %q is neither allowed nor denied", verdict), cmd}
		}
		if *asJSON {
			out := json.NewEncoder(e.stdout)
			return client().Trace(cmd.Context(), f, func(c admin.Connection) error { return out.Encode(c) })
		}
		s := e.style()
		return client().Trace(cmd.Context(), f, func(c admin.Connection) error {
			_, err := fmt.Fprintln(e.stdout, traceLine(s, &c))
			return err
		})
	}
	return cmd
}

// traceLine is one event. Columns are as wide as usual values, so that lines that come one at a time still align.
func traceLine(s style, c *admin.Connection) string {
	at := s.dim(c.Time.Local().Format("15:04:05.000"))
	if c.Event == admin.EventDropped {
		return at + "  " + s.yellow(fmt.Sprintf("dropped   %d events: this reader was too slow for them", c.Dropped))
	}
	if c.Event == admin.EventHandover {
		return at + "  " + s.yellow("handover  "+clean(c.Detail))
	}
	verdict := s.green(fmt.Sprintf("%-7s", c.Verdict))
	if c.Verdict == admin.Denied {
		verdict = s.red(fmt.Sprintf("%-7s", c.Verdict))
	}
	pair := fmt.Sprintf("%-20s", clean(cmp.Or(c.Source.Service, "?")+" → "+cmp.Or(c.Destination.Service, "?")))
	columns := []string{at, fmt.Sprintf("%-6s", c.Event), fmt.Sprintf("%-8s", c.Direction), s.bold(pair),
		fmt.Sprintf("%-42s", clean(addresses(c))), fmt.Sprintf("%-9s", c.Path), verdict}
	for _, rest := range []string{why(s, c), volume(c), peer(c), process(c)} {
		if rest != "" {
			columns = append(columns, rest)
		}
	}
	return strings.Join(columns, "  ")
}

func addresses(c *admin.Connection) string {
	text := cmp.Or(c.Source.Address, "?") + " → " + cmp.Or(c.Destination.Address, "?")
	if c.Destination.Peer != "" && c.Destination.Peer != c.Destination.Address {
		text += " (" + c.Destination.Peer
		if c.Destination.Gateway != "" {
			text += ", gateway " + c.Destination.Gateway
		}
		text += ")"
	}
	return text
}

// why is the reason of a denial, in a word and a sentence, and the intention that decided.
func why(s style, c *admin.Connection) string {
	var parts []string
	if c.Reason != "" {
		parts = append(parts, s.red(clean(string(c.Reason)))+": "+clean(cmp.Or(c.Detail, c.Reason.Sentence(), "no more is known")))
	}
	if c.Intention != "" {
		parts = append(parts, clean(c.Intention))
	}
	return strings.Join(parts, "; ")
}

func volume(c *admin.Connection) string {
	if c.Event != admin.EventClose && c.Sent+c.Received == 0 {
		return ""
	}
	return fmt.Sprintf("sent %s, received %s in %s", size(c.Sent), size(c.Received), span(c.Duration))
}

// peer is who the other node proved to be.
func peer(c *admin.Connection) string {
	identity := c.Destination.Identity
	if c.Direction == admin.Inbound {
		identity = c.Source.Identity
	}
	return clean(identity)
}

func process(c *admin.Connection) string {
	if c.Source.PID == 0 {
		return ""
	}
	return fmt.Sprintf("pid %d %s", c.Source.PID, clean(c.Source.Comm))
}

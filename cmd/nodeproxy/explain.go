package main

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
)

func newExplain(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain SOURCE DESTINATION | --observed",
		Short: "Say which intention decides a connection, why, and what is missing if it would fail",
		Long: "Says which intention decides a connection, why, which way the bytes would take, and what is missing if it would fail.\n" +
			"Nothing is connected to. SOURCE is a service, DESTINATION a service or an address as an application would dial it.\n\n" +
			"With --observed, what the connections of workloads labelled mesh=observe would have met in the mesh, for each pair.",
		Example: "  nodeproxy explain web api\n  nodeproxy explain web 240.0.0.2\n  nodeproxy explain web 10.0.0.6:8080\n  nodeproxy explain --observed",
	}
	client, asJSON := socketFlag(cmd), jsonFlag(cmd)
	observed := cmd.Flags().Bool("observed", false, "show what was observed of workloads that are only watched")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if *observed {
			return exactly()(cmd, args)
		}
		return exactly("SOURCE", "DESTINATION")(cmd, args)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *observed {
			return explainObserved(cmd.Context(), e, client(), *asJSON)
		}
		x, err := client().Explain(cmd.Context(), args[0], args[1])
		if err != nil {
			return err
		}
		if *asJSON {
			return e.json(x)
		}
		printExplanation(e, x)
		return nil
	}
	return cmd
}

// targetLine is a target of a discovery chain in one line.
func targetLine(t *admin.Target) string {
	healthy := 0
	for _, inst := range t.Instances {
		if inst.Healthy && inst.Ejected == "" {
			healthy++
		}
	}
	line := fmt.Sprintf("%s: %d of %d instances healthy", t.Name, healthy, len(t.Instances))
	if t.Gateway == "local" || t.Gateway == "remote" {
		line = fmt.Sprintf("%s: through mesh gateways (mode %s), %d of %d usable", t.Name, t.Gateway, healthy, len(t.Instances))
	}
	if t.Why != "" {
		line = t.Name + ": unreachable: " + t.Why
	}
	if t.InUse {
		line += ", in use"
	}
	return line
}

func explainObserved(ctx context.Context, e *env, client *admin.Client, asJSON bool) error {
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return e.json(status.Observed)
	}
	if len(status.Observed) == 0 {
		e.printf("nothing was observed since the daemon started: label a workload with mesh=observe\n")
		return nil
	}
	s := e.style()
	var t table
	t.header(s, "SOURCE", "DESTINATION", "DIRECTION", "IN THE MESH", "CONNECTIONS", "LAST", "EXAMPLE")
	for _, o := range status.Observed {
		would := cell{"carried", s.green}
		if o.Verdict == admin.Denied {
			would = cell{"denied: " + string(o.Reason), s.red}
		}
		t.add(cell{cmp.Or(o.Source, "?"), nil}, cell{cmp.Or(o.Destination, "?"), nil}, cell{string(o.Direction), nil}, would,
			cell{fmt.Sprint(o.Connections), nil}, cell{o.Last.Local().Format(time.DateTime), nil}, cell{o.Example, nil})
	}
	t.write(e.stdout, "")
	return nil
}

func printExplanation(e *env, x *admin.Explanation) {
	s := e.style()
	verdict := s.red("denied")
	if x.Allowed {
		verdict = s.green("allowed")
	}
	e.printf("%s → %s is %s: %s\n", s.bold(clean(x.Source)), s.bold(clean(x.Destination)), verdict, clean(x.Why))
	list := func(title string, lines []string, paint func(string) string) {
		if len(lines) == 0 {
			return
		}
		e.printf("\n%s\n", s.bold(title))
		for _, line := range lines {
			e.printf("  %s\n", paint(clean(line)))
		}
	}
	plain := func(text string) string { return text }
	list("Intentions that match, the deciding one first", x.Considered, plain)
	list("Virtual IPs", x.Virtual, plain)
	var targets []string
	for _, t := range x.Targets {
		targets = append(targets, targetLine(&t))
	}
	title := "Targets, in order"
	if x.Balance != "" {
		title += ", balanced by " + x.Balance
	}
	list(title, targets, plain)
	var instances []string
	for _, i := range x.Instances {
		line := fmt.Sprintf("%s on %s, %s", i.ID, i.Node, cmp.Or(i.Address, "no address"))
		if i.Gateway {
			line = fmt.Sprintf("gateway %s on %s", i.ID, i.Node)
		}
		if i.Mesh != "" {
			line += ", mTLS at " + i.Mesh
		}
		switch {
		case i.Ejected != "":
			line += ", ejected: " + i.Ejected
		case !i.Healthy:
			line += ", unhealthy"
		}
		instances = append(instances, line)
	}
	list("Instances", instances, plain)
	if x.Allowed {
		way := string(x.Path)
		if x.Gateway != "" {
			way += " through gateway " + clean(x.Gateway)
		}
		e.printf("\nThe bytes go as %s. Decided by policy generation %d.\n", way, x.Generation)
		if x.NotDirect != "" {
			e.printf("Not direct within this node: %s.\n", clean(x.NotDirect))
		}
	}
	list("Missing: the connection would fail now", x.Missing, s.red)
}

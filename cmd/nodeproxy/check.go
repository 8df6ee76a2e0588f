package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/redirect"
)

func newCheck(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Preflight: would it work here? One line each: ok, or what to do",
		Long: "Asks the kernel, the host, the configuration and the source. Without a configuration it asks the kernel alone.\n" +
			"--service adds what of a service's configuration would be ignored or denied. Reading the source gives virtual IPs,\n" +
			"ports and a CA to a mesh directory that has none.\n\n" +
			"--workloads asks the running daemon for its workloads, and tries each: a process of this program (some 10 MB, for a\n" +
			"moment) connects from inside the workload's cgroup and network namespace to an address of no service, which the proxy\n" +
			"must refuse; another, outside the cgroup, tries the workload's ports in plaintext and without a certificate. The trace\n" +
			"and the metrics show these as denied. Applications are not connected to, unless their port is open to strangers.",
		Example: "  nodeproxy check\n  nodeproxy check --config /etc/nodeproxy --service web\n  nodeproxy check --workloads",
		Args:    exactly(),
	}
	c := checkCommand{env: e}
	c.path, c.client = configFlag(cmd), socketFlag(cmd)
	cmd.Flags().BoolVar(&c.workloads, "workloads", false, "each workload as the running daemon sees it, with canary connections")
	cmd.Flags().StringVar(&c.service, "service", "", "the `NAME` of a service to look at")
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		results := c.run(cmd.Context(), cmd.Flags().Changed("config"))
		if err := context.Cause(cmd.Context()); err != nil {
			return fmt.Errorf("check this host: it did not come to an end: %w", err)
		}
		if *asJSON {
			if err := e.json(map[string]any{"results": results}); err != nil {
				return err
			}
		} else {
			printResults(e, results)
		}
		if check.Worst(results) == check.Failed {
			return errors.New("check this host: it is not ready, see the lines that failed")
		}
		return nil
	}
	return cmd
}

type checkCommand struct {
	*env
	path      *string
	client    func() *admin.Client
	workloads bool
	service   string
}

// run asks everything that there is to ask. A configuration that was not asked for by name may be absent.
func (c *checkCommand) run(ctx context.Context, named bool) []check.Result {
	results := append(check.Kernel(redirect.Probe()), check.Capabilities()...)
	if _, err := os.Stat(*c.path); errors.Is(err, fs.ErrNotExist) && !named && c.service == "" {
		results = append(results, check.Result{Name: "configuration", Verdict: check.Warning,
			Text: "there is none at " + *c.path + ": name yours with --config to have it checked as well"})
	} else {
		results = append(results, c.configured(ctx)...)
	}
	if c.workloads {
		results = append(results, c.enrolled(ctx)...)
	}
	return results
}

func (c *checkCommand) configured(ctx context.Context) []check.Result {
	cfg, r := check.Configuration(*c.path)
	results := []check.Result{r}
	if cfg == nil {
		return results
	}
	results = append(results, check.Host(cfg)...)
	results = append(results, podsPreflight(ctx, cfg)...)
	results = append(results, enginePreflight(ctx, cfg)...)
	asked := preflight(ctx, cfg)
	results = append(results, asked...)
	if len(asked) == 1 && asked[0].Verdict == check.Failed {
		return results // nothing else would be answered either
	}
	snap, more := check.Source(ctx, func(ctx context.Context) (*catalog.Snapshot, error) { return readSource(ctx, cfg) })
	results = append(results, more...)
	if snap != nil && c.service != "" {
		results = append(results, check.Service(snap, c.service)...)
	}
	return results
}

func (c *checkCommand) enrolled(ctx context.Context) []check.Result {
	status, err := c.client().Status(ctx)
	if err != nil {
		return []check.Result{{Name: "workloads", Verdict: check.Failed, Text: err.Error()}}
	}
	return append(check.Workloads(status), check.Canaries(ctx, status, c.client())...)
}

func printResults(e *env, results []check.Result) {
	s := e.style()
	paint := map[check.Verdict]func(string) string{check.OK: s.green, check.Warning: s.yellow, check.Failed: s.red}
	var t table
	for _, r := range results {
		t.add(cell{string(r.Verdict), paint[r.Verdict]}, cell{r.Name, nil}, cell{r.Text, nil})
	}
	t.write(e.stdout, "")
}

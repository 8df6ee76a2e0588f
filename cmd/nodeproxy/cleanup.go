package main

import (
	"github.com/spf13/cobra"

	"nodeproxy.io/redirect"
)

const defaultPins = "/sys/fs/bpf/nodeproxy"

func newCleanup(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove every program, map and pin of a daemon that does not run",
		Long: "Removes all that nodeproxy left in the kernel, and says what. It needs no daemon, no configuration and no network.\n" +
			"Workloads are outside the mesh afterwards: what they send is not encrypted. While a daemon runs it refuses.",
		Example: "  nodeproxy cleanup\n  nodeproxy cleanup --node node-1",
		Args:    exactly(),
	}
	pins := cmd.Flags().String("pins", defaultPins, "`DIR` of the pins, state.pins in the configuration")
	node := cmd.Flags().String("node", "", "only the node `NAME`; all nodes if not given")
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, _ []string) error {
		removed, err := redirect.Cleanup(*pins, *node)
		if *asJSON {
			if jsonErr := e.json(map[string][]string{"removed": append([]string{}, removed...)}); jsonErr != nil {
				return jsonErr
			}
			return err
		}
		for _, what := range removed {
			e.printf("removed %s\n", clean(what))
		}
		if len(removed) == 0 && err == nil {
			e.printf("nothing to remove at %s\n", clean(*pins))
		}
		return err
	}
	return cmd
}

package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/cni"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/redirect"
)

const (
	defaultPins  = "/sys/fs/bpf/nodeproxy"
	defaultState = "/var/lib/nodeproxy"
)

func newCleanup(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove every program, map and pin of a daemon that does not run",
		Long: "Removes all that nodeproxy left in the kernel, and says what. It needs no daemon, no configuration and no network.\n" +
			"Workloads are outside the mesh afterwards: what they send is not encrypted. While a daemon runs it refuses.\n" +
			"A CNI plugin is taken out of the node's network configuration, which is what it was before.\n" +
			"Where there is a configuration with Consul for its source, and the agent can be reached, what the daemon registered\n" +
			"there is removed as well. What is not turns critical by itself.",
		Example: "  nodeproxy cleanup\n  nodeproxy cleanup --node node-1",
		Args:    exactly(),
	}
	pins := cmd.Flags().String("pins", defaultPins, "`DIR` of the pins, state.pins in the configuration")
	state := cmd.Flags().String("state", defaultState, "`DIR` where the daemon remembers the network configuration that a CNI plugin was added to, state.dir")
	node := cmd.Flags().String("node", "", "only the node `NAME`; all nodes if not given")
	path := configFlag(cmd)
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		removed, err := redirect.Cleanup(*pins, *node)
		if err == nil {
			var plugin []string
			plugin, err = cni.Remove(pluginState(*state))
			withdrawn, withdrawErr := withdraw(cmd.Context(), *path, cmd.Flags().Changed("config"))
			removed, err = append(append(removed, plugin...), withdrawn...), errors.Join(err, withdrawErr)
		}
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

// withdrawTimeout is how long an agent that does not answer may hold up cleanup.
const withdrawTimeout = 5 * time.Second

// withdraw removes what the daemon registered in Consul. A configuration that was not asked for by name may be absent.
func withdraw(ctx context.Context, path string, named bool) ([]string, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && !named {
		return nil, nil
	}
	cfg, err := config.Load(path)
	if err != nil || cfg.Consul == nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, withdrawTimeout)
	defer cancel()
	return consul.Withdraw(ctx, consulConfig(cfg))
}

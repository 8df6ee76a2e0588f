package main

import (
	"github.com/spf13/cobra"

	"nodeproxy.io/redirect"
)

func newVersion(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print version, commit and map ABI",
		Example: "  nodeproxy version",
		Args:    exactly(),
	}
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, _ []string) error {
		if *asJSON {
			return e.json(map[string]any{"version": version, "commit": commit, "map_abi": redirect.MapABI})
		}
		e.printf("nodeproxy %s, commit %s, map ABI %d\n", version, commit, redirect.MapABI)
		return nil
	}
	return cmd
}

package main

import (
	"os"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/check"
)

// newCanary is what check starts in the places of workloads.
func newCanary(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    check.CanaryCommand,
		Short:  "Make connections for \"nodeproxy check --workloads\"",
		Hidden: true,
		Args:   exactly(),
		RunE:   func(*cobra.Command, []string) error { return check.RunErrands(os.Stdin, e.stdout) },
	}
}

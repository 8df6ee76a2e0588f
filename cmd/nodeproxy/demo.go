package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/demo"
)

func newDemo(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show a mesh of two nodes on this machine, with nothing else installed",
		Long: "Makes two \"nodes\" out of network namespaces, each with a daemon, shows mTLS, an allowed and a denied caller, a live\n" +
			"revocation and the bytes on the wire, checks every claim that it makes, and removes everything. It needs root.",
		Example: "  sudo nodeproxy demo",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			binary, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find the path of this program: %w", err)
			}
			return demo.Run(cmd.Context(), demo.Config{Out: e.stdout, Color: bool(e.style()), Binary: binary})
		},
	}
}

// newDemoApp is the application of the demonstration: it comes with the program so that nothing else is needed.
func newDemoApp(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    demo.AppCommand,
		Short:  "The application that the demonstration protects",
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return demo.App(cmd.Context(), args, e.stdout)
		},
	}
}

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"nodeproxy.io/redirect"
)

// newReady is for the probes of a DaemonSet that is replaced by a surge: the daemons of two pods share the node's addresses, and
// which of them answers there says nothing of the pod that asks.
func newReady(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ready",
		Short:   "Succeed if the node's daemon runs in the cgroup of this command, and serves",
		Example: "  nodeproxy ready",
		Hidden:  true,
		Args:    exactly(),
	}
	client := socketFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		status, err := client().Status(cmd.Context())
		if err != nil {
			return err
		}
		own, err := redirect.ProcessCgroup(os.Getpid())
		if err != nil {
			return err
		}
		its, err := redirect.ProcessCgroup(status.PID)
		switch {
		case err != nil:
			return err
		case own != its:
			return fmt.Errorf("the node's daemon is process %d in %s, not in %s: this one has not taken over yet, or has handed over", status.PID, its, own)
		case status.Source.Generation == 0:
			return fmt.Errorf("no snapshot yet: %s", status.Source.Error)
		}
		e.printf("process %d serves\n", status.PID)
		return nil
	}
	return cmd
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/redirect"
)

// errElsewhere says that the node's daemon is not the one of this container.
var errElsewhere = errors.New("this one has not taken over yet, or has handed over")

// newReady and newLive are for the probes of a DaemonSet that is replaced by a surge: the daemons of two pods share the node's
// addresses, and which of them answers there says nothing of the pod that asks.
func newReady() *cobra.Command {
	return newProbe("ready", "Succeed if the node's daemon runs in the cgroup of this command, and serves", func(ctx context.Context, client *admin.Client) error {
		if err := isHere(ctx, client); err != nil {
			return err
		}
		h, err := client.Health(ctx)
		if err == nil && h.NotReady != "" {
			err = errors.New(h.NotReady)
		}
		return err
	})
}

func newLive() *cobra.Command {
	return newProbe("live", "Fail if the node's daemon runs in the cgroup of this command, and hangs", func(ctx context.Context, client *admin.Client) error {
		if err := isHere(ctx, client); errors.Is(err, errElsewhere) {
			return nil
		} else if err != nil {
			return err
		}
		h, err := client.Health(ctx)
		if err == nil && h.Hung != "" {
			err = errors.New(h.Hung)
		}
		return err
	})
}

func newProbe(name, short string, probe func(context.Context, *admin.Client) error) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Example: "  nodeproxy " + name, Hidden: true, Args: exactly()}
	client := socketFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return probe(cmd.Context(), client()) }
	return cmd
}

// isHere is nil if the node's daemon runs in the cgroup of this process. It needs no answer of the daemon.
func isHere(ctx context.Context, client *admin.Client) error {
	pid, err := client.PID(ctx)
	if err != nil {
		return err
	}
	own, err := redirect.ProcessCgroup(os.Getpid())
	if err != nil {
		return err
	}
	if its, err := redirect.ProcessCgroup(pid); err != nil || its != own {
		return fmt.Errorf("the node's daemon is process %d in cgroup %q, not in %q: %w", pid, its, own, errElsewhere)
	}
	return nil
}

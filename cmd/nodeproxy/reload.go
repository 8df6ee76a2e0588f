package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/config"
)

const (
	reloadTimeout = 90 * time.Second
	reloadLook    = 50 * time.Millisecond
)

func newReload(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Replace the running daemon by this version, with the configuration as it is now",
		Long: "Starts a daemon, which takes over from the one that runs, and ends once it has: no new connection fails, and live ones may\n" +
			"go on through the older daemon for limits.drain. If it cannot take over it says why, and the one that runs goes on.\n" +
			"Service managers call it (ExecReload=); elsewhere a second \"nodeproxy run\" takes over in the same way.",
		Example: "  nodeproxy reload --config /etc/nodeproxy/nodeproxy.hcl",
		Args:    exactly(),
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(*path)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeoutCause(cmd.Context(), reloadTimeout, fmt.Errorf("it has not taken over within %s", reloadTimeout))
		defer cancel()
		return reload(ctx, e, admin.NewClient(cfg.Admin.Socket), "run", "--config", *path)
	}
	return cmd
}

// reload starts this program with args and waits until that is the daemon. It outlives this process then, and not before.
func reload(ctx context.Context, e *env, daemon *admin.Client, args ...string) error {
	if _, err := daemon.Status(ctx); err != nil {
		return fmt.Errorf("replace the daemon: %w", err)
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("replace the daemon: %w", err)
	}
	next := exec.Command(program, args...)
	next.Stdout, next.Stderr = e.stdout, e.stderr
	next.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Getppid() == 1 {
		next.SysProcAttr.Cloneflags = unix.CLONE_PARENT // a service manager does not wait for the end of what is not its child
	}
	if err := next.Start(); err != nil {
		return fmt.Errorf("replace the daemon: %w", err)
	}
	ended, err := endOf(next.Process.Pid)
	if err != nil {
		return fmt.Errorf("replace the daemon: watch the next one: %w", err)
	}
	tick := time.NewTicker(reloadLook)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return errors.New("replace the daemon: the next one has ended, as it says above, and the one that runs goes on")
		case <-ctx.Done():
			_ = next.Process.Kill()
			<-ended
			return fmt.Errorf("replace the daemon: the one that runs goes on: %w", context.Cause(ctx))
		case <-tick.C:
			if s, err := daemon.Status(ctx); err == nil && s.PID == next.Process.Pid {
				return nil
			}
		}
	}
}

// endOf returns a channel that is closed when a process has ended, whosever child it is.
func endOf(pid int) (<-chan struct{}, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer unix.Close(fd)
		for { // what interrupts it is no end
			if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); n > 0 {
				return
			}
		}
	}()
	return ended, nil
}

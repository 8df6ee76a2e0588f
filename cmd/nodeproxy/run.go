package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/handover"
)

func newRun(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: "Runs the daemon of this node. If one runs already, this one takes over from it, and no new connection fails.\n\n" +
			"SIGTERM or SIGINT lets live connections end until limits.drain has passed; a second one ends it at once.\n" +
			"Either way what is pinned in the kernel stays in force: enrolled workloads connect again when a\n" +
			"daemon runs again, or after \"nodeproxy cleanup\".",
		Example: "  nodeproxy run --config /etc/nodeproxy/nodeproxy.hcl",
		Args:    exactly(),
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(*path)
		if err != nil {
			return err
		}
		return runDaemon(cmd.Context(), cfg, e.stderr)
	}
	return cmd
}

// newLogs returns the daemon's log, and that of connections, which has a level of its own (log.access).
func newLogs(cfg config.Log, out io.Writer) (log, access *slog.Logger) {
	handler := func(level slog.Level) slog.Handler {
		opts := &slog.HandlerOptions{Level: level}
		if cfg.Format == "json" {
			return slog.NewJSONHandler(out, opts)
		}
		return slog.NewTextHandler(out, opts)
	}
	return slog.New(handler(cfg.Level)), slog.New(handler(slog.LevelInfo))
}

// runDaemon runs until ctx ends, drains, and returns.
func runDaemon(ctx context.Context, cfg *config.Config, out io.Writer) error {
	log, access := newLogs(cfg.Log, out)
	before, err := handover.Begin(handoverSocket(cfg), self(cfg))
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	d, err := newNode(cfg, log, access, before)
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return fmt.Errorf("start the daemon: %w: run it as root", err)
	}
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	log.Info("started", "version", version, "commit", commit, "node", cfg.Node.Name, "source", cfg.Location(), "socket", cfg.Admin.Socket)
	stopping := context.AfterFunc(ctx, func() {
		notify(log, daemon.SdNotifyStopping)
		log.Info("stopping: live connections may end by themselves", "deadline", cfg.Limits.Drain)
	})
	defer stopping()
	var supervising sync.WaitGroup
	supervised, stop := context.WithCancel(ctx)
	supervising.Go(func() {
		select {
		case <-d.inOffice:
			d.supervise(supervised)
		case <-supervised.Done():
		}
	})
	err = d.run(ctx)
	stop()
	supervising.Wait()
	log.Info("stopped: what is pinned stays in force")
	return err
}

// notify tells the service manager, if there is one.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("tell the service manager", "state", state, "error", err)
	}
}

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
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/nodeproxy/handover"
	"nodeproxy.io/redirect"
)

func newRun(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: "Runs the daemon of this node. If one runs already, this one takes over from it, and no new connection fails.\n\n" +
			"SIGTERM or SIGINT lets live connections end until limits.drain has passed; a second one ends it at once.\n" +
			"Where systemd restarts the service they have two seconds, and new ones wait for the next daemon: systemd keeps the sockets.\n" +
			"Either way what is pinned in the kernel stays in force: enrolled workloads connect again when a\n" +
			"daemon runs again, or after \"nodeproxy cleanup\".",
		Example: "  nodeproxy run --config /etc/nodeproxy/nodeproxy.hcl",
		Args:    exactly(),
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		store, err := handover.FindStore()
		if err != nil {
			return err
		}
		err = run(cmd.Context(), *path, e, store)
		if err != nil && cmd.Context().Err() == nil {
			err = errors.Join(err, store.Drop()) // what waits must not wait for ever
		}
		return err
	}
	return cmd
}

func run(ctx context.Context, path string, e *env, store *handover.Store) error {
	cfg, err := config.Load(path)
	if err != nil {
		return err
	}
	if err := redirect.JoinNodeCgroups(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return runDaemon(ctx, cfg, store, e.stderr)
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

// capable names the capabilities that are missing: those without which nothing is begun, and in the log those that it does without.
func capable(log *slog.Logger) error {
	var missing []error
	for _, r := range check.Capabilities() {
		switch r.Verdict {
		case check.Failed:
			missing = append(missing, fmt.Errorf("%s: %s", r.Name, r.Text))
		case check.Warning:
			log.Warn(r.Name + ": " + r.Text)
		}
	}
	return errors.Join(missing...)
}

// runDaemon runs until ctx ends, drains, and returns.
func runDaemon(ctx context.Context, cfg *config.Config, store *handover.Store, out io.Writer) error {
	log, access := newLogs(cfg.Log, out)
	if err := capable(log); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	before, err := handover.Begin(handoverSocket(cfg), self(cfg))
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	left, err := leftBy(before, store, self(cfg))
	if err != nil {
		log.Warn("what waited for a daemon is refused", "error", err)
	}
	d, err := newNode(cfg, log, access, store, before, left)
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
	following, stopFollowing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopFollowing()
	if d.pods != nil {
		supervising.Go(func() { d.pods.FollowDaemonSet(following) })
	}
	err = d.run(ctx, cfg)
	stop()
	if d.released.Load() {
		stopping()
		log.Info("stopped: another daemon has the node")
		d.linger(ctx, cfg)
	}
	if d.pods != nil && err == nil && ctx.Err() != nil {
		err = d.leave(context.WithoutCancel(ctx), cfg)
	} else if !d.released.Load() {
		log.Info("stopped: what is pinned stays in force")
	}
	stopFollowing()
	supervising.Wait()
	return err
}

// leftBy is what there is of the daemon before: of the one that runs, or of one that is dead; nil for nothing.
func leftBy(before *handover.Succession, store *handover.Store, self handover.Self) (*handover.Estate, error) {
	if before != nil {
		return before.Estate, nil
	}
	return store.Open(self)
}

// lingering is how long a pod that has handed over waits for its end. Where nobody ends it, it is started anew and takes the node
// back, by which it is ready again.
const lingering = 2 * time.Minute

// linger waits for the end of the pod of a DaemonSet: what ends by itself there is started again at once.
func (d *node) linger(ctx context.Context, cfg *config.Config) {
	if cfg.Pods == nil || cfg.Pods.DaemonSet == "" {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(lingering):
	}
}

// leaveTimeout is how long an API server that does not answer may hold up the end of a pod, and leaveRetry when it is asked again.
const (
	leaveTimeout = 5 * time.Second
	leaveRetry   = 200 * time.Millisecond
)

// leave removes what is pinned if this was a pod of a DaemonSet that is there no more. In doubt it stays.
func (d *node) leave(ctx context.Context, cfg *config.Config) error {
	removed, err := d.removed(ctx)
	switch {
	case d.released.Load() && !removed:
		return nil // the other's pod answers for it
	case err != nil:
		d.log.Warn("stopped: what is pinned stays in force, and workloads stay closed until a daemon runs again; if it is removed for good run this on the node",
			"command", "nodeproxy cleanup --pins "+cfg.State.Pins+" --node "+cfg.Node.Name, "error", err)
		return nil
	case !removed:
		d.log.Info("stopped: what is pinned stays in force")
		return nil
	}
	if err := d.removePlugin(cfg); err != nil { // first: pods that start wait for a daemon
		d.log.Error("remove the CNI plugin", "error", err)
	}
	gone, err := d.cleanup(cfg)
	if errors.Is(err, redirect.ErrInUse) {
		d.log.Info("stopped: another daemon has the node, and all that is pinned")
		return nil
	}
	if err == nil && cfg.Consul != nil {
		withdrawing, cancel := context.WithTimeout(ctx, withdrawTimeout)
		defer cancel()
		var withdrawn []string
		withdrawn, err = consul.Withdraw(withdrawing, consulConfig(cfg))
		gone = append(gone, withdrawn...)
	}
	d.log.Info("stopped: the DaemonSet is removed, and with it what was pinned and registered", "removed", len(gone))
	return err
}

// removed says whether the DaemonSet is. Who may not ask any more, as the rights are removed with it, may be told yet.
func (d *node) removed(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	for {
		removed, err := d.pods.Removed(ctx)
		if err == nil {
			return removed, nil
		}
		select {
		case <-ctx.Done():
			return false, err
		case <-time.After(leaveRetry):
		}
	}
}

// cleanup removes what is pinned, once the daemon of another pod that ends too, and may not know why, has let go of it.
func (d *node) cleanup(cfg *config.Config) (gone []string, err error) {
	for until := time.Now().Add(cfg.Limits.Drain + leaveTimeout); ; time.Sleep(leaveRetry) {
		gone, err = redirect.Cleanup(cfg.State.Pins, cfg.Node.Name)
		if !errors.Is(err, redirect.ErrInUse) || time.Now().After(until) {
			return gone, err
		}
	}
}

// notify tells the service manager, if there is one.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("tell the service manager", "state", state, "error", err)
	}
}

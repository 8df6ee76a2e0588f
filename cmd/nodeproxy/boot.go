package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
	"nodeproxy.io/redirect"
)

const (
	bootTimeout = 20 * time.Second
	bootPoll    = 20 * time.Millisecond
)

func newBoot(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "boot",
		Short: "Close the enrolled workloads until the daemon runs",
		Long: "What is pinned in the kernel is gone after a reboot. This attaches to what is enrolled, before the network is up and\n" +
			"without a control plane, and ends: until a daemon runs, enrolled workloads connect to nothing but loopback, name servers\n" +
			"and their own addresses. The cgroups of systemd's services are made if they are not there yet. It does nothing when\n" +
			"nothing is enrolled, when there are pins already, and with on_failure = \"open\". nodeproxy-boot.service runs it.",
		Example: "  nodeproxy boot --config /etc/nodeproxy/nodeproxy.hcl",
		Args:    exactly(),
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(*path)
		if err != nil {
			return err
		}
		log, _ := newLogs(cfg.Log, e.stderr)
		ctx, cancel := context.WithTimeoutCause(cmd.Context(), bootTimeout, fmt.Errorf("not within %s", bootTimeout))
		defer cancel()
		return boot(ctx, cfg, log)
	}
	return cmd
}

func boot(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	if cfg.FailOpen {
		log.Info("nothing is closed: on_failure is \"open\"")
		return nil
	}
	pins := filepath.Join(cfg.State.Pins, cfg.Node.Name)
	if _, err := os.Stat(pins); !errors.Is(err, fs.ErrNotExist) {
		log.Info("nothing is closed: there are pins already, which hold", "pins", pins, "error", err)
		return nil
	}
	claims, err := bootClaims(ctx, cfg)
	if err != nil {
		return fmt.Errorf("close enrolled workloads: %w", err)
	}
	if len(claims) == 0 {
		log.Info("nothing is closed: no workload is enrolled")
		return nil
	}
	manager, err := workload.NewManager(workload.Config{
		Node: cfg.Node.Name, Pins: cfg.State.Pins, Mode: *modeOf(cfg.Inbound.Mode), Providers: []workload.Provider{claims}, Log: log,
		NotDirect: "no daemon runs",
	})
	if err != nil {
		return fmt.Errorf("close enrolled workloads: %w", err)
	}
	err = attach(ctx, manager, log)
	return errors.Join(err, manager.Close())
}

// bootClaims lists what is enrolled, one claim a cgroup, and makes the cgroups of services that systemd has not started yet.
func bootClaims(ctx context.Context, cfg *config.Config) (workload.Configured, error) {
	manual, err := workload.NewManual(filepath.Join(cfg.State.Dir, "enrolled.json"))
	if err != nil {
		return nil, err
	}
	claims := append(configuredClaims(cfg), manual.Claims()...)
	if cfg.Systemd {
		mount, err := redirect.CgroupMount()
		if err != nil {
			return nil, err
		}
		units, err := workload.UnitClaims(ctx, mount)
		if err != nil {
			return nil, err
		}
		claims = append(claims, units...)
	}
	for _, c := range claims {
		if filepath.Ext(c.Cgroup) != ".service" || c.Invalid != "" {
			continue
		}
		if err := os.MkdirAll(c.Cgroup, 0o755); err != nil {
			return nil, fmt.Errorf("make the cgroup of a service: %w", err)
		}
	}
	return claims, nil
}

// attach runs the manager until every workload is attached.
func attach(ctx context.Context, manager *workload.Manager, log *slog.Logger) error {
	running, stop := context.WithCancel(ctx)
	defer stop()
	nothing := closed{manager, log}
	nothing.Need(nil)
	var run sync.WaitGroup
	var runErr error
	run.Go(func() { runErr = manager.Run(running, nothing) })
	tick := time.NewTicker(bootPoll)
	defer tick.Stop()
	for {
		h := manager.Health()
		if h.Known && len(h.Unprotected) == 0 {
			stop()
			run.Wait()
			return runErr
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			run.Wait()
			for _, w := range h.Unprotected {
				runErr = errors.Join(runErr, fmt.Errorf("attach to %s: %s", w.Workload.Cgroup, w.Detail))
			}
			return errors.Join(context.Cause(ctx), runErr)
		}
	}
}

// closed is a mesh of which nothing is known: workloads of any service are attached, and reach nobody.
type closed struct {
	manager *workload.Manager
	log     *slog.Logger
}

// Need implements workload.Handler.
func (c closed) Need(services []string) {
	leaves := make(map[string]*tls.Certificate)
	for _, service := range services {
		leaves[service] = new(tls.Certificate) // nobody is served: it is shown to nobody
	}
	snap, err := catalog.New(catalog.Snapshot{Generation: 1, Taken: time.Now(), MeshOnly: true, Leaves: leaves, Policy: new(policy.Policy)})
	if err == nil {
		err = c.manager.Apply(context.Background(), snap)
	}
	if err != nil {
		c.log.Error("close enrolled workloads", "error", err)
	}
}

// Settle implements workload.Handler.
func (closed) Settle(context.Context) {}

// Ending implements workload.Handler.
func (closed) Ending([]string) {}

// ServeOutbound implements workload.Handler.
func (closed) ServeOutbound(_ *workload.Namespace, ln *net.TCPListener) { refuse(ln) }

// ServeUpstream implements workload.Handler.
func (closed) ServeUpstream(ln *net.UnixListener, _ func(*net.UnixConn) (*workload.Origin, error)) {
	refuse(ln)
}

// ServeInbound implements workload.Handler.
func (closed) ServeInbound(_ *workload.Namespace, ln *net.TCPListener) { refuse(ln) }

func refuse(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // else it is closed without a reset
		}
		_ = conn.Close() // nothing was sent
	}
}

// Verdict implements workload.Handler.
func (closed) Verdict(workload.KernelVerdict) {}

// Direct implements workload.Handler.
func (closed) Direct(workload.DirectConnection) {}

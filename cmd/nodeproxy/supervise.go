package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"nodeproxy.io/nodeproxy"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/redirect"
)

const (
	superviseEvery = time.Second
	readyEvery     = 50 * time.Millisecond                              // until it is ready
	staleBeat      = time.Duration(redirect.StaleSeconds) * time.Second // what the kernel takes for a dead daemon
	staleLook      = 30 * time.Second
	startLasts     = 5 * time.Second // from when it is ready
	// readyAnyway is how long one workload that cannot be protected may keep the node from being ready.
	readyAnyway = 30 * time.Second
)

// supervise tells the service manager how the node is, until ctx ends.
func (d *node) supervise(ctx context.Context) {
	watched, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		d.log.Warn("the service manager's watchdog is not fed", "error", err)
	}
	// One that took over is not told whether there is a watchdog.
	s := supervisor{watched: watched > 0 || d.before != nil, tell: func(state string) { notify(d.log, state) }, log: d.log, source: d.SourceError}
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	var settled <-chan time.Time
	for ctx.Err() == nil {
		wasReady := s.ready
		if s.look(time.Now(), d.manager.Health()); s.ready && !wasReady {
			tick.Reset(superviseEvery)
			settled = time.After(startLasts)
		}
		select {
		case <-ctx.Done():
		case <-settled:
			if err := nodeproxy.GiveBack(); err != nil {
				d.log.Warn("memory that the start took is not given back", "error", err)
			}
		case <-tick.C:
		}
	}
}

// supervisor turns the node's health into what sd_notify(3) defines.
type supervisor struct {
	watched bool // the service manager has a watchdog
	source  func() string
	tell    func(state string)
	log     *slog.Logger

	known time.Time // when the workloads were first known
	ready bool
	last  string
}

func (s *supervisor) look(now time.Time, h workload.Health) {
	if h.Known && s.known.IsZero() {
		s.known = now
	}
	if status := s.status(h); status != s.last {
		s.last = status
		s.tell("STATUS=" + status)
	}
	if h.Known && !s.ready && (len(h.Unprotected) == 0 || now.Sub(s.known) >= readyAnyway) {
		s.ready = true
		s.tell(daemon.SdNotifyReady)
		s.log.Info("ready: " + s.last)
	}
	if s.watched && alive(now, h) == nil {
		s.tell(daemon.SdNotifyWatchdog)
	}
}

// alive says why the daemon is taken for hung.
func alive(now time.Time, h workload.Health) error {
	switch {
	case now.Sub(h.Beat) >= staleBeat:
		return fmt.Errorf("the kernel's heartbeat was last written %s ago", now.Sub(h.Beat).Round(time.Second))
	case now.Sub(h.Looked) >= staleLook:
		return fmt.Errorf("the workloads were last looked at %s ago", now.Sub(h.Looked).Round(time.Second))
	}
	return nil
}

func (s *supervisor) status(h workload.Health) string {
	switch {
	case !h.Known:
		return oneLine("nothing is known of the mesh yet: " + cmp.Or(s.source(), "the first answer of the source is awaited"))
	case len(h.Unprotected) > 0:
		first := h.Unprotected[0]
		return oneLine(fmt.Sprintf("%d of %d workloads are not protected; %s: %s", len(h.Unprotected), h.Workloads, first.Workload.Cgroup, first.Detail))
	}
	return fmt.Sprintf("%d workloads, all protected", h.Workloads)
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

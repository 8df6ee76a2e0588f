package main

import (
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"nodeproxy.io/nodeproxy/workload"
)

func TestTheServiceManagerHearsOfWhatTheDatapathDoes(t *testing.T) {
	var told []string
	s := supervisor{watched: true, log: slog.New(slog.DiscardHandler), tell: func(state string) { told = append(told, state) },
		source: func() string { return errors.New("the agent\ndoes not answer").Error() }}
	now := time.Now()
	look := func(h workload.Health, want ...string) {
		t.Helper()
		told = nil
		if s.look(now, h); !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	}
	look(workload.Health{Beat: now, Looked: now}, "STATUS=nothing is known of the mesh yet: the agent does not answer", daemon.SdNotifyWatchdog)
	waiting := workload.Health{Beat: now, Looked: now, Known: true, Workloads: 2,
		Unprotected: []workload.WorkloadState{{Workload: &workload.Workload{Cgroup: "/c/web"}, State: "waiting", Detail: "no certificate"}}}
	look(waiting, "STATUS=1 of 2 workloads are not protected; /c/web: no certificate", daemon.SdNotifyWatchdog)
	protected := workload.Health{Beat: now, Looked: now, Known: true, Workloads: 2}
	look(protected, "STATUS=2 workloads, all protected", daemon.SdNotifyReady, daemon.SdNotifyWatchdog)
	look(protected, daemon.SdNotifyWatchdog)

	now = now.Add(staleBeat) // nobody has told the kernel since
	look(protected)
	protected.Beat = now
	look(protected, daemon.SdNotifyWatchdog)
	now = now.Add(staleLook) // nobody has looked at the workloads since
	protected.Beat = now
	look(protected)
}

func TestOneWorkloadDoesNotKeepTheNodeFromBeingReadyForEver(t *testing.T) {
	var told []string
	s := supervisor{log: slog.New(slog.DiscardHandler), tell: func(state string) { told = append(told, state) }}
	h := workload.Health{Known: true, Workloads: 1, Unprotected: []workload.WorkloadState{{Workload: new(workload.Workload), State: "waiting"}}}
	now := time.Now()
	s.look(now, h)
	if slices.Contains(told, daemon.SdNotifyReady) {
		t.Error("ready at once")
	}
	s.look(now.Add(readyAnyway), h)
	if !slices.Contains(told, daemon.SdNotifyReady) {
		t.Error("never ready")
	}
}

package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/workload"
)

func TestAccessLogDoesNotDependOnTheLogLevel(t *testing.T) {
	var out bytes.Buffer
	log, access := newLogs(config.Log{Level: slog.LevelError, Format: "json"}, &out)
	log.Info("quiet")
	access.Info("connection closed")
	if got := out.String(); strings.Contains(got, "quiet") || !strings.Contains(got, `"msg":"connection closed"`) {
		t.Errorf("log = %s, want the access line alone, in JSON", got)
	}
}

func TestServiceManagerIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	t.Setenv("NOTIFY_SOCKET", path)
	notify(slog.New(slog.DiscardHandler), daemon.SdNotifyReady)
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 64)
	n, err := conn.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("told %q (%v), want READY=1", b[:n], err)
	}
}

func TestClaimsCarryTheirOwnModeOrNone(t *testing.T) {
	if modeOf("") != nil {
		t.Error("no mode became one")
	}
	if m := modeOf(config.Permissive); m == nil || *m != workload.Permissive {
		t.Error("permissive was lost")
	}
	if m := modeOf("strict"); m == nil || *m != workload.Strict {
		t.Error("strict was lost")
	}
}

func TestEnrollingByHandDoesNotCompeteWithAnotherProvider(t *testing.T) {
	state := []workload.WorkloadState{
		{Workload: &workload.Workload{Cgroup: "/c/web", Service: "web", Provider: "config"}},
		{Workload: &workload.Workload{Cgroup: "/c/api", Service: "api", Provider: "enroll"}},
	}
	err := claimedElsewhere(state, workload.Claim{Cgroup: "/c/web", Service: "api", Provider: "enroll"})
	if err == nil || !strings.Contains(err.Error(), `provider "config" has it as service "web"`) {
		t.Errorf("error = %v, want one that names the provider", err)
	}
	for _, cgroup := range []string{"/c/api", "/c/new"} {
		if err := claimedElsewhere(state, workload.Claim{Cgroup: cgroup, Service: "x", Provider: "enroll"}); err != nil {
			t.Errorf("%s: %v", cgroup, err)
		}
	}
}

// oneSnapshot is a source that delivers one snapshot.
type oneSnapshot struct {
	catalog.Source
	snap *catalog.Snapshot
}

func (s oneSnapshot) Run(_ context.Context, deliver func(*catalog.Snapshot)) error {
	deliver(s.snap)
	return nil
}

func TestMetricsKnowTheServicesOfASnapshotBeforeTheProxyDoes(t *testing.T) {
	snap := &catalog.Snapshot{Services: map[string]*catalog.Service{"api": {Name: "api", IgnoredL7: []string{"router"}}}}
	m := admin.NewMetrics(func() admin.Status { return admin.Status{} }, func() []admin.Connection { return nil })
	delivered := false
	err := (&toldSource{oneSnapshot{snap: snap}, []func(*catalog.Snapshot){m.Apply}}).Run(t.Context(), func(got *catalog.Snapshot) {
		delivered = got == snap
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		wantText(t, w.Body.String(), `nodeproxy_l7_config_ignored{destination_service="api"} 1`)
	})
	if err != nil || !delivered {
		t.Errorf("delivered %v, %v", delivered, err)
	}
}

func sourceConfig(dir string) *config.Config {
	return &config.Config{
		Node:    config.Node{Name: "node-1", Address: netip.MustParseAddr("10.0.0.5")},
		Source:  config.FileSource{Path: dir, VirtualIPs: netip.MustParsePrefix("240.0.0.0/8")},
		Inbound: config.Inbound{Mode: config.Strict, FirstPort: 21500, LastPort: 21599},
	}
}

func TestReadingASourceReturnsItsFirstSnapshot(t *testing.T) {
	dir := t.TempDir()
	nodes := filepath.Join(dir, "nodes", "node-1")
	if err := os.MkdirAll(nodes, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(nodes, "web.hcl"), []byte(`service { name = "web"  port = 80 }`), 0o600); err != nil {
		t.Fatal(err)
	}
	snap, err := readSource(t.Context(), sourceConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if snap.Services["web"] == nil {
		t.Errorf("services = %v, want web", snap.Services)
	}
}

func TestReadingABrokenSourceFailsAtOnceWithFileAndLine(t *testing.T) {
	dir := t.TempDir()
	nodes := filepath.Join(dir, "nodes", "node-1")
	if err := os.MkdirAll(nodes, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(nodes, "web.hcl"), []byte("service {\n colour = 1\n}"), 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_, err := readSource(t.Context(), sourceConfig(dir))
	if time.Since(start) >= readTimeout {
		t.Error("it waited for a snapshot in spite of the error")
	}
	if err == nil || !strings.Contains(err.Error(), "web.hcl:2") {
		t.Errorf("error = %v, want web.hcl:2", err)
	}
}

func TestUnenrollingWhatNobodyEnrolledByHandIsNotFound(t *testing.T) {
	manual, err := workload.NewManual(filepath.Join(t.TempDir(), "enrolled.json"))
	if err != nil {
		t.Fatal(err)
	}
	err = (&node{manual: manual}).Unenroll(t.Context(), admin.EnrollRequest{Cgroup: "/c/web"})
	if !errors.Is(err, admin.ErrNotFound) || !strings.Contains(err.Error(), "un-enroll /c/web: it was not enrolled by hand") {
		t.Errorf("error = %v, want not found", err)
	}
}

func TestAWorkloadCanOnlyBeAServiceThatHasAName(t *testing.T) {
	for _, service := range []string{"../../other", "a b", "*", "a/b"} {
		err := new(node).Enroll(t.Context(), admin.EnrollRequest{Cgroup: "/c/web", Service: service})
		if !errors.Is(err, admin.ErrRefused) || !strings.Contains(err.Error(), "/c/web") {
			t.Errorf("%q: %v, want a refusal", service, err)
		}
	}
}

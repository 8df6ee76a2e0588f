package file

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	webHCL   = `service { name = "web" }`
	apiHCL   = `service { name = "api"  id = "api-1"  port = 8080 }`
	webToAPI = "Kind = \"service-intentions\"\nName = \"api\"\nSources = [ { Name = \"web\"  Action = \"allow\" } ]"
	webNoAPI = "Kind = \"service-intentions\"\nName = \"api\"\nSources = [ { Name = \"web\"  Action = \"deny\" } ]"
)

const patience = 20 * time.Second

// dir makes a mesh directory of files, whose names are relative.
func dir(t testing.TB, files map[string]string) string {
	t.Helper()
	d := t.TempDir()
	for name, data := range files {
		put(t, d, name, data)
	}
	return d
}

// put replaces a file by rename, as operators should.
func put(t testing.TB, dir, name, data string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	if err := errors.Join(os.WriteFile(tmp, []byte(data), 0o644), os.Rename(tmp, path)); err != nil {
		t.Fatal(err)
	}
}

func testConfig(dir, node string) Config {
	return Config{
		Dir: dir, Node: node, NodeAddress: netip.MustParseAddr("10.0.0." + node[len(node)-1:]),
		VirtualRange: netip.MustParsePrefix("240.0.0.0/24"), Ports: Ports{21500, 21599},
	}
}

// started is a running source and the snapshots it has delivered.
type started struct {
	*Source
	t         testing.TB
	snapshots chan *catalog.Snapshot
	last      *catalog.Snapshot
}

func start(t testing.TB, cfg Config, change ...func(*Source)) *started {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(s)
	}
	run := &started{Source: s, t: t, snapshots: make(chan *catalog.Snapshot, 1000)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(snap *catalog.Snapshot) { run.snapshots <- snap }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end with its context")
		}
	})
	return run
}

// until waits for a snapshot for which ok holds.
func (s *started) until(what string, ok func(*catalog.Snapshot) bool) *catalog.Snapshot {
	s.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case snap := <-s.snapshots:
			if s.last != nil && snap.Generation <= s.last.Generation {
				s.t.Fatalf("generation %d after %d", snap.Generation, s.last.Generation)
			}
			s.last = snap
			if ok(snap) {
				return snap
			}
		case <-deadline:
			s.t.Fatalf("no snapshot with %s; health: %v", what, s.Health().Err)
		}
	}
}

func (s *started) first() *catalog.Snapshot {
	s.t.Helper()
	return s.until("anything", func(*catalog.Snapshot) bool { return true })
}

// untilError waits for Health to hold all of want.
func (s *started) untilError(want ...string) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := s.Health().Err
		missing := ""
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("health is %v, want %q in it", err, missing)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (s *started) untilHealthy() {
	s.t.Helper()
	for deadline := time.Now().Add(patience); s.Health().Err != nil; <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("health is still %v", s.Health().Err)
		}
	}
}

func find(snap *catalog.Snapshot, service, id string) *catalog.Instance {
	if svc := snap.Services[service]; svc != nil {
		for _, inst := range svc.Instances {
			if inst.ID == id {
				return inst
			}
		}
	}
	return nil
}

func problems(snap *catalog.Snapshot) string {
	var b strings.Builder
	for _, p := range snap.Problems {
		fmt.Fprintln(&b, p.Service, p.Kind, p.Text)
	}
	return b.String()
}

func allow(snap *catalog.Snapshot, src, dst string) bool {
	return snap.Policy.Decide(snap.Identity(src), dst).Allowed
}

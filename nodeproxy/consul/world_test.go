package consul_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/policy"
	lab "nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/netlab"
)

// patience is how long a test waits for what must happen. It is long because the machine may be busy.
const patience = 60 * time.Second

// world is one agent, a proxy before it that can misbehave, and a source.
type world struct {
	t      testing.TB
	lab    *netlab.Lab
	agent  *lab.Agent
	front  *lab.Front
	config consul.Config

	source *consul.Source
	stop   func()
	mu     sync.Mutex
	last   *catalog.Snapshot
	all    []*catalog.Snapshot
	news   chan struct{}
}

func newWorld(t testing.TB, cfg lab.Config) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: runs a Consul")
	}
	lab.Require(t)
	l, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, lab: l, news: make(chan struct{}, 1)}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	if cfg.Namespace, err = l.Namespace(); err != nil {
		t.Fatal(err)
	}
	cfg.Node = "node-1"
	if w.agent, err = lab.Start(w.ctx(), l, cfg); err != nil {
		t.Fatal(err)
	}
	w.front = lab.NewFront(t, w.agent.Socket())
	w.config = consul.Config{
		Address: "unix://" + w.front.Socket, Node: "node-1", NodeAddress: netip.MustParseAddr("192.0.2.1"),
		VirtualRanges: []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4")},
		Log:           slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	return w
}

// testWriter writes the source's log into the test's.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// run runs a source until the test ends, or stop.
func (w *world) run(need ...string) {
	w.t.Helper()
	w.start(func(*consul.Source) {}, need...)
}

// start is run with a source that was prepared.
func (w *world) start(prepare func(*consul.Source), need ...string) {
	w.t.Helper()
	var err error
	w.source, err = consul.New(w.config)
	w.must(err)
	prepare(w.source)
	w.source.Need(need)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.source.Run(ctx, w.deliver) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.t.Errorf("Run returns %v", err)
			}
		case <-time.After(patience):
			w.t.Error("Run does not return")
		}
	})
	w.t.Cleanup(w.stop)
}

func (w *world) deliver(snap *catalog.Snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last != nil && snap.Generation <= w.last.Generation {
		w.t.Errorf("generation %d after %d", snap.Generation, w.last.Generation)
	}
	w.last = snap
	w.all = append(w.all, snap)
	select {
	case w.news <- struct{}{}:
	default:
	}
}

func (w *world) current() *catalog.Snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// await waits for a snapshot that check accepts.
func (w *world) await(what string, check func(*catalog.Snapshot) error) *catalog.Snapshot {
	w.t.Helper()
	deadline := time.After(patience)
	for {
		snap, err := w.current(), errors.New("there is none")
		if snap != nil {
			err = check(snap)
		}
		if err == nil {
			return snap
		}
		select {
		case <-w.news:
		case <-deadline:
			w.t.Fatalf("no snapshot in which %s: %v; health: %+v", what, err, w.source.Health())
		}
	}
}

// awaitHealth waits for a state of health, which nothing announces.
func (w *world) awaitHealth(what string, check func(catalog.Health) bool) catalog.Health {
	w.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		h := w.source.Health()
		if check(h) {
			return h
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("health never shows %s: %+v", what, h)
		}
	}
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(w.t.Context(), patience, fmt.Errorf("not within %s", patience))
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func denied(source, service string) func(*catalog.Snapshot) error {
	return func(s *catalog.Snapshot) error {
		if v := s.Policy.Decide(s.Identity(source), service); v.Allowed || v.Why == policy.ByDefault {
			return fmt.Errorf("%+v", v)
		}
		return nil
	}
}

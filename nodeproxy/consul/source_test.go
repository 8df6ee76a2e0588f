package consul_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/netlab"
)

// patience is how long a test waits for what must happen. It is long because the machine may be busy.
const patience = 60 * time.Second

// world is one agent, a proxy before it that can misbehave, and a source.
type world struct {
	t      *testing.T
	lab    *netlab.Lab
	agent  *lab.Agent
	front  *front
	config consul.Config

	source *consul.Source
	mu     sync.Mutex
	last   *catalog.Snapshot
	all    []*catalog.Snapshot
	news   chan struct{}
}

func newWorld(t *testing.T, cfg lab.Config) *world {
	t.Helper()
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
	w.front = newFront(t, w.agent.Socket())
	w.config = consul.Config{
		Address: "unix://" + w.front.socket, Node: "node-1", NodeAddress: netip.MustParseAddr("192.0.2.1"),
		VirtualRanges: []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4")},
		Log:           slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	return w
}

// testWriter writes the source's log into the test's.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// run runs a source until the test ends.
func (w *world) run(need ...string) {
	w.t.Helper()
	var err error
	w.source, err = consul.New(w.config)
	w.must(err)
	w.source.Need(need)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.source.Run(ctx, w.deliver) }()
	w.t.Cleanup(func() {
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

// front stands between the source and its agent, counts, and misbehaves when told to.
type front struct {
	socket string

	mu       sync.Mutex
	agent    http.RoundTripper
	spoil    func(http.ResponseWriter, *http.Request) bool // true: it has answered
	change   func(*http.Request, http.Header)              // of the agent's answers
	open     map[net.Conn]bool
	most     int
	statuses map[int]int
	requests map[string]int // by path
}

func newFront(t *testing.T, agent string) *front {
	t.Helper()
	f := &front{
		socket: filepath.Join(t.TempDir(), "front.sock"),
		agent: &http.Transport{MaxIdleConnsPerHost: 300, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", agent)
		}},
		open: make(map[net.Conn]bool), statuses: make(map[int]int), requests: make(map[string]int),
	}
	ln, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: f, ConnState: f.connState}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	t.Cleanup(func() { server.Close(); <-done })
	return f
}

func (f *front) connState(c net.Conn, s http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s {
	case http.StateNew:
		f.open[c] = true
		f.most = max(f.most, len(f.open))
	case http.StateClosed, http.StateHijacked:
		delete(f.open, c)
	}
}

func (f *front) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	f.mu.Lock()
	spoil, change := f.spoil, f.change
	f.requests[req.URL.Path]++
	f.mu.Unlock()
	if spoil != nil && spoil(rw, req) {
		return
	}
	out := req.Clone(req.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = "http", "agent", ""
	resp, err := f.agent.RoundTrip(out)
	if err != nil {
		panic(http.ErrAbortHandler) // the client sees the connection close, as it does without us
	}
	defer resp.Body.Close()
	f.mu.Lock()
	f.statuses[resp.StatusCode]++
	f.mu.Unlock()
	if change != nil {
		change(req, resp.Header)
	}
	for k, v := range resp.Header {
		rw.Header()[k] = v
	}
	rw.WriteHeader(resp.StatusCode)
	io.Copy(rw, resp.Body)
}

// fail answers what match accepts with a status until it is called with nil.
func (f *front) fail(status int, match func(*http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.spoil = nil; match != nil {
		f.spoil = func(rw http.ResponseWriter, req *http.Request) bool {
			if !match(req) {
				return false
			}
			http.Error(rw, http.StatusText(status), status)
			return true
		}
	}
}

func (f *front) count(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests[path]
}

func TestASnapshotHoldsWhatTheAgentKnows(t *testing.T) {
	w := newWorld(t, lab.Config{})
	api := lab.Service("api", "api-1", "10.1.2.3", 8080)
	api["Meta"] = map[string]string{"version": "2"}
	w.must(w.agent.Register(w.ctx(), api))
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "old", "ID": "old-1", "Address": "10.1.2.4", "Port": 1234, "Connect": map[string]any{"Native": true}}))
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "web", "ID": "web-1"}))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "http", "MaxInboundConnections": 7}))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-splitter", "Name": "api", "Splits": []map[string]any{{"Weight": 100}}}))
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "allow", "*": "deny"}))
	w.run("web", "api")
	snap := w.await("api and web have leaves and api a virtual IP", func(s *catalog.Snapshot) error {
		if s.Leaves["web"] == nil || s.Leaves["api"] == nil || s.Services["api"] == nil || len(s.Services["api"].Virtual) != 1 {
			return fmt.Errorf("leaves %v, services %v", s.Leaves, s.Services)
		}
		return nil
	})
	got := *snap.Services["api"].Instances[0]
	if len(snap.Services["api"].Instances) != 1 || got.ID != "api-1" || !got.Local || got.Native ||
		got.Address.String() != "10.1.2.3:8080" || got.Mesh.String() != "10.1.2.3:21000" || got.Delivery.String() != "127.0.0.1:8080" || got.Meta["version"] != "2" {
		t.Errorf("api: %+v", got)
	}
	if s := snap.Services["api"]; s.Protocol != "http" || s.MaxInbound != 7 || len(s.IgnoredL7) != 1 || s.IgnoredL7[0] != "service-splitter" {
		t.Errorf("api: %+v", s)
	}
	if d, ok := snap.Resolve(netip.AddrPortFrom(snap.Services["api"].Virtual[0], 80)); !ok || d.Service.Name != "api" {
		t.Errorf("the virtual IP %s is %v", snap.Services["api"].Virtual, d)
	}
	native := *snap.Services["old"].Instances[0]
	if !native.Native || native.Address.IsValid() || native.Mesh.String() != "10.1.2.4:1234" {
		t.Errorf("native: %+v", native)
	}
	if v := snap.Policy.Decide(snap.Identity("web"), "api"); !v.Allowed {
		t.Errorf("web to api: %+v", v)
	}
	if v := snap.Policy.Decide(snap.Identity("batch"), "api"); v.Allowed {
		t.Errorf("batch to api: %+v", v)
	}
	if v := snap.Policy.Decide(snap.Identity("batch"), "old"); !v.Allowed { // ACLs are off
		t.Errorf("batch to old: %+v", v)
	}
	if id := snap.Leaves["web"].Leaf.URIs[0].String(); id != snap.Identity("web").String() {
		t.Errorf("web's leaf is %s", id)
	}
	if len(snap.VirtualRanges) != 1 {
		t.Errorf("ranges: %v", snap.VirtualRanges)
	}
}

func TestAnIntentionIsInForceAtOnceAndWhenItIsRemoved(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("api")
	allowed := func(want bool) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			if s.Services["api"] == nil || s.Policy.Decide(s.Identity("web"), "api").Allowed != want {
				return errors.New("it is not")
			}
			return nil
		}
	}
	before := w.await("web may connect by default", allowed(true))
	began := time.Now()
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	denied := w.await("web may not connect", allowed(false))
	t.Logf("from the write to the snapshot: %s", time.Since(began))
	if denied.Policy.Generation() <= before.Policy.Generation() {
		t.Errorf("policy generation %d after %d", denied.Policy.Generation(), before.Policy.Generation())
	}
	w.must(w.agent.Remove(w.ctx(), "service-intentions", "api"))
	w.await("web may connect again", allowed(true))
}

package consul_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

func TestAnotherInstanceOfAKnownServiceThatNobodyCallsIsSeen(t *testing.T) {
	w := newWorld(t, lab.Config{})
	register := func(i int) {
		t.Helper()
		put := func(service map[string]any) {
			w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{"Node": "far", "Address": "192.0.2.7", "Service": service}, nil))
		}
		put(map[string]any{"ID": fmt.Sprintf("api-%d", i), "Service": "api", "Port": 8080 + i})
		put(map[string]any{
			"Kind": "connect-proxy", "ID": fmt.Sprintf("api-%d-sidecar-proxy", i), "Service": "api-sidecar-proxy", "Port": 21000 + i,
			"Proxy": map[string]any{"DestinationServiceName": "api", "DestinationServiceID": fmt.Sprintf("api-%d", i)},
		})
	}
	known := func(n int) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			if s.Services["api"] == nil || len(s.Services["api"].Instances) != n {
				return fmt.Errorf("api is %+v", s.Services["api"])
			}
			return nil
		}
	}
	register(1)
	w.run()
	w.await("api has an instance", known(1))
	register(2)
	w.await("api has two instances", known(2))
}

func denied(source, service string) func(*catalog.Snapshot) error {
	return func(s *catalog.Snapshot) error {
		if v := s.Policy.Decide(s.Identity(source), service); v.Allowed || v.Why == policy.ByDefault {
			return fmt.Errorf("%+v", v)
		}
		return nil
	}
}

func TestStormsOfErrorsChangeNothingAndAreMetWithPatience(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusForbidden} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			w := newWorld(t, lab.Config{})
			w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
			w.run("api")
			ready := func(s *catalog.Snapshot) error {
				if s.Services["api"] == nil || s.Leaves["api"] == nil {
					return errors.New("api is not ready")
				}
				return nil
			}
			w.await("api is ready", ready)
			w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })

			w.front.Fail(status, func(*http.Request) bool { return true })
			w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"})) // wakes a query
			h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
			if !strings.Contains(h.Err.Error(), http.StatusText(status)) || time.Since(h.Updated) > patience {
				t.Errorf("health: %+v", h)
			}
			asked := w.front.Total()
			time.Sleep(3 * time.Second) // the rate is what is asserted
			if n := w.front.Total() - asked; n > 60 {
				t.Errorf("%d requests in three seconds", n)
			}
			if err := ready(w.current()); err != nil {
				t.Error(err)
			}
			w.front.Fail(0, nil)
			w.await("the intention is in force", denied("web", "api"))
			w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
		})
	}
}

func TestOneForbiddenAnswerIsNoError(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	var once sync.Map
	w.front.Fail(http.StatusForbidden, func(req *http.Request) bool {
		_, again := once.LoadOrStore(req.URL.Path, true)
		return !again
	})
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return w.source.Health().Err
	})
}

func TestADeadAgentsLastWordStaysInForce(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.run("api")
	w.await("the intention is in force", denied("web", "api"))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil && !h.Updated.IsZero() })
	before := w.current()
	killed := time.Now()
	w.agent.Process.Kill()
	h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
	if h.Updated.After(killed.Add(time.Second)) || killed.Sub(h.Updated) > 15*time.Second {
		t.Errorf("the agent was killed at %s; health says %+v", killed, h)
	}
	if now := w.current(); now != before {
		t.Errorf("a snapshot without anything new: %+v", now)
	}

	w.must(w.agent.Restart(w.ctx())) // with another CA, and nothing registered
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.await("the new agent's word is in force", func(s *catalog.Snapshot) error {
		if s.TrustDomain == before.TrustDomain || s.Services["api"] == nil || s.Leaves["api"] == nil {
			return fmt.Errorf("trust domain %s, before %s; %d services; leaves %v", s.TrustDomain, before.TrustDomain, len(s.Services), s.Leaves)
		}
		if s.Leaves["api"].Leaf.URIs[0].String() != s.Identity("api").String() {
			return errors.New("the leaf is of the other mesh")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

func TestAnIndexThatGoesBackStartsOver(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	const path = "/v1/connect/intentions/match"
	var asked []string // the indexes, in order
	w.front.Change = func(req *http.Request, answer *http.Response) {
		if req.URL.Path == path && !req.URL.Query().Has("index") {
			answer.Header.Set("X-Consul-Index", "1000000") // as of a server that has since been replaced
		}
	}
	w.front.Spoil = func(_ http.ResponseWriter, req *http.Request) bool {
		q := req.URL.Query()
		if req.URL.Path != path {
			return false
		}
		w.front.Lock()
		defer w.front.Unlock()
		asked = append(asked, q.Get("index"))
		if q.Get("index") == "1000000" { // it would be answered after the whole wait, there being no such index
			q.Set("wait", "100ms")
			req.URL.RawQuery = q.Encode()
		}
		return false
	}
	w.run("api")
	w.await("there is one", func(*catalog.Snapshot) error { return nil })
	w.front.Lock()
	w.front.Change = nil
	w.front.Unlock()
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("the intention is in force", denied("web", "api"))
	w.must(w.agent.Remove(w.ctx(), "service-intentions", "api"))
	w.await("it is gone", func(s *catalog.Snapshot) error {
		if v := s.Policy.Decide(s.Identity("web"), "api"); !v.Allowed {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("it is back", denied("web", "api"))
	if err := w.source.Health().Err; err != nil {
		t.Error(err)
	}
	w.front.Lock()
	defer w.front.Unlock()
	for i := 1; i < len(asked); i++ {
		if asked[i-1] == "1000000" && asked[i] != "" {
			t.Errorf("after an index that went back %q was asked, want none: %q", asked[i], asked)
		}
	}
	if last := asked[len(asked)-1]; len(asked) < 4 || last == "" || last == "1000000" {
		t.Errorf("asked %q: want an index of the agent's own in the end", asked)
	}
}

func TestALeafFollowsTheActiveRootAndEveryRootIsTrusted(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("api")
	first := w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/connect/ca/configuration", map[string]any{
		"Provider": "consul", "Config": map[string]any{"LeafCertTTL": "72h", "PrivateKeyType": "ec", "PrivateKeyBits": 384},
	}, nil))
	both := w.await("there are two roots", func(s *catalog.Snapshot) error {
		if len(s.Roots) != 2 {
			return fmt.Errorf("%d", len(s.Roots))
		}
		return nil
	})
	if !both.Roots[1].Equal(first.Roots[0]) || both.Roots[0].Equal(first.Roots[0]) {
		t.Error("the active root is not the first")
	}
	if both.Leaves["api"] == nil {
		t.Error("the leaf is gone")
	}
	w.await("the leaf is of the new root", func(s *catalog.Snapshot) error {
		leaf := s.Leaves["api"].Leaf
		return leaf.CheckSignatureFrom(s.Roots[0])
	})
	for _, s := range w.all {
		if s.Generation >= first.Generation && s.Leaves["api"] == nil {
			t.Errorf("generation %d has no leaf", s.Generation)
		}
	}
}

func TestConnectionsDoNotGrowWithServices(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	const services = 200
	w := newWorld(t, lab.Config{})
	need := make([]string, services)
	for i := range need {
		need[i] = fmt.Sprintf("service-%03d", i)
		w.must(w.agent.Register(w.ctx(), lab.Service(need[i], need[i]+"-1", fmt.Sprintf("10.1.%d.2", i), 8080)))
		actions := make(map[string]string)
		for j := range 5 {
			actions[fmt.Sprintf("service-%03d", (i+j+1)%services)] = "deny"
		}
		w.must(w.agent.Intentions(w.ctx(), need[i], actions))
	}
	began := time.Now()
	w.run(need...)
	snap := w.await("all is there", func(s *catalog.Snapshot) error {
		if len(s.Leaves) != services || s.Policy.Len() != 5*services {
			return fmt.Errorf("%d leaves, %d intentions", len(s.Leaves), s.Policy.Len())
		}
		for _, name := range need {
			if svc := s.Services[name]; svc == nil || len(svc.Virtual) != 1 {
				return fmt.Errorf("%s: %+v", name, svc)
			}
		}
		return nil
	})
	t.Logf("all was there after %s", time.Since(began))
	for i := range 3 { // services that are called
		w.source.Called(need[i])
	}
	w.must(w.agent.Intentions(w.ctx(), need[199], map[string]string{"web": "deny"}))
	w.await("a change is seen", denied("web", need[199]))
	w.front.Lock()
	defer w.front.Unlock()
	t.Logf("at most %d connections, statuses %v, snapshot %d", w.front.Most, w.front.Statuses, snap.Generation)
	if w.front.Most > 16 {
		t.Errorf("%d connections at once", w.front.Most)
	}
	if n := w.front.Statuses[http.StatusTooManyRequests]; n > 0 {
		t.Errorf("%d answers were 429", n)
	}
}

func TestACalledServiceIsWatched(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run()
	w.await("api is known", func(s *catalog.Snapshot) error {
		if s.Services["api"] == nil {
			return errors.New("it is not")
		}
		return nil
	})
	w.source.Called("api")
	// Another node's instance: only the catalog tells of it, and only a watch at once.
	register := func(status string) {
		w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{
			"Node": "node-2", "Address": "192.0.2.2",
			"Service": map[string]any{"ID": "api-2-sidecar-proxy", "Service": "api-sidecar-proxy", "Kind": "connect-proxy", "Address": "10.2.2.2", "Port": 21000,
				"Proxy": map[string]any{"DestinationServiceName": "api", "DestinationServiceID": "api-2", "LocalServicePort": 8080}},
			"Check": map[string]any{"Node": "node-2", "CheckID": "c", "Name": "c", "Status": status, "ServiceID": "api-2-sidecar-proxy"},
		}, nil))
	}
	instance := func(healthy bool) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			for _, inst := range s.Services["api"].Instances {
				if inst.ID == "api-2" && inst.Healthy == healthy && inst.Mesh.String() == "10.2.2.2:21000" && !inst.Local {
					return nil
				}
			}
			return fmt.Errorf("%d instances", len(s.Services["api"].Instances))
		}
	}
	register("passing")
	w.await("the instance is there", instance(true))
	began := time.Now()
	register("critical")
	w.await("the instance is there, unhealthy", instance(false))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a check was seen after %s", took)
	}
}

func TestTheFirstCheckOfANewInstanceIsSeenWithoutACall(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.run()
	w.await("there is one", func(*catalog.Snapshot) error { return nil })
	register := func(status string) {
		w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{
			"Node": "node-2", "Address": "192.0.2.2",
			"Service": map[string]any{"ID": "api-2-sidecar-proxy", "Service": "api-sidecar-proxy", "Kind": "connect-proxy", "Address": "10.2.2.2", "Port": 21000,
				"Proxy": map[string]any{"DestinationServiceName": "api", "DestinationServiceID": "api-2"}},
			"Check": map[string]any{"Node": "node-2", "CheckID": "c", "Name": "c", "Status": status, "ServiceID": "api-2-sidecar-proxy"},
		}, nil))
	}
	w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{
		"Node": "node-2", "Address": "192.0.2.2", "Service": map[string]any{"ID": "api-2", "Service": "api", "Address": "10.2.2.2", "Port": 8080},
	}, nil))
	register("critical")
	healthy := func(want bool) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			if svc := s.Services["api"]; svc == nil || svc.Instances[0].Healthy != want {
				return errors.New("it is not")
			}
			return nil
		}
	}
	w.await("it is unhealthy", healthy(false))
	began := time.Now()
	register("passing")
	w.await("it is healthy", healthy(true))
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("it was seen after %s", took)
	}
}

func TestATokenFileIsReadAgainAndAServiceHasItsOwn(t *testing.T) {
	w := newWorld(t, lab.Config{HCL: lab.WithACLs, Token: lab.Management})
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "api", "ID": "api-1", "Port": 8080}))
	reading := `agent_prefix "" { policy = "read" } node_prefix "" { policy = "read" } service_prefix "" { policy = "read" }`
	dir := t.TempDir()
	w.config.TokenFile, w.config.TokenDir = filepath.Join(dir, "token"), filepath.Join(dir, "tokens.d")
	w.must(os.Mkdir(w.config.TokenDir, 0o700))
	w.must(os.WriteFile(w.config.TokenFile, []byte("00000000-dead-dead-dead-000000000000\n"), 0o600))
	w.run("api")
	h := w.awaitHealth("that the token is wrong", func(h catalog.Health) bool { return h.Err != nil && strings.Contains(h.Err.Error(), "403") })
	if !strings.Contains(h.Err.Error(), "docs/consul.md") {
		t.Errorf("the error does not say what to do: %v", h.Err)
	}
	token, err := w.agent.NewToken(w.ctx(), "reading", reading)
	w.must(err)
	w.must(os.WriteFile(w.config.TokenFile, []byte(token+"\n"), 0o600))
	snap := w.await("api is known", func(s *catalog.Snapshot) error {
		if s.Services["api"] == nil {
			return errors.New("it is not")
		}
		return nil
	})
	if snap.Policy.Default() != policy.Deny {
		t.Error("the default of the ACLs is deny, the policy's is not")
	}
	w.awaitHealth("that there may be no leaf", func(h catalog.Health) bool {
		return h.Err != nil && strings.Contains(h.Err.Error(), "certificate for api")
	})
	token, err = w.agent.NewToken(w.ctx(), "api", `service "api" { policy = "write" }`)
	w.must(err)
	w.must(os.WriteFile(filepath.Join(w.config.TokenDir, "api"), []byte(token), 0o600))
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

func TestAHungAgentIsNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
	stopped := time.Now()
	w.must(w.agent.Process.Signal(syscall.SIGSTOP))
	h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
	if h.Updated.After(stopped.Add(time.Second)) || !strings.Contains(h.Err.Error(), "no answer within") {
		t.Errorf("stopped at %s; health says %+v", stopped, h)
	}
	if s := w.current(); s.Leaves["api"] == nil || s.Services["api"] == nil {
		t.Errorf("something is gone: %+v", s)
	}
	w.must(w.agent.Process.Signal(syscall.SIGCONT))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil && h.Updated.After(stopped) })
}

// writePEM writes blocks into a file, by rename.
func writePEM(t *testing.T, path, kind string, der ...[]byte) {
	t.Helper()
	var text []byte
	for _, d := range der {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
	}
	if err := errors.Join(os.WriteFile(path+".new", text, 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// authority is a CA that signs one certificate for 127.0.0.1, good for either side.
type authority struct {
	root, leaf []byte
	key        []byte
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	var a authority
	var errs [3]error
	a.root, errs[0] = x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	a.leaf, errs[1] = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	a.key, errs[2] = x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a authority) write(t *testing.T, cfg *consul.Config) {
	t.Helper()
	writePEM(t, cfg.CertFile, "CERTIFICATE", a.leaf)
	writePEM(t, cfg.KeyFile, "PRIVATE KEY", a.key)
	writePEM(t, cfg.CAFile, "CERTIFICATE", a.root)
}

func (a authority) config() *tls.Config {
	root, _ := x509.ParseCertificate(a.root)
	key, _ := x509.ParsePKCS8PrivateKey(a.key)
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{a.leaf}, PrivateKey: key}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
}

func TestHTTPSWithClientCertificatesThatAreReplaced(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	var current atomic.Pointer[tls.Config]
	first, second := newAuthority(t), newAuthority(t)
	current.Store(first.config())
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return current.Load(), nil }})
	w.must(err)
	server := &http.Server{Handler: w.front, ConnState: w.front.ConnState, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	t.Cleanup(func() { server.Close(); <-done })
	dir := t.TempDir()
	w.config.Address = "https://" + ln.Addr().String()
	w.config.CAFile, w.config.CertFile, w.config.KeyFile = filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	first.write(t, &w.config)
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	current.Store(second.config())
	w.front.Drop()
	w.awaitHealth("that the certificates do not fit", func(h catalog.Health) bool { return h.Err != nil })
	second.write(t, &w.config)
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("the intention is in force", denied("web", "api"))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

// TestWhatIsRegisteredSinceTheLastLookIsNotReplaced shows an old list of registrations to the source while it is asked to
// register again, as it is while its own last change is not seen yet.
func TestWhatIsRegisteredSinceTheLastLookIsNotReplaced(t *testing.T) {
	const registrations, register, sidecar = "/v1/agent/services", "/v1/agent/service/register", "/v1/agent/service/api-1-sidecar-proxy"
	w := newWorld(t, lab.Config{})
	plain := lab.Service("api", "api-1", "10.1.2.3", 8080)
	delete(plain, "Connect")
	w.must(w.agent.Register(w.ctx(), plain))
	w.config.StateFile, w.config.Ports = filepath.Join(t.TempDir(), "ports.json"), consul.Ports{First: 21500, Last: 21999}
	var old atomic.Pointer[[]byte]
	var replaced atomic.Int32
	w.front.Misbehave(func(rw http.ResponseWriter, req *http.Request) bool {
		body := old.Load()
		switch {
		case body == nil:
			return false
		case req.URL.Path == registrations:
			_, _ = rw.Write(*body)
			return true
		case req.URL.Path == register:
			sent, err := io.ReadAll(req.Body)
			if err != nil || bytes.Contains(sent, []byte(`"api-1-sidecar-proxy"`)) {
				replaced.Add(1)
			}
			req.Body = io.NopCloser(bytes.NewReader(sent))
		}
		return false
	})
	var before, sidecars map[string]any
	w.must(w.agent.Do(w.ctx(), http.MethodGet, registrations, nil, &before))
	w.run("api")
	registered := func() error {
		return w.agent.Do(w.ctx(), http.MethodGet, sidecar, nil, &sidecars)
	}
	w.must(w.agent.Await(w.ctx(), "a sidecar", registered))
	body, err := json.Marshal(before)
	w.must(err)
	old.Store(&body)

	own := maps.Clone(plain)
	own["Connect"] = map[string]any{"SidecarService": map[string]any{"Port": 21234}}
	w.must(w.agent.Register(w.ctx(), own))
	requests := func(path string) int {
		w.front.Lock()
		defer w.front.Unlock()
		return w.front.Requests[path]
	}
	asked := requests(sidecar)
	for range 3 { // each change makes a pass over the registrations
		w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
		w.must(w.agent.Await(w.ctx(), "a look at the sidecar", func() error {
			if requests(sidecar) == asked {
				return errors.New("none")
			}
			return nil
		}))
		w.must(w.agent.Remove(w.ctx(), "service-intentions", "api"))
		asked = requests(sidecar)
	}
	if n := replaced.Load(); n != 0 {
		t.Errorf("registered %d times over the operator's", n)
	}
	w.must(registered())
	if sidecars["Port"] != 21234.0 {
		t.Errorf("the operator's sidecar was replaced: %v", sidecars)
	}
}

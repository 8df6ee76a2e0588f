package consul_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

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
	if w.front.Most > 24 {
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

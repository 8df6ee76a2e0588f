package consul_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

// A certificate must not wait until the whole mesh is put together again, which 250 that are enrolled at once would for minutes.
func TestACertificateThatComesLaterMakesNoOtherCatalog(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Register(w.ctx(), lab.Service("web", "web-1", "10.1.2.4", 8080)))
	w.front.Fail(http.StatusTooManyRequests, func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/ca/leaf/api") })
	w.run("api", "web")
	has := func(service string) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			if s.Leaves[service] == nil || s.Services[service] == nil {
				return fmt.Errorf("leaves %v, services %v", s.Leaves, s.Services)
			}
			return nil
		}
	}
	w.await("web has a certificate", has("web"))
	w.front.Fail(0, nil)
	w.await("api has one too", has("api"))
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.IndexFunc(w.all, func(s *catalog.Snapshot) bool { return s.Leaves["api"] != nil })
	if first, before := w.all[i], w.all[i-1]; !first.SameCatalog(before) || first.Leaves["web"] != before.Leaves["web"] {
		t.Errorf("snapshot %d is of another catalog than %d", first.Generation, before.Generation)
	}
}

// What this daemon registers itself tells it nothing: sidecars of 250 workloads would have the whole mesh put together for each.
func TestASidecarOfOursMakesNoOtherCatalogAndIsRegisteredAgain(t *testing.T) {
	const sidecar = "api-1-sidecar-proxy"
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "api", "ID": "api-1", "Address": "10.1.2.3", "Port": 8080}))
	w.config.StateFile, w.config.Ports = filepath.Join(t.TempDir(), "ports.json"), consul.Ports{First: 21500, Last: 21999}
	w.run("api")
	registered := func() error {
		return w.agent.Do(w.ctx(), http.MethodGet, "/v1/agent/service/"+sidecar, nil, nil)
	}
	w.must(w.agent.Await(w.ctx(), "a sidecar", registered))
	for range 5 { // something else may change meanwhile, such as its virtual IP
		before := w.current()
		w.must(w.agent.Deregister(w.ctx(), sidecar))
		w.must(w.agent.Await(w.ctx(), "a sidecar again", registered))
		if w.current().SameCatalog(before) {
			return
		}
	}
	t.Error("each time there is another catalog")
}

// Consul looks all names of a question up for a change of one: those of this node's services must not stay in two.
func TestWhatBecomesThisNodesIsLeftOutOfTheNextQuestionAboutOthers(t *testing.T) {
	w := newWorld(t, lab.Config{})
	for _, name := range []string{"api", "db"} {
		for _, service := range []map[string]any{
			{"ID": name + "-1", "Service": name, "Port": 8080},
			{"Kind": "connect-proxy", "ID": name + "-1-sidecar-proxy", "Service": name + "-sidecar-proxy", "Port": 21000, "Proxy": map[string]any{"DestinationServiceName": name}},
		} {
			w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{"Node": name + "s", "Address": "192.0.2.7", "Service": service}, nil))
		}
	}
	asked := make(chan string, 1000)
	w.front.Misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
		if strings.HasSuffix(req.URL.Path, "/intentions/match") {
			asked <- strings.Join(req.URL.Query()["name"], " ")
		}
		return false
	})
	seen := make(map[string]bool) // since the needs have changed
	await := func(want string) {
		t.Helper()
		deadline := time.After(patience)
		for !seen[want] {
			select {
			case names := <-asked:
				seen[names] = true
			case <-deadline:
				t.Fatalf("nobody asks about %q", want)
			}
		}
	}
	w.run()
	await("api db")
	clear(seen)
	w.source.Need([]string{"api"})
	await("api")
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	await("db")
	w.must(w.agent.Intentions(w.ctx(), "db", map[string]string{"web": "deny"}))
	for _, name := range []string{"api", "db"} {
		w.await("web may not call "+name, denied("web", name))
	}
	clear(seen)
	w.source.Need(nil)
	await("api db")
}

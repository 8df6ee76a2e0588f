package consul_test

import (
	"crypto/tls"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

// earlier runs a source until api is ready and returns its last snapshot.
func (w *world) earlier() *catalog.Snapshot {
	w.t.Helper()
	w.run("api")
	return w.await("api is ready", func(s *catalog.Snapshot) error {
		if s.Services["api"] == nil || s.Leaves["api"] == nil {
			return errors.New("it is not")
		}
		return nil
	})
}

// restart runs another source that begins with a snapshot of an earlier one.
func (w *world) restart(snap *catalog.Snapshot, updated time.Time) {
	w.t.Helper()
	w.stop()
	w.mu.Lock()
	w.last, w.all = nil, nil
	w.mu.Unlock()
	w.start(func(s *consul.Source) { w.must(s.Restore(snap, updated)) }, "api")
}

func TestWhatAnEarlierDaemonKnewIsInForceUntilTheAgentHasAnswered(t *testing.T) {
	for what, spoil := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"the agent is down":     func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"the agent hangs":       func(_ http.ResponseWriter, req *http.Request) bool { <-req.Context().Done(); return true },
		"the token is revoked":  status(http.StatusForbidden, ""),
		"the servers are down":  status(http.StatusInternalServerError, "/v1/agent/self"),
		"one service fails":     only(http.StatusInternalServerError, "/v1/health/connect/api"),
		"intentions are denied": only(http.StatusForbidden, "/v1/connect/intentions/match"),
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t, lab.Config{})
			w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
			old := w.earlier()
			w.front.Misbehave(spoil)
			w.front.Drop()
			since := time.Now().Add(-time.Hour)
			w.restart(old, since)
			w.await("it is what was known", func(s *catalog.Snapshot) error {
				if s != old {
					return errors.New("it is another")
				}
				return nil
			})
			if h := w.source.Health(); !h.Restored || !h.Updated.Equal(since) {
				t.Errorf("health: %+v", h)
			}
			w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
			w.front.Misbehave(nil)
			w.front.Drop()
			w.await("the agent's word is in force", denied("web", "api"))
			w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil && !h.Restored && h.Updated.After(since) })
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, s := range w.all {
				if s.Leaves["api"] == nil || s.Services["api"] == nil || len(s.Services["api"].Instances) == 0 {
					t.Errorf("snapshot %d has lost something: %+v", s.Generation, s)
				}
				if s != old && s.Generation <= old.Generation {
					t.Errorf("snapshot %d comes after %d", s.Generation, old.Generation)
				}
			}
		})
	}
}

func status(code int, but string) func(http.ResponseWriter, *http.Request) bool {
	return func(rw http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == but {
			return false
		}
		http.Error(rw, http.StatusText(code), code)
		return true
	}
}

func only(code int, path string) func(http.ResponseWriter, *http.Request) bool {
	return func(rw http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != path {
			return false
		}
		http.Error(rw, http.StatusText(code), code)
		return true
	}
}

func TestWhatAnEarlierDaemonKnewIsNotUsedWhileTheAgentAnswers(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	old := w.earlier()
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.restart(old, time.Now())
	first := w.await("there is one", func(*catalog.Snapshot) error { return nil })
	if first == old || w.source.Health().Restored || first.Generation <= old.Generation {
		t.Errorf("the first snapshot is %+v", first)
	}
	if err := denied("web", "api")(first); err != nil {
		t.Error(err)
	}
}

// TestACertificateOutlivesARestartAndFailedRenewals: the agent answers all but the question for certificates.
func TestACertificateOutlivesARestartAndFailedRenewals(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	old := w.earlier()
	w.front.Misbehave(only(http.StatusTooManyRequests, "/v1/agent/connect/ca/leaf/api"))
	w.restart(old, time.Now())
	s := w.await("it is of the agent", func(s *catalog.Snapshot) error {
		if s == old {
			return errors.New("it is the earlier one")
		}
		return nil
	})
	if got, want := s.Leaves["api"], old.Leaves["api"]; got == nil || !got.Leaf.Equal(want.Leaf) {
		t.Errorf("the certificate is %+v", got)
	}
	w.awaitHealth("the failed renewal", func(h catalog.Health) bool {
		return h.Err != nil && strings.Contains(h.Err.Error(), "get a certificate for api: 429")
	})
}

func TestASnapshotOfAnotherNodeOrDatacenterIsRefused(t *testing.T) {
	cfg := consul.Config{Address: "127.0.0.1:1", Node: "node-1", NodeAddress: netip.MustParseAddr("192.0.2.1"), Datacenter: "dc1"}
	for _, snap := range []*catalog.Snapshot{{Node: "node-2", Datacenter: "dc1"}, {Node: "node-1", Datacenter: "dc2"}} {
		s, err := consul.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		snap.Leaves = map[string]*tls.Certificate{}
		if err := s.Restore(snap, time.Now()); err == nil {
			t.Errorf("%s in %s is restored", snap.Node, snap.Datacenter)
		}
	}
}

// TestAServerThatHasJustStartedIsAskedToBeSure: it would answer with an empty catalog until it has read its log.
func TestAServerThatHasJustStartedIsAskedToBeSure(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	var unsure []string
	w.front.Misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
		if q := req.URL.Query(); !strings.HasPrefix(req.URL.Path, "/v1/agent/") && !q.Has("index") && !q.Has("consistent") {
			w.front.Lock()
			unsure = append(unsure, req.URL.Path)
			w.front.Unlock()
		}
		return false
	})
	w.earlier()
	w.front.Drop()
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
	w.front.Lock()
	defer w.front.Unlock()
	if len(unsure) > 0 {
		t.Errorf("asked without ?consistent: %q", unsure)
	}
}

package consul_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

// logged is a log that is read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestARegistrationThatSomebodyElseHasWithdrawnIsWithdrawn has the operator remove what the daemon, and then cleanup, is about to
// remove: the agent answers that it knows no such service.
func TestARegistrationThatSomebodyElseHasWithdrawnIsWithdrawn(t *testing.T) {
	const sidecar = "api-1-sidecar-proxy"
	w := newWorld(t, lab.Config{})
	var log logged
	w.config.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.config.StateFile, w.config.Ports = filepath.Join(t.TempDir(), "ports.json"), consul.Ports{First: 21500, Last: 21999}
	app := lab.Service("api", "api-1", "10.1.2.3", 8080)
	delete(app, "Connect")
	var first atomic.Int32
	w.front.Misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
		if id, is := strings.CutPrefix(req.URL.Path, "/v1/agent/service/deregister/"); is {
			if err := w.agent.Deregister(req.Context(), id); err != nil {
				t.Error(err)
			}
			first.Add(1)
		}
		return false
	})
	registered := func() error { return w.agent.Do(w.ctx(), http.MethodGet, "/v1/agent/service/"+sidecar, nil, nil) }
	gone := func() error {
		if registered() == nil {
			return errors.New("it is still there")
		}
		return nil
	}
	w.must(w.agent.Register(w.ctx(), app))
	w.run("api")
	w.must(w.agent.Await(w.ctx(), "a sidecar", registered))
	w.must(w.agent.Deregister(w.ctx(), "api-1"))
	w.must(w.agent.Await(w.ctx(), "no sidecar", gone))
	w.must(w.agent.Register(w.ctx(), app))
	w.must(w.agent.Await(w.ctx(), "a sidecar again", registered))
	w.stop()
	if strings.Contains(log.String(), "its registrations") {
		t.Errorf("that it was gone already is an error: %s", log.String())
	}
	if _, err := consul.Withdraw(w.ctx(), w.config); err != nil {
		t.Error(err)
	}
	w.must(gone())
	w.front.Lock()
	defer w.front.Unlock()
	if n := w.front.Statuses[http.StatusNotFound]; first.Load() < 3 || n < 3 { // the sidecar twice, and the daemon
		t.Errorf("%d registrations were removed first, and the agent answered 404 to %d requests", first.Load(), n)
	}
}

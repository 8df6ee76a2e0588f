package consul_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

func TestTheSidecarOfAWorkloadThatIsBeingStoppedIsCritical(t *testing.T) {
	w := newWorld(t, lab.Config{})
	plain := lab.Service("api", "api-1", "10.1.2.3", 8080)
	delete(plain, "Connect")
	w.must(w.agent.Register(w.ctx(), plain))
	w.config.StateFile, w.config.Ports = filepath.Join(t.TempDir(), "ports.json"), consul.Ports{First: 21500, Last: 21999}
	w.run("api")
	passing := func(want int) {
		t.Helper()
		w.must(w.agent.Await(w.ctx(), fmt.Sprintf("%d passing sidecars", want), func() error {
			var all []map[string]any
			err := w.agent.Do(w.ctx(), http.MethodGet, "/v1/health/connect/api?passing", nil, &all)
			if err == nil && len(all) != want {
				err = fmt.Errorf("there are %v", all)
			}
			return err
		}))
	}
	passing(1)
	w.source.Ending([]string{"api-1", "elsewhere"})
	passing(0)
	w.source.Ending(nil)
	passing(1)
	w.source.Ending([]string{"api-1"})
	passing(0)
	w.stop()
	w.mu.Lock()
	w.last = nil
	w.mu.Unlock()
	w.run("api") // the next daemon, in which it ends no more
	passing(1)
}

package consul_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	lab "nodeproxy.io/tests/consul"
)

func TestTheSidecarOfAWorkloadThatIsBeingStoppedIsCritical(t *testing.T) {
	w := newWorld(t, lab.Config{})
	for id, address := range map[string]string{"api-1": "10.1.2.3", "api-2": "10.1.2.5"} {
		plain := lab.Service("api", id, address, 8080)
		delete(plain, "Connect")
		w.must(w.agent.Register(w.ctx(), plain))
	}
	w.testEndings()
}

func TestSoIsASidecarOfTheOperators(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-2", "10.1.2.5", 8080)))
	w.must(w.agent.Register(w.ctx(), lab.Service("web", "web-1", "10.1.2.4", 8080)))
	w.testEndings()
	w.source.Ending(map[string]bool{"api-1": true})
	w.passing(1)
	w.stop()
	removed, err := consul.Withdraw(w.ctx(), w.config)
	if want := "check nodeproxy-ending:api-1-sidecar-proxy"; err != nil || !slices.Contains(removed, want) {
		t.Errorf("withdrawn is %q, want %q: %v", removed, want, err)
	}
	w.passing(2)
}

// passing waits until api has that many passing sidecars.
func (w *world) passing(want int) {
	w.t.Helper()
	w.must(w.agent.Await(w.ctx(), fmt.Sprintf("%d passing sidecars", want), func() error {
		var all []map[string]any
		err := w.agent.Do(w.ctx(), http.MethodGet, "/v1/health/connect/api?passing", nil, &all)
		if err == nil && len(all) != want {
			err = fmt.Errorf("there are %v", all)
		}
		return err
	}))
}

// testEndings has instances end and end no more, while the daemon runs and while it does not.
func (w *world) testEndings() {
	w.t.Helper()
	w.config.StateFile, w.config.Ports = filepath.Join(w.t.TempDir(), "ports.json"), consul.Ports{First: 21500, Last: 21999}
	w.run("api", "web")
	w.source.Called("api") // what nobody calls is read again when the catalog changes, which a check does not
	w.passing(2)
	called := func(want ...string) {
		w.t.Helper()
		w.await(fmt.Sprintf("%v are called", want), func(s *catalog.Snapshot) error {
			var ids []string
			for _, inst := range s.Services["api"].Instances {
				if inst.Usable() {
					ids = append(ids, inst.ID)
				}
			}
			slices.Sort(ids)
			if !slices.Equal(ids, want) {
				return fmt.Errorf("%v are", ids)
			}
			return nil
		})
	}
	called("api-1", "api-2")
	began := time.Now()
	w.source.Ending(map[string]bool{"api-1": true, "elsewhere": true})
	w.passing(1)
	called("api-2")
	if took := time.Since(began); took > 20*time.Second {
		w.t.Errorf("that was believed after %s: as a check that has not run", took)
	}
	w.source.Ending(map[string]bool{"api-1": true, "api-2": true})
	w.passing(0)
	called("api-1", "api-2") // there is no other
	w.source.Ending(map[string]bool{"api-1": false, "api-2": false})
	w.passing(2)
	w.source.Ending(map[string]bool{"api-1": true, "api-2": false})
	w.passing(1)
	w.stop()
	w.mu.Lock()
	w.last = nil
	w.mu.Unlock()
	w.run("api", "web") // the next daemon, which does not know at once that it ends no more
	called("api-2")
	w.source.Ending(map[string]bool{"api-1": false})
	w.passing(2)
}

package file

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestChecksDecideTheHealthOfLocalInstances(t *testing.T) {
	var status sync.Map
	status.Store("code", http.StatusOK)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodHead || r.Header.Get("X-Probe") != "yes" {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		code, _ := status.Load("code")
		w.WriteHeader(code.(int))
	}))
	defer server.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	d := dir(t, map[string]string{
		"nodes/node-1/a.hcl": fmt.Sprintf(`
			service { name = "http" port = 1 check { http = %q method = "HEAD" header { x-probe = ["yes"] } interval = "100ms" timeout = "5s" } }
			service { name = "tcp"  port = 2 check { tcp = %q interval = "100ms" } check { tcp = "made-up.host:1" interval = "100ms" } }
			service { name = "none" port = 3 check { tcp = %q interval = "100ms" } }
			service { name = "old" port = 4 check { tcp = %q interval = "1h" status = "passing" failures_before_critical = 3 } }
			service { name = "free" port = 5 }`, server.URL, ln.Addr(), closed.Addr(), closed.Addr()),
		"nodes/node-2/b.hcl": fmt.Sprintf(`service { name = "remote" port = 6 check { tcp = %q interval = "100ms" } }`, closed.Addr()),
	})
	cfg := testConfig(d, "node-1")
	var log bytes.Buffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	cfg.DialContext = func(ctx context.Context, id, network, address string) (net.Conn, error) {
		if address == "made-up.host:1" { // only the hook can know where that is
			if id != "tcp" {
				t.Errorf("dialled for %q", id)
			}
			address = ln.Addr().String()
		}
		var dialer net.Dialer
		return dialer.DialContext(ctx, network, address)
	}
	s := start(t, cfg)
	first := s.first()
	for name, want := range map[string]bool{"http": false, "tcp": false, "none": false, "old": true, "free": true, "remote": true} {
		if got := find(first, name, name).Healthy; got != want {
			t.Errorf("before the first check %s is healthy: %v", name, got)
		}
	}
	snap := s.until("healthy services", func(s *catalog.Snapshot) bool {
		return find(s, "http", "http").Healthy && find(s, "tcp", "tcp").Healthy
	})
	for name, want := range map[string]bool{"none": false, "old": true, "free": true, "remote": true} {
		if got := find(snap, name, name).Healthy; got != want {
			t.Errorf("%s is healthy: %v", name, got)
		}
	}
	if snap.Policy != first.Policy {
		t.Error("the policy was compiled anew although nothing but health changed")
	}
	status.Store("code", http.StatusFound)
	s.until("an unhealthy http", func(s *catalog.Snapshot) bool { return !find(s, "http", "http").Healthy })
	status.Store("code", http.StatusNoContent)
	s.until("a healthy http", func(s *catalog.Snapshot) bool { return find(s, "http", "http").Healthy })
	ln.Close()
	s.until("an unhealthy tcp", func(s *catalog.Snapshot) bool { return !find(s, "tcp", "tcp").Healthy })
	put(t, d, "nodes/node-1/a.hcl", `service { name = "tcp" port = 2 }`)
	s.until("a tcp without checks", func(s *catalog.Snapshot) bool { return find(s, "tcp", "tcp").Healthy })
}

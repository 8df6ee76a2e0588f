package consul_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	lab "nodeproxy.io/tests/consul"
)

func TestPreparedQueriesDoNotWaitForPeers(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Do(w.ctx(), http.MethodPost, "/v1/query", map[string]any{"Name": "nearest", "Service": map[string]any{"Service": "api"}}, nil))
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	web := lab.Service("web", "web-1", "10.1.2.4", 8080)
	web["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": []map[string]any{
		{"DestinationName": "nearest", "DestinationType": "prepared_query", "LocalBindPort": 9191},
		{"DestinationName": "db", "DestinationPeer": "abroad", "LocalBindPort": 9192},
	}}
	w.must(w.agent.Register(w.ctx(), web))
	w.front.Fail(http.StatusForbidden, func(req *http.Request) bool { return req.URL.Path == "/v1/peerings" }) // the token may not
	w.run("web")
	w.await("the query is executed", func(s *catalog.Snapshot) error {
		to, ok := s.Upstream([]string{"web-1"}, netip.MustParseAddrPort("127.0.0.1:9191"))
		if !ok {
			return errors.New("there is no upstream")
		}
		if target := to.Route().Preferred(); target.Service != "api" || target.Unreachable != "" {
			return fmt.Errorf("it leads to %s: %s", target, target.Unreachable)
		}
		return nil
	})
}

// TestWhatIsNotAskedForAnyMoreIsNoError has a chain lead to a datacenter that there is not, and an upstream be a query that there
// is not, and takes both away.
func TestWhatIsNotAskedForAnyMoreIsNoError(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("web", "web-1", "10.1.2.4", 8080)))
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("web")
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })

	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "Redirect": map[string]any{"Datacenter": "dc9"}}))
	caller := lab.Service("web", "web-1", "10.1.2.4", 8080)
	caller["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": []map[string]any{
		{"DestinationName": "nearest", "DestinationType": "prepared_query", "LocalBindPort": 9191},
	}}
	w.must(w.agent.Register(w.ctx(), caller))
	w.awaitHealth("both errors", func(h catalog.Health) bool {
		return h.Err != nil && strings.Contains(h.Err.Error(), "dc9") && strings.Contains(h.Err.Error(), `prepared query "nearest"`)
	})

	w.must(w.agent.Remove(w.ctx(), "service-resolver", "api"))
	w.must(w.agent.Register(w.ctx(), lab.Service("web", "web-1", "10.1.2.4", 8080)))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

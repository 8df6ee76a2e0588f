package consul_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
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

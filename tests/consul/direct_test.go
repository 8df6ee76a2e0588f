package consul

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
)

func TestWithinANodeOnlyPlainCallsGoDirect(t *testing.T) {
	m := newMesh(t)
	const v1, v2 = 8081, 8082
	web := m.place(0, "web")
	var address string // of an instance
	for id, p := range map[string]int{"v1": v1, "v2": v2} {
		api, err := m.Nodes[0].Workload(id)
		m.must(err)
		m.Daemons[0].Enroll(api, "api")
		m.serve(api, fmt.Sprintf(":%d", p))
		s := Service("api", id, api.IPv4.String(), p)
		s["Meta"] = map[string]string{"version": id}
		if p == v2 { // v1 has Consul's default, loopback
			s["Connect"] = map[string]any{"SidecarService": map[string]any{"Proxy": map[string]any{"LocalServiceAddress": api.IPv4.String()}}}
		}
		m.must(m.agents[0].Register(m.ctx(), s))
		if p == v1 {
			address = fmt.Sprintf("%s:%d", api.IPv4, p)
		}
	}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web", "api"}, nil)
	vip := m.virtual(0, "api")
	proxied := func(out string) bool { return reached(out) && strings.Contains(out, "connected local=127.0.0.1:") }
	direct := func(out string) bool { return reached(out) && !proxied(out) }
	on := func(port int) func(string) bool {
		return func(out string) bool { return proxied(out) && strings.Contains(out, fmt.Sprintf(":%d\n", port)) }
	}
	always := func(what, to string, want func(string) bool) {
		t.Helper()
		m.eventually(what, web, to, want)
		for range 5 {
			if out := m.dial(web, to, "peer"); !want(out) {
				t.Fatalf("not always: %s: %s", what, out)
			}
		}
	}
	explained := func(to string, path admin.Path, why string) {
		t.Helper()
		var e *admin.Explanation
		var err error
		for ctx := m.ctx(); ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			e, err = m.Daemons[0].Admin().Explain(ctx, "web", to)
			if err == nil && e.Path == path && strings.Contains(e.NotDirect, why) {
				return
			}
		}
		t.Errorf("the way to %s is still %+v, %v: want %s because %q", to, e, err, path, why)
	}
	always("a plain call is direct", vip, direct)
	explained("api", admin.PathDirect, "")

	resolver := func(more map[string]any) {
		t.Helper()
		entry := map[string]any{"Kind": "service-resolver", "Name": "api"}
		for k, v := range more {
			entry[k] = v
		}
		m.must(m.agents[0].Write(m.ctx(), entry))
	}
	resolver(map[string]any{"DefaultSubset": "new", "Subsets": map[string]any{"new": map[string]any{"Filter": "Service.Meta.version == v2"}}})
	always("a subset takes the proxy", vip, on(v2))
	explained("api", admin.PathMTLS, "new.api")
	always("an instance's own address is direct all the same", address, direct)

	resolver(map[string]any{"LoadBalancer": map[string]any{"Policy": "maglev", "HashPolicies": []map[string]any{{"SourceIP": true}}}})
	explained("api", admin.PathMTLS, "source_hash")
	always("a source hash takes the proxy", vip, proxied)

	resolver(map[string]any{"ConnectTimeout": "3s"})
	always("a resolver that leads to the service itself is direct", vip, direct)

	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "web",
		"UpstreamConfig": map[string]any{"Overrides": []map[string]any{{"Name": "api", "Limits": map[string]any{"MaxConnections": 20}}}}}))
	always("what is counted takes the proxy", vip, proxied)
	always("what is counted takes the proxy to an instance too", address, on(v1))
	explained("api", admin.PathMTLS, "MaxConnections")
}

package consul

import (
	"fmt"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
)

func TestWithinANodeOnlyPlainCallsGoDirect(t *testing.T) {
	m := newMesh(t)
	const v1, v2 = 8081, 8082
	web := m.place(0, "web")
	one := m.instance(0, "api", "api-1", v1, map[string]string{"version": "v1"})
	two := m.instance(0, "api", "api-2", v2, map[string]string{"version": "v2"})
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web", "api"}, nil)
	vip := m.virtual(0, "api")
	address := fmt.Sprintf("%s:%d", one.IPv4, v1)
	direct := func(out string) bool {
		return strings.Contains(out, fmt.Sprintf("local=%s\n", address)) || strings.Contains(out, fmt.Sprintf("local=%s:%d\n", two.IPv4, v2))
	}
	proxied := func(out string) bool { return at(v1)(out) || at(v2)(out) }
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
		e, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", to)
		m.must(err)
		if e.Path != path || !strings.Contains(e.NotDirect, why) {
			t.Errorf("the way to %s is %s, not direct because %q", to, e.Path, e.NotDirect)
		}
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
	always("a subset takes the proxy", vip, at(v2))
	explained("api", admin.PathMTLS, "new.api")
	always("an instance's own address is direct all the same", address, direct)

	resolver(map[string]any{"LoadBalancer": map[string]any{"Policy": "maglev", "HashPolicies": []map[string]any{{"SourceIP": true}}}})
	always("a source hash takes the proxy", vip, proxied)
	explained("api", admin.PathMTLS, "source_hash")

	resolver(map[string]any{"ConnectTimeout": "3s"})
	always("a resolver that leads to the service itself is direct", vip, direct)

	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "web",
		"UpstreamConfig": map[string]any{"Overrides": []map[string]any{{"Name": "api", "Limits": map[string]any{"MaxConnections": 20}}}}}))
	always("what is counted takes the proxy", vip, proxied)
	always("what is counted takes the proxy to an instance too", address, at(v1))
	explained("api", admin.PathMTLS, "MaxConnections")
}

package consul

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// withGateways is sample with a service "abroad" that is in dc2, and a mesh gateway in each datacenter.
func withGateways() *data {
	d := sample()
	far := endpoints{service: "api", datacenter: "dc2"}
	d.chainOf("abroad", &chain{targets: []target{{endpoints: far}}})
	d.targets[far] = &service{read: time.Now(), instances: []endpoint{{node: "far-1", id: "api-far", mesh: place{"10.9.0.2", 21000}, healthy: true}}}
	d.gateways = map[string][]string{"": {"gate"}, "dc2": {"gate"}}
	for of, at := range map[string]place{"": {"10.1.0.9", 8443}, "dc2": {"10.9.0.9", 8444}} {
		d.targets[endpoints{service: "gate", datacenter: of, gateways: true}] = &service{read: time.Now(), instances: []endpoint{
			{node: "n", id: "gate", mesh: at, healthy: true, gateway: true}, {node: "n", id: "no-gateway", mesh: place{"10.9.9.9", 1}, healthy: true},
		}}
	}
	return d
}

const (
	directly  = "api.dc2 far-1/api-far/10.9.0.2:21000"
	byLocal   = "api.dc2 n/gate/10.1.0.9:8443"
	byRemote  = "api.dc2 n/gate/10.9.0.9:8444"
	nobodyFar = "api.dc2 n/gate/10.9.0.9:8444 unhealthy"
)

func TestTheGatewaysModeIsAsConsulMergesIt(t *testing.T) {
	d := withGateways()
	sidecar := d.local["web-1-sidecar-proxy"].Proxy
	sidecar.Upstreams = []api.Upstream{{DestinationName: "api", Datacenter: "dc2", LocalBindPort: 9191}}
	d.chains[chainKey{service: "api", datacenter: "dc2"}] = d.chains[chainKey{service: "abroad"}]
	mode := func(m api.MeshGatewayMode) api.MeshGatewayConfig { return api.MeshGatewayConfig{Mode: m} }
	defaults := &api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web"}
	d.write(defaults)
	for _, step := range []struct {
		what             string
		change           func()
		abroad, upstream string
	}{
		{"nothing", func() {}, directly, directly},
		{"the target", func() { d.chains[chainKey{service: "abroad"}].targets[0].gateway = catalog.GatewayRemote }, byRemote, byRemote},
		{"proxy-defaults", func() {
			d.write(&api.ProxyConfigEntry{Kind: api.ProxyDefaults, Name: "global", MeshGateway: mode("local")})
		}, byLocal, byLocal},
		{"the caller's service-defaults", func() { defaults.MeshGateway = mode("none") }, directly, directly},
		{"the caller's UpstreamConfig.Defaults", func() {
			defaults.UpstreamConfig = &api.UpstreamConfiguration{Defaults: &api.UpstreamConfig{MeshGateway: mode("remote")}}
		}, byRemote, byRemote},
		{"the caller's registration", func() { sidecar.MeshGateway = mode("none") }, directly, directly},
		{"the caller's UpstreamConfig.Overrides", func() {
			defaults.UpstreamConfig.Overrides = []*api.UpstreamConfig{{Name: "abroad", MeshGateway: mode("local")}}
		}, byLocal, directly},
		{"the upstream itself", func() { sidecar.Upstreams[0].MeshGateway = mode("remote") }, byLocal, byRemote},
		{"nobody there", func() {
			d.targets[endpoints{service: "api", datacenter: "dc2"}].instances[0].healthy = false
			defaults.UpstreamConfig.Overrides[0].MeshGateway = mode("remote")
		}, nobodyFar, nobodyFar},
	} {
		step.change()
		s := build(t, d, "web")
		if got := describe(s.RouteOf("web", catalog.Destination{Service: s.Services["abroad"]})); got != step.abroad {
			t.Errorf("with %s the service is reached as %s, want %s", step.what, got, step.abroad)
		}
		up, _ := s.Upstream([]string{"web-1"}, netip.MustParseAddrPort("127.0.0.1:9191"))
		if got := describe(s.RouteOf("web", up)); got != step.upstream {
			t.Errorf("with %s the upstream is reached as %s, want %s", step.what, got, step.upstream)
		}
		if all := problems(s); strings.Contains(all, "MeshGateway") {
			t.Errorf("with %s: %s", step.what, all)
		}
	}
	d.gateways["dc2"] = nil
	s := build(t, d, "web")
	if r := s.RouteOf("web", catalog.Destination{Service: s.Services["abroad"]}); !strings.Contains(r.Targets[0].Unreachable, `datacenter "dc2" has none`) {
		t.Errorf("without a gateway: %+v", r.Targets[0])
	}
}

func TestOneGatewayStandsForSeveralServices(t *testing.T) {
	d := sample()
	gate := endpoint{node: "node-1", id: "egress-1", proxyID: "egress-1", mesh: place{"10.1.0.9", 8443}, healthy: true, gateway: true}
	d.register("db", gate)
	d.register("cache", gate)
	s := build(t, d)
	for _, name := range []string{"db", "cache"} {
		if got := describe(s.Services[name].Route()); got != name+" node-1/egress-1/10.1.0.9:8443" || !s.Services[name].Instances[0].Gateway {
			t.Errorf("%s is at %s", name, got)
		}
	}
	if len(refusals(s)) > 0 {
		t.Errorf("refused: %v", refusals(s))
	}
	thief := gate
	thief.node, thief.id, thief.gateway = "node-8", "thief-1", false
	d.register("thief", thief)
	s = build(t, d)
	for _, name := range []string{"db", "cache", "thief"} {
		if s.Services[name].Instances[0].Mesh.IsValid() {
			t.Errorf("%s is still at an address that another claims", name)
		}
	}
	other := gate
	other.id, other.mesh = "api-1", place{"10.2.0.2", 21000} // of an instance of api
	d = sample()
	d.register("db", other)
	if s = build(t, d); s.Services["db"].Instances[0].Mesh.IsValid() {
		t.Error("a gateway takes the address of an instance")
	}
}

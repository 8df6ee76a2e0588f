package consul

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

func problems(s *catalog.Snapshot) string {
	var text []string
	for _, p := range s.Problems {
		text = append(text, p.Text)
	}
	return strings.Join(text, "\n")
}

func TestUpstreamsOfASidecarAndOfMeta(t *testing.T) {
	d := sample()
	d.local["web-1"].Meta = map[string]string{metaUpstreams: "api:9192, api:9191,nobody:9193,bad,api:/run/meta.sock"}
	d.local["web-1-sidecar-proxy"].Proxy.Upstreams = []api.Upstream{
		{DestinationName: "web", LocalBindPort: 9191, Config: map[string]any{
			"connect_timeout_ms": 250.0, "protocol": "http", "envoy_x": true,
			"limits": map[string]any{"max_connections": 7}, "passive_health_check": map[string]any{"max_failures": 2, "interval": "3s"},
		}},
		{DestinationName: "api", LocalBindAddress: "0.0.0.0", LocalBindPort: 9194},
		{DestinationName: "api", LocalBindAddress: "240.0.0.1", LocalBindPort: 1},
		{DestinationName: "api", LocalBindSocketPath: "/run/api.sock", LocalBindSocketMode: "0660"},
		{DestinationName: "nobody", LocalBindSocketPath: "/run/api.sock"},
		{DestinationName: "api", LocalBindSocketPath: "run/api.sock"},
		{DestinationName: "api", LocalBindSocketPath: "/run/other.sock", LocalBindPort: 5},
		{DestinationName: "api", LocalBindSocketPath: "/run/third.sock", LocalBindSocketMode: "rw"},
		{DestinationName: "api", DestinationPeer: "abroad", DestinationNamespace: "prod", LocalBindPort: 2},
		{DestinationName: "api", DestinationNamespace: "prod", LocalBindPort: 3},
		{DestinationName: "api", DestinationType: "gateway", LocalBindPort: 4},
	}
	s := build(t, d, "web")
	mine := []string{"web-1"}
	for at, want := range map[string]string{
		"127.0.0.1:9191": "web", "127.0.0.1:9192": "api", "127.0.0.1:9193": "nobody", "127.0.0.1:9194": "api",
		"240.0.0.1:1": "", "127.0.0.1:2": "", "127.0.0.1:3": "", "127.0.0.1:4": "", "127.0.0.1:0": "",
	} {
		to, ok := s.Upstream(mine, netip.MustParseAddrPort(at))
		if ok != (want != "") || ok && to.Name() != want {
			t.Errorf("%s is %+v, want %q", at, to.Upstream, want)
		}
	}
	for path, mode := range map[string]uint32{"/run/api.sock": 0o660, "/run/meta.sock": 0} {
		if to, ok := s.UpstreamSocket(mine, path); !ok || to.Name() != "api" || to.Upstream.SocketMode != mode {
			t.Errorf("%s is %+v", path, to.Upstream)
		}
	}
	for _, path := range []string{"", "run/api.sock", "/run/other.sock", "/run/third.sock"} {
		if to, ok := s.UpstreamSocket(mine, path); ok {
			t.Errorf("%q is %+v", path, to.Upstream)
		}
	}
	if to, ok := s.Upstream(nil, netip.MustParseAddrPort("127.0.0.1:9191")); ok {
		t.Errorf("for a workload that serves nothing it is %+v", to)
	}
	all := problems(s)
	for _, want := range []string{
		`upstream "api" of "web-1" is at 127.0.0.1:9191, where upstream "web" of "web-1-sidecar-proxy" is already`,
		`upstream "nobody" of "web-1-sidecar-proxy" is at /run/api.sock, where`, `local_bind_socket_path "run/api.sock" is not`, `does not go with local_bind_port`, `local_bind_socket_mode "rw"`, `namespace "prod"`, `"gateway" is neither`, `"240.0.0.1" is not an address`,
		`"nobody" of "web-1" is no service`, `upstream "bad" of "web-1" is refused: it needs`, `Config envoy_x of upstream "web"`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%s is not reported:\n%s", want, all)
		}
	}
	if strings.Contains(all, "Config protocol") {
		t.Errorf("the protocol is reported:\n%s", all)
	}
	to, _ := s.Upstream(mine, netip.MustParseAddrPort("127.0.0.1:9191"))
	want := catalog.CallConfig{ConnectTimeout: 250 * time.Millisecond, MaxConnections: 7,
		Ejection: &catalog.Ejection{Failures: 2, Base: 30 * time.Second, Interval: 3 * time.Second, Percent: 10}}
	if got := s.Call("web", to); !reflect.DeepEqual(got, want) {
		t.Errorf("called with %+v, want %+v", got, want)
	}
}

func TestTheSameUpstreamInMetaThatTheSidecarInheritedIsOne(t *testing.T) {
	d := sample()
	for _, id := range []string{"web-1", "web-1-sidecar-proxy"} {
		d.local[id].Meta = map[string]string{metaUpstreams: "api:9191"}
	}
	s := build(t, d, "web")
	if n := len(s.Upstreams["web-1"]); n != 1 || len(s.Problems) != 0 {
		t.Errorf("%d upstreams, %v", n, s.Problems)
	}
}

func TestAPreparedQueryLeadsToWhatItAnswered(t *testing.T) {
	d := sample()
	d.local["web-1-sidecar-proxy"].Proxy.Upstreams = []api.Upstream{{DestinationType: "prepared_query", DestinationName: "nearest", LocalBindPort: 9191}}
	route := func() *catalog.Route {
		to, ok := build(t, d).Upstream([]string{"web-1"}, netip.MustParseAddrPort("127.0.0.1:9191"))
		if !ok {
			t.Fatal("there is no upstream")
		}
		return to.Route()
	}
	if got := describe(route()); got != "nearest unreachable" {
		t.Errorf("before it was answered it leads to %s", got)
	}
	d.queries = map[queryKey]*executed{{service: "nearest"}: {of: endpoints{service: "api"}, instances: []endpoint{{node: "node-2", id: "api-1", proxyID: "api-1-sidecar-proxy", healthy: true}}}}
	if got := describe(route()); got != "api node-2/api-1/10.2.0.2:21000" {
		t.Errorf("it leads to %s", got)
	}
}

func TestHowACallerCallsIsItsServiceDefaults(t *testing.T) {
	d := sample()
	n, zero := 4, uint32(0)
	d.write(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web", UpstreamConfig: &api.UpstreamConfiguration{
		Defaults: &api.UpstreamConfig{ConnectTimeoutMs: 700, Limits: &api.UpstreamLimits{MaxConnections: &n, MaxPendingRequests: &n}},
		Overrides: []*api.UpstreamConfig{{Name: "api", ConnectTimeoutMs: 90, EnvoyListenerJSON: "{}",
			PassiveHealthCheck: &api.PassiveHealthCheck{MaxFailures: 2, EnforcingConsecutive5xx: &zero}}},
	}})
	s := build(t, d, "web")
	to := func(name string) catalog.Destination { return catalog.Destination{Service: s.Services[name]} }
	if c := s.Call("web", to("api")); c.ConnectTimeout != 90*time.Millisecond || c.MaxConnections != 4 || c.Ejection == nil || c.Ejection.Failures != 2 {
		t.Errorf("web calls api with %+v", c)
	}
	if c := s.Call("web", to("web")); c.ConnectTimeout != 700*time.Millisecond || c.Ejection != nil {
		t.Errorf("web calls web with %+v", c)
	}
	if c := s.Call("api", to("web")); c != (catalog.CallConfig{}) {
		t.Errorf("api calls web with %+v", c)
	}
	for _, want := range []string{"MaxPendingRequests", "EnforcingConsecutive5xx", "EnvoyListenerJSON"} {
		if all := problems(s); !strings.Contains(all, want) {
			t.Errorf("%s is not reported:\n%s", want, all)
		}
	}
}

func TestATaggedAddressCountsInsideVirtualCIDRsOnly(t *testing.T) {
	d := sample()
	d.services["api"].instances[0].tagged = place{"10.96.0.5", 80}
	d.services["api"].instances[1].tagged = place{"10.97.0.5", 80} // outside
	d.services["web"].instances[0].tagged = place{"10.96.0.6", 81}
	b := builderOf(d)
	b.cfg.VirtualCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	s, err := b.build(1, time.Unix(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[string]string{"10.96.0.5:80": "api", "10.96.0.6:81": "web", "10.96.0.5:81": "", "10.97.0.5:80": ""} {
		if to, ok := s.Resolve(netip.MustParseAddrPort(at)); ok != (want != "") || ok && to.Name() != want {
			t.Errorf("%s is %+v, want %q", at, to, want)
		}
	}
	if !strings.Contains(problems(s), `"10.97.0.5" port 80`) {
		t.Errorf("the address outside is not reported:\n%s", problems(s))
	}
	d.services["web"].instances[0].tagged = place{"10.96.0.5", 80}
	d.services["api"].instances[1].mesh.host = "10.96.0.7" // an instance where services are
	b = builderOf(d)
	b.cfg.VirtualCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	if s, err = b.build(1, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if to, ok := s.Resolve(netip.MustParseAddrPort("10.96.0.5:80")); ok || len(s.Contested) != 1 {
		t.Errorf("what two services claim is %+v, contested %v", to, s.Contested)
	}
	if !strings.Contains(problems(s), `"10.96.0.7" port 21000, which is refused`) {
		t.Errorf("an instance at a service's address is not refused:\n%s", problems(s))
	}
}

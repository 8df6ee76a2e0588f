package consul

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// sample is a world of two nodes in which nothing is wrong.
func sample() *data {
	sidecar := func(name, address string, port int) *api.AgentService {
		return &api.AgentService{Kind: api.ServiceKindConnectProxy, ID: name + "-1-sidecar-proxy", Service: name + "-sidecar-proxy", Address: address, Port: port,
			Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: name, DestinationServiceID: name + "-1", LocalServicePort: 8080}}
	}
	entries := &entries{byKind: make(map[string][]api.ConfigEntry)}
	for _, kind := range entryKinds {
		entries.byKind[kind] = nil
	}
	return &data{
		agent:      &agent{node: "node-1", datacenter: "dc1", address: "192.0.2.1"},
		roots:      &roots{trustDomain: "x.consul"},
		defaultACL: "deny",
		local: map[string]*api.AgentService{
			"web-1":               {ID: "web-1", Service: "web", Address: "10.1.0.2", Port: 8080},
			"web-1-sidecar-proxy": sidecar("web", "10.1.0.2", 21000),
		},
		names: []string{"api", "web"},
		services: map[string]*service{
			"api": {instances: []endpoint{
				{node: "node-2", nodeAddress: "192.0.2.2", id: "api-1", proxyID: "api-1-sidecar-proxy", mesh: place{"10.2.0.2", 21000}, app: place{"10.2.0.2", 8080}, healthy: true, virtual: netip.MustParseAddr("240.0.0.1")},
				{node: "node-3", nodeAddress: "192.0.2.3", id: "api-1", proxyID: "api-1-sidecar-proxy", mesh: place{"", 21000}, app: place{"", 8080}, healthy: true, virtual: netip.MustParseAddr("240.0.0.1")},
			}},
			"web": {instances: []endpoint{
				{node: "node-1", nodeAddress: "192.0.2.1", id: "web-1", proxyID: "web-1-sidecar-proxy", mesh: place{"10.1.0.2", 21000}, healthy: true, virtual: netip.MustParseAddr("240.0.0.2")},
			}},
		},
		entries:    entries,
		proxies:    map[string][]Ports{"node-2": {{21000, 21000}}, "node-3": {{21000, 21009}}, "node-9": {{21000, 21000}}},
		intentions: map[string][]rule{"api": nil, "web": nil},
	}
}

func (d *data) write(entry api.ConfigEntry) {
	d.entries = d.entries.with(entry.GetKind(), append(slices.Clone(d.entries.byKind[entry.GetKind()]), entry))
}

func (d *data) intend(in ...intention) {
	for _, in := range in {
		d.intentions[in.DestinationName] = append(d.intentions[in.DestinationName], in.rule(in.DestinationName))
	}
}

func (d *data) register(name string, e endpoint) {
	if d.services[name] == nil {
		d.services[name] = &service{}
	}
	d.services[name].instances = append(d.services[name].instances, e)
	if _, read := d.intentions[name]; !read {
		d.intentions[name] = nil
	}
}

func build(t *testing.T, d *data, needed ...string) *catalog.Snapshot {
	t.Helper()
	snap, err := builderOf(d, needed...).build(1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func builderOf(d *data, needed ...string) *builder {
	return &builder{
		cfg:  &Config{Node: "n1", NodeAddress: netip.MustParseAddr("192.0.2.1"), VirtualRanges: []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4")}},
		data: d, needed: needed, settings: d.entries.settings(), services: make(map[string]*catalog.Service),
		upstreams: make(map[string][]*catalog.Upstream),
	}
}

// resolved is what an address stands for, "" for nothing.
func resolved(s *catalog.Snapshot, at string) string {
	d, ok := s.Resolve(netip.MustParseAddrPort(at))
	if !ok {
		return ""
	}
	if d.Instance != nil {
		return d.Instance.Node + "/" + d.Instance.ID
	}
	return d.Service.Name
}

func refusals(s *catalog.Snapshot) (all []string) {
	for _, p := range s.Problems {
		if p.Kind == "refused" {
			all = append(all, p.Text)
		}
	}
	return all
}

func TestAGoodCatalogHasNoProblems(t *testing.T) {
	s := build(t, sample(), "web")
	if len(s.Problems) > 0 {
		t.Errorf("problems: %v", s.Problems)
	}
	for at, want := range map[string]string{
		"240.0.0.1:1": "api", "240.0.0.2:1": "web",
		"10.2.0.2:8080": "node-2/api-1", "192.0.2.3:8080": "node-3/api-1", "10.1.0.2:8080": "node-1/web-1",
		"10.2.0.2:21000": "", "10.1.0.2:21000": "",
	} {
		if got := resolved(s, at); got != want {
			t.Errorf("%s is %q, want %q", at, got, want)
		}
	}
}

func TestTunnelsAreForInstancesThatAnotherNodeproxyServes(t *testing.T) {
	d := sample()
	d.register("api", endpoint{node: "node-4", id: "envoy", mesh: place{"10.4.0.2", 21000}, healthy: true})
	d.register("api", endpoint{node: "node-2", id: "beside", mesh: place{"10.2.0.2", 20000}, healthy: true})
	d.register("api", endpoint{node: "node-9", id: "native", mesh: place{"10.9.0.2", 21000}, native: true, healthy: true})
	s := build(t, d, "web")
	for _, svc := range s.Services {
		for _, inst := range svc.Instances {
			if want := inst.ID == "api-1"; inst.Tunnels != want {
				t.Errorf("tunnels to %s of %s: %v, want %v", inst.ID, inst.Node, inst.Tunnels, want)
			}
		}
	}
}

func TestAPoisonedCatalogStealsNothing(t *testing.T) {
	evil := endpoint{node: "node-9", nodeAddress: "192.0.2.9", id: "evil-1", proxyID: "evil-1-sidecar-proxy", mesh: place{"10.9.0.2", 21000}, app: place{"10.9.0.2", 8080}, healthy: true, virtual: netip.MustParseAddr("240.0.0.9")}
	with := func(change func(*endpoint)) endpoint {
		e := evil
		change(&e)
		return e
	}
	for what, c := range map[string]struct {
		evil endpoint
		at   string // an address that evil wants
		want string
	}{
		"the address of another's instance":      {with(func(e *endpoint) { e.app = place{"10.2.0.2", 8080} }), "10.2.0.2:8080", ""},
		"the address of this node's instance":    {with(func(e *endpoint) { e.app = place{"10.1.0.2", 8080} }), "10.1.0.2:8080", "node-1/web-1"},
		"the virtual IP of another":              {with(func(e *endpoint) { e.virtual = netip.MustParseAddr("240.0.0.1") }), "240.0.0.1:80", ""},
		"a virtual IP as its address":            {with(func(e *endpoint) { e.app = place{"240.0.0.1", 8080} }), "240.0.0.1:8080", "api"},
		"a virtual IP outside the range":         {with(func(e *endpoint) { e.virtual = netip.MustParseAddr("8.8.8.8") }), "8.8.8.8:53", ""},
		"loopback":                               {with(func(e *endpoint) { e.app = place{"127.0.0.1", 8500} }), "127.0.0.1:8500", ""},
		"a name":                                 {with(func(e *endpoint) { e.app = place{"localhost", 8500} }), "127.0.0.1:8500", ""},
		"link-local":                             {with(func(e *endpoint) { e.app = place{"169.254.169.254", 80} }), "169.254.169.254:80", ""},
		"the mesh address of another's instance": {with(func(e *endpoint) { e.mesh = place{"10.2.0.2", 21000} }), "240.0.0.9:1", "evil"},
	} {
		t.Run(what, func(t *testing.T) {
			d := sample()
			d.register("evil", c.evil)
			s := build(t, d)
			if got := resolved(s, c.at); got != c.want {
				t.Errorf("%s is %q, want %q", c.at, got, c.want)
			}
			if len(refusals(s)) == 0 || !slices.ContainsFunc(refusals(s), func(p string) bool { return strings.Contains(p, "evil") }) {
				t.Errorf("no alarm names evil: %v", s.Problems)
			}
			if inst, ok := s.InstanceByMesh(netip.MustParseAddrPort("10.2.0.2:21000")); ok && inst.Service == "evil" {
				t.Errorf("evil has the mesh address of api")
			}
		})
	}
}

func TestOneInstanceRegisteredTwiceCanStillBeCalled(t *testing.T) {
	d := sample()
	twin := d.services["api"].instances[0]
	twin.id, twin.proxyID = "api-old", "api-old-sidecar-proxy"
	d.register("api", twin)
	s := build(t, d)
	if got := resolved(s, "10.2.0.2:8080"); got != "node-2/api-1" {
		t.Errorf("10.2.0.2:8080 is %q", got)
	}
	if len(refusals(s)) == 0 {
		t.Error("no problem is reported")
	}
}

func TestIntentionsAreConsuls(t *testing.T) {
	d := sample()
	d.defaultACL = "allow"
	d.intend(
		intention{SourceName: "web", DestinationName: "api", Action: "allow"},
		intention{SourceName: "*", DestinationName: "api", Action: "deny"},
		intention{SourceName: "http", DestinationName: "api", Permissions: []json.RawMessage{[]byte("{}")}},
		intention{SourceName: "far", DestinationName: "api", SourcePeer: "elsewhere", Action: "allow"},
	)
	d.intentions["api"] = append(d.intentions["api"], (&intention{SourceName: "jwt", DestinationName: "api", Action: "allow", JWT: []byte(`{"Providers":[]}`)}).rule("api"))
	d.write(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "HTTP"})
	delete(d.intentions, "web") // not known yet
	s := build(t, d)
	for pair, want := range map[string]bool{
		"web api": true, "batch api": false, "http api": false, "jwt api": false, "far api": false, "batch web": false,
	} {
		from, to, _ := strings.Cut(pair, " ")
		if v := s.Policy.Decide(s.Identity(from), to); v.Allowed != want {
			t.Errorf("%s: %+v", pair, v)
		}
	}
	if !reflect.DeepEqual(s.Services["api"].IgnoredL7, []string{"service-intentions"}) {
		t.Errorf("ignored: %v", s.Services["api"].IgnoredL7)
	}
	for def, want := range map[string]policy.Action{"": policy.Allow, "deny": policy.Deny} {
		d.agent.defaultIntention = def
		if got := build(t, d).Policy.Default(); got != want {
			t.Errorf("with default_intention_policy %q the default is %s", def, got)
		}
	}
	d.agent.defaultIntention, d.defaultACL = "", ""
	if build(t, d).Policy.Default() != policy.Deny {
		t.Error("an agent that says nothing of its default is taken to allow")
	}
}

func TestEverythingThatIsNotHonouredIsReported(t *testing.T) {
	d := sample()
	d.write(&api.MeshConfigEntry{TLS: &api.MeshTLSConfig{Incoming: &api.MeshDirectionalTLSConfig{CipherSuites: []string{"TLS_RSA_WITH_AES_128_CBC_SHA"}}}})
	d.write(&api.ProxyConfigEntry{Kind: api.ProxyDefaults, Name: "global", Config: map[string]any{"protocol": "http", "envoy_x": 1}})
	d.write(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "tcp", MaxInboundConnections: 3, ExternalSNI: "x", RateLimits: &api.RateLimits{}})
	d.write(&api.ServiceResolverConfigEntry{Kind: api.ServiceResolver, Name: "api", ConnectTimeout: 3 * time.Second, PrioritizeByLocality: &api.ServiceResolverPrioritizeByLocality{Mode: "failover"}})
	d.write(&api.ServiceRouterConfigEntry{Kind: api.ServiceRouter, Name: "web"})
	s := build(t, d, "web", "stranger")
	var text []string
	for _, p := range s.Problems {
		text = append(text, p.Text)
	}
	all := strings.Join(text, "\n")
	for _, want := range []string{"TLS_RSA_WITH", "envoy_x", "ExternalSNI", "RateLimits", "PrioritizeByLocality", "service-router", "stranger"} {
		if !strings.Contains(all, want) {
			t.Errorf("%s is not reported:\n%s", want, all)
		}
	}
	if svc := s.Services["api"]; svc.Protocol != "tcp" || svc.MaxInbound != 3 || svc.ConnectTimeout != 3*time.Second || s.Services["web"].Protocol != "http" {
		t.Errorf("api %+v, web %+v", svc, s.Services["web"])
	}
}

func TestPermissiveNeedsTheMeshsConsent(t *testing.T) {
	d := sample()
	d.write(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web", MutualTLSMode: api.MutualTLSModePermissive})
	if build(t, d).Services["web"].Instances[0].Permissive {
		t.Error("permissive without AllowEnablingPermissiveMutualTLS")
	}
	d.write(&api.MeshConfigEntry{AllowEnablingPermissiveMutualTLS: true})
	if !build(t, d).Services["web"].Instances[0].Permissive {
		t.Error("not permissive")
	}
}

func TestNamesAreSplitByLength(t *testing.T) {
	names := make(map[string]bool)
	for i := range 20000 {
		names[fmt.Sprintf("service-%06d", i)] = true
	}
	lists := split(names)
	seen := 0
	for _, list := range lists {
		length := 0
		for _, name := range list {
			length += len("&name=" + name)
		}
		if length > maxQuery {
			t.Errorf("a query of %d bytes", length)
		}
		seen += len(list)
	}
	if seen != len(names) || len(lists) > 4 {
		t.Errorf("%d names in %d lists", seen, len(lists))
	}
}

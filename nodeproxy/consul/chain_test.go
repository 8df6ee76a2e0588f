package consul

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// chainText is an answer of /v1/discovery-chain, shortened.
const chainText = `{"Chain": {
  "ServiceName": "api", "Namespace": "default", "Partition": "default", "Datacenter": "dc1", "CustomizationHash": "5c1e8a9b", "Protocol": "tcp",
  "StartNode": "resolver:v1.api.default.default.dc1",
  "Nodes": {"resolver:v1.api.default.default.dc1": {
    "Type": "resolver", "Name": "v1.api.default.default.dc1",
    "Resolver": {
      "ConnectTimeout": "3s", "Target": "v1.api.default.default.dc1",
      "Failover": {"Targets": ["api.default.default.dc2", "old.default.default.dc3", "spare.default.default.dc1"]}
    },
    "LoadBalancer": {"Policy": "maglev", "HashPolicies": [{"SourceIP": true}, {"Field": "header", "FieldValue": "x"}]}
  }},
  "Targets": {
    "v1.api.default.default.dc1": {"ID": "v1.api.default.default.dc1", "Service": "api", "ServiceSubset": "v1", "Namespace": "default", "Partition": "default",
      "Datacenter": "dc1", "MeshGateway": {"Mode": "local"}, "Subset": {"Filter": "Service.Meta.version == v1", "OnlyPassing": true}, "ConnectTimeout": "3s"},
    "api.default.default.dc2": {"Service": "api", "Namespace": "default", "Partition": "default", "Datacenter": "dc2", "MeshGateway": {}, "Subset": {}},
    "old.default.default.dc3": {"Service": "old", "Namespace": "default", "Partition": "default", "Datacenter": "dc3", "MeshGateway": {"Mode": "remote"}, "Subset": {}},
    "spare.default.default.dc1": {"Service": "spare", "Namespace": "default", "Partition": "default", "Datacenter": "dc1", "MeshGateway": {}, "Subset": {}}
  },
  "AutoVirtualIPs": ["240.0.0.7"], "ManualVirtualIPs": ["10.96.0.9"]
}}`

func TestAChainsTargetsAreInOrder(t *testing.T) {
	c, err := parseChain(&answer{body: []byte(chainText)}, "dc1")
	if err != nil {
		t.Fatal(err)
	}
	if c.balance != catalog.SourceHash || len(c.ignored) != 1 || !strings.Contains(c.ignored[0], "header") {
		t.Errorf("balance %q, ignored %q", c.balance, c.ignored)
	}
	if !slices.Equal(c.virtual, []netip.Addr{netip.MustParseAddr("240.0.0.7")}) || !slices.Equal(c.manual, []netip.Addr{netip.MustParseAddr("10.96.0.9")}) {
		t.Errorf("virtual IPs %s and %s", c.virtual, c.manual)
	}
	want := []target{
		{endpoints: endpoints{service: "api", filter: "Service.Meta.version == v1", onlyPassing: true}, subset: "v1"},
		{endpoints: endpoints{service: "api", datacenter: "dc2"}},
		{endpoints: endpoints{service: "old", datacenter: "dc3"}, gateway: catalog.GatewayRemote},
		{endpoints: endpoints{service: "spare"}},
	}
	if len(c.targets) != len(want) {
		t.Fatalf("targets: %+v", c.targets)
	}
	for i := range want {
		if got := c.targets[i]; got != want[i] {
			t.Errorf("target %d: %+v", i, got)
		}
	}
}

func TestWhatIsNoChainIsAnError(t *testing.T) {
	for _, text := range []string{
		`{}`, `{"Chain": {"StartNode": "router:api", "Nodes": {"router:api": {"Type": "router"}}}}`,
		strings.Replace(chainText, `"spare.default.default.dc1": {"S`, `"other": {"S`, 1), `[`,
	} {
		if c, err := parseChain(&answer{body: []byte(text)}, "dc1"); err == nil {
			t.Errorf("%.60s…: %+v", text, c)
		}
	}
}

func TestEnterpriseTargetsAreUnreachable(t *testing.T) {
	for old, replaced := range map[string]string{
		`"Namespace": "default", "Partition": "default", "Datacenter": "dc1", "MeshGateway": {}`: `"Namespace": "prod", "Partition": "default", "Datacenter": "dc1", "MeshGateway": {}`,
		`"Service": "spare", "Namespace": "default", "Partition": "default"`:                     `"Service": "spare", "Namespace": "default", "Partition": "west"`,
	} {
		c, err := parseChain(&answer{body: []byte(strings.Replace(chainText, old, replaced, 1))}, "dc1")
		if err != nil {
			t.Fatal(err)
		}
		if c.targets[3].unreachable == "" {
			t.Errorf("%s can be reached", replaced)
		}
	}
}

// chainOf writes a resolver for a service, whose chain is c.
func (d *data) chainOf(name string, c *chain) {
	d.write(&api.ServiceResolverConfigEntry{Kind: api.ServiceResolver, Name: name})
	if d.chains == nil {
		d.chains, d.targets = make(map[chainKey]*chain), make(map[endpoints]*service)
	}
	if c != nil {
		d.chains[chainKey{service: name}] = c
	}
}

// describe is a route in words.
func describe(r *catalog.Route) string {
	var parts []string
	for _, t := range r.Targets {
		text := t.String()
		for _, inst := range t.Instances {
			text += fmt.Sprintf(" %s/%s/", inst.Node, inst.ID)
			if inst.Mesh.IsValid() {
				text += inst.Mesh.String()
			}
			if !inst.Healthy {
				text += " unhealthy"
			}
		}
		if t.Unreachable != "" {
			text += " unreachable"
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, "; ")
}

func TestASubsetIsTheServicesOwnInstances(t *testing.T) {
	d := sample()
	v1 := endpoints{service: "api", filter: "v1", onlyPassing: true}
	d.chainOf("api", &chain{targets: []target{{endpoints: v1, subset: "v1"}, {endpoints: endpoints{service: "web"}}}})
	d.targets[v1] = &service{read: time.Now(), instances: []endpoint{{node: "node-3", id: "api-1", proxyID: "api-1-sidecar-proxy"}}}
	s := build(t, d)
	svc := s.Services["api"]
	if got, want := describe(svc.Route()), "v1.api node-3/api-1/192.0.2.3:21000 unhealthy; web node-1/web-1/10.1.0.2:21000"; got != want {
		t.Errorf("the route is %s, want %s", got, want)
	}
	if !svc.Instances[1].Healthy {
		t.Error("what is unhealthy for a subset is so for the service")
	}
	if got := svc.Route().Preferred(); got.Service != "web" {
		t.Errorf("calls go to %s", got)
	}
}

func TestAnotherDatacentersInstancesAreUnderItsIdentity(t *testing.T) {
	d := sample()
	far := endpoints{service: "api", datacenter: "dc2"}
	d.chainOf("alias", &chain{virtual: []netip.Addr{netip.MustParseAddr("240.0.0.9")}, targets: []target{{endpoints: far}}})
	d.targets[far] = &service{read: time.Now(), instances: []endpoint{
		{node: "node-2", nodeAddress: "198.51.100.7", id: "api-1", mesh: place{"", 21000}, healthy: true},
		{node: "node-5", nodeAddress: "198.51.100.8", id: "api-2", mesh: place{"127.0.0.1", 21000}, healthy: true},
	}}
	s := build(t, d)
	to, ok := s.Resolve(netip.MustParseAddrPort("240.0.0.9:80"))
	if !ok || to.Name() != "alias" {
		t.Fatalf("the virtual IP is %+v", to)
	}
	if got, want := describe(to.Route()), "api.dc2 node-2/api-1/198.51.100.7:21000 node-5/api-2/"; got != want {
		t.Errorf("the route is %s, want %s", got, want)
	}
	if got := s.TargetIdentity(to.Route().Targets[0]).String(); !strings.HasSuffix(got, "/dc/dc2/svc/api") {
		t.Errorf("its identity is %s", got)
	}
	if _, others := destinations(d, nil); !others["api"] {
		t.Error("the intentions of the target are not asked for")
	}
}

func TestWANAddressesAreForOtherDatacentersOnly(t *testing.T) {
	const text = `[{
	  "Node": {"Node": "n", "Address": "10.0.0.1", "TaggedAddresses": {"lan": "10.0.0.1", "wan": "198.51.100.1"}},
	  "Service": {"ID": "api-1-sidecar-proxy", "Service": "api-sidecar-proxy", "Kind": "connect-proxy", "Address": "10.0.0.2", "Port": 21000,
	    "TaggedAddresses": {"wan": {"Address": "198.51.100.2", "Port": 443}}, "Proxy": {"DestinationServiceName": "api", "DestinationServiceID": "api-1"}},
	  "Checks": [{"Status": "warning"}]
	}, {
	  "Node": {"Node": "o", "Address": "10.0.0.3", "TaggedAddresses": {"wan": "198.51.100.3"}},
	  "Service": {"ID": "api-2-sidecar-proxy", "Service": "api-sidecar-proxy", "Kind": "connect-proxy", "Port": 21001, "Proxy": {"DestinationServiceName": "api"}}
	}]`
	for of, want := range map[endpoints]string{
		{service: "api"}:                                 "10.0.0.2:21000 10.0.0.1 true, :21001 10.0.0.3 true, ",
		{service: "api", datacenter: "dc2"}:              "198.51.100.2:443 198.51.100.1 true, :21001 198.51.100.3 true, ",
		{service: "api", filter: "x", onlyPassing: true}: "10.0.0.2:21000 10.0.0.1 false, :21001 10.0.0.3 true, ",
	} {
		found, err := parseEndpoints(&answer{body: []byte(text)}, of)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, e := range found {
			got += fmt.Sprintf("%s:%d %s %v, ", e.mesh.host, e.mesh.port, e.nodeAddress, e.healthy)
		}
		if got != want {
			t.Errorf("%+v: %s, want %s", of, got, want)
		}
	}
}

func TestTheIntentionsOfAServiceThatIsOnlyElsewhereDecide(t *testing.T) {
	d := sample()
	d.chainOf("alias", &chain{targets: []target{{endpoints: endpoints{service: "far", datacenter: "dc2"}}}})
	if v := build(t, d).Policy.Decide(build(t, d).Identity("web"), "far"); v.Allowed {
		t.Error("what is not known yet allows")
	}
	d.intend(intention{SourceName: "web", DestinationName: "far", Action: "allow"})
	s := build(t, d)
	if v := s.Policy.Decide(s.Identity("web"), "far"); !v.Allowed {
		t.Errorf("web to far: %+v", v)
	}
	if v := s.Policy.Decide(s.Identity("batch"), "far"); v.Allowed {
		t.Errorf("batch to far: %+v", v)
	}
}

func TestAServiceWhoseChainIsNotKnownIsCalledByNobody(t *testing.T) {
	d := sample()
	d.chainOf("api", nil)
	if got := describe(build(t, d).Services["api"].Route()); got != "api unreachable" {
		t.Errorf("calls go to %s", got)
	}
	unread := endpoints{service: "api", filter: "v2"}
	d.chains[chainKey{service: "api"}] = &chain{targets: []target{{endpoints: unread, subset: "v2"}}}
	d.targets[unread] = &service{}
	if got := describe(build(t, d).Services["api"].Route()); got != "v2.api unreachable" {
		t.Errorf("calls go to %s", got)
	}
}

func TestChainsThatAreNotWantedAreForgotten(t *testing.T) {
	d := sample()
	v1, v2 := endpoints{service: "api", filter: "v1"}, endpoints{service: "api", filter: "v2"}
	d.chainOf("api", &chain{targets: []target{{endpoints: v1}}})
	d.targets[v1], d.targets[v2] = &service{}, &service{}
	key := chainKey{service: "api"}
	if d.setChains(map[chainKey]*chain{key: {read: time.Now(), targets: []target{{endpoints: v1}}}}) {
		t.Error("a chain that is the same makes a difference")
	}
	if d.targets[v1] == nil || d.targets[v2] != nil {
		t.Errorf("targets: %v", d.targets)
	}
	if !d.setChains(map[chainKey]*chain{key: {targets: []target{{endpoints: v2}}}}) || d.targets[v1] != nil {
		t.Error("a chain that changed makes no difference, or its old target is kept")
	}
	d.entries = d.entries.with(api.ServiceResolver, nil)
	if !d.setChains(nil) || len(d.chains) != 0 {
		t.Errorf("chains: %v", d.chains)
	}
}

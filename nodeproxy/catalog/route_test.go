package catalog_test

import (
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

func snapshot(t *testing.T, services ...*catalog.Service) (*catalog.Snapshot, error) {
	t.Helper()
	p, err := policy.Compile(1, policy.Deny, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := catalog.Snapshot{TrustDomain: "x.consul", Datacenter: "dc1", Policy: p, Services: make(map[string]*catalog.Service)}
	for _, svc := range services {
		s.Services[svc.Name] = svc
	}
	return catalog.New(s)
}

func at(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

func TestATargetIsUnderOneIdentity(t *testing.T) {
	inst := &catalog.Instance{ID: "i", Service: "api", Healthy: true, Mesh: at("10.0.0.1:21000")}
	route := func(service, datacenter string) *catalog.Route {
		return &catalog.Route{Targets: []*catalog.Target{{Service: service, Datacenter: datacenter, Instances: []*catalog.Instance{inst}}}}
	}
	if _, err := snapshot(t, &catalog.Service{Name: "web", Chain: route("api", "")}); err != nil {
		t.Error(err)
	}
	for _, r := range []*catalog.Route{route("web", ""), route("api", "dc2"), {}} {
		if _, err := snapshot(t, &catalog.Service{Name: "web", Chain: r}); err == nil {
			t.Errorf("accepted: %+v", r.Targets)
		}
	}
}

func TestAnAddressOnOnePortStandsForOneService(t *testing.T) {
	s, err := snapshot(t, &catalog.Service{Name: "api", Ports: []netip.AddrPort{at("10.96.0.1:80")}})
	if err != nil {
		t.Fatal(err)
	}
	if to, ok := s.Resolve(at("[::ffff:10.96.0.1]:80")); !ok || to.Name() != "api" {
		t.Errorf("it is %+v", to)
	}
	if to, ok := s.Resolve(at("10.96.0.1:81")); ok {
		t.Errorf("another port is %+v", to)
	}
	_, err = snapshot(t, &catalog.Service{Name: "api", Ports: []netip.AddrPort{at("10.96.0.1:80")}}, &catalog.Service{Name: "web", Ports: []netip.AddrPort{at("10.96.0.1:80")}})
	if err == nil || !strings.Contains(err.Error(), "10.96.0.1:80 belongs to both") {
		t.Errorf("two services have it: %v", err)
	}
}

func TestTheUpstreamsOfTheFirstInstanceCount(t *testing.T) {
	up := func(name string) *catalog.Upstream {
		return &catalog.Upstream{At: at("127.0.0.1:9191"), Name: name, Route: catalog.Route{Targets: []*catalog.Target{{Service: name}}}}
	}
	s := &catalog.Snapshot{Upstreams: map[string][]*catalog.Upstream{"a": {up("one")}, "b": {up("two")}}}
	for _, c := range []struct {
		serves []string
		want   string
	}{{[]string{"a", "b"}, "one"}, {[]string{"b"}, "two"}, {[]string{"c"}, ""}, {nil, ""}} {
		to, ok := s.Upstream(c.serves, at("127.0.0.1:9191"))
		if ok != (c.want != "") || ok && to.Name() != c.want {
			t.Errorf("for a workload that serves %s it is %+v, want %q", c.serves, to.Upstream, c.want)
		}
	}
}

package check

import (
	"net/netip"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestTheTargetsOfAServiceAreListed(t *testing.T) {
	healthy := &catalog.Instance{ID: "i", Service: "api", Healthy: true, Mesh: netip.MustParseAddrPort("10.0.0.1:21000")}
	alias := &catalog.Service{Name: "alias", Chain: &catalog.Route{Targets: []*catalog.Target{
		{Service: "api", Datacenter: "dc2", Unreachable: "it is behind a gateway"},
		{Service: "api", Subset: "v1", Instances: []*catalog.Instance{healthy}},
		{Service: "spare"},
	}}}
	snap := &catalog.Snapshot{Services: map[string]*catalog.Service{"alias": alias}}
	results := Service(snap, "alias")
	want(t, results, Warning, "target api.dc2 is never used: it is behind a gateway")
	want(t, results, OK, "calls go to target v1.api, 1 instance(s)")
	want(t, results, OK, "target spare is not used now")
	if Worst(results) == Failed {
		t.Errorf("a service with a target in use fails: %+v", results)
	}
	healthy.Healthy = false
	want(t, Service(snap, "alias"), Failed, "no target can be connected to")
}

package consul

import (
	"slices"
	"testing"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestACheckThatHasNotRunSaysNothing(t *testing.T) {
	critical := func(id, output string) *api.HealthCheck {
		return &api.HealthCheck{CheckID: id, Status: api.HealthCritical, Output: output}
	}
	passing := &api.HealthCheck{CheckID: "tcp", Status: api.HealthPassing, Output: "connected"}
	for name, c := range map[string]struct {
		checks api.HealthChecks
		want   bool
	}{
		"passing":                       {api.HealthChecks{passing}, false},
		"none":                          {nil, false},
		"not run":                       {api.HealthChecks{passing, critical("tcp", "")}, true},
		"an alias of one not run":       {api.HealthChecks{critical("alias", `Aliased check "tcp" failing: `)}, true},
		"failed":                        {api.HealthChecks{critical("tcp", "connection refused")}, false},
		"an alias of one that failed":   {api.HealthChecks{critical("alias", `Aliased check "tcp" failing: connection refused`)}, false},
		"one not run and one failed":    {api.HealthChecks{critical("a", ""), critical("b", "connection refused")}, false},
		"the node is in maintenance":    {api.HealthChecks{critical("_node_maintenance", "")}, false},
		"the service is in maintenance": {api.HealthChecks{critical("_service_maintenance:api-1", "")}, false},
	} {
		agent := &api.HealthCheck{CheckID: "serfHealth", Status: api.HealthPassing, Output: "Agent alive and reachable"}
		if unheard(c.checks) {
			t.Errorf("%s: unheard without an agent", name)
		}
		if got := unheard(append(c.checks, agent)); got != c.want {
			t.Errorf("%s: unheard is %v", name, got)
		}
	}
}

func TestAnInstanceWithoutItsAgentIsCalledWhereThereIsNoOther(t *testing.T) {
	d := sample()
	both := d.services["api"].instances
	for i := range both {
		both[i].healthy, both[i].agentless = false, i == 0
	}
	healthy := func() (nodes []string) {
		for _, inst := range build(t, d).Services["api"].Instances {
			if inst.Healthy {
				nodes = append(nodes, inst.Node)
			}
		}
		return nodes
	}
	if got := healthy(); !slices.Equal(got, []string{"node-2"}) {
		t.Errorf("called are those on %q", got)
	}
	d.write(&api.ServiceResolverConfigEntry{Kind: api.ServiceResolver, Name: "api", Failover: map[string]api.ServiceResolverFailover{"*": {Datacenters: []string{"dc2"}}}})
	if got := healthy(); got != nil {
		t.Errorf("it should fail over, and called are those on %q", got)
	}
	d.entries.byKind[api.ServiceResolver] = nil
	both[1].healthy = true
	if got := healthy(); !slices.Equal(got, []string{"node-3"}) {
		t.Errorf("called are those on %q", got)
	}
}

func TestOnlyTheLossOfItsAgentMakesAnInstanceAgentless(t *testing.T) {
	lost := &api.HealthCheck{CheckID: "serfHealth", Status: api.HealthCritical, Output: "Agent not live or unreachable"}
	failed := &api.HealthCheck{CheckID: "tcp", Status: api.HealthCritical, Output: "connection refused"}
	passing := &api.HealthCheck{CheckID: "tcp", Status: api.HealthPassing}
	for _, c := range []struct {
		checks api.HealthChecks
		want   bool
	}{{nil, false}, {api.HealthChecks{passing}, false}, {api.HealthChecks{lost, passing}, true}, {api.HealthChecks{lost, failed}, false}, {api.HealthChecks{failed}, false}} {
		if got := agentless(c.checks); got != c.want {
			t.Errorf("%+v: agentless is %v", c.checks, got)
		}
	}
}

func TestAnInstanceThatIsUnheardIsAsHealthyAsItWas(t *testing.T) {
	was := func(healthy bool) *service {
		return &service{instances: []endpoint{{node: "node-2", id: "api-1", proxyID: "p", healthy: healthy}}}
	}
	before := func(healthy bool) *earlier {
		return &earlier{snap: &catalog.Snapshot{Services: map[string]*catalog.Service{
			"api": {Instances: []*catalog.Instance{{ID: "api-1", Node: "node-2", Healthy: healthy}}},
		}}}
	}
	for name, c := range map[string]struct {
		old     *service
		earlier *earlier
		want    bool
	}{
		"it was healthy":                        {was(true), nil, true},
		"it was not":                            {was(false), nil, false},
		"it is new":                             {&service{}, nil, false},
		"nothing was known":                     {nil, nil, false},
		"it was healthy for an earlier daemon":  {nil, before(true), true},
		"it was not for an earlier daemon":      {nil, before(false), false},
		"it has become bad since that":          {was(false), before(true), false},
		"another instance, for both of the two": {&service{instances: []endpoint{{node: "node-3", id: "api-1", proxyID: "p", healthy: true}}}, nil, false},
	} {
		r := &run{earlier: c.earlier}
		found := []endpoint{{node: "node-2", id: "api-1", proxyID: "p", unheard: true}, {node: "node-2", id: "api-2", proxyID: "q"}}
		r.keepLastWord("api", c.old, found)
		if found[0].healthy != c.want || found[1].healthy {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

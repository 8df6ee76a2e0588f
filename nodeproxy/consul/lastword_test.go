package consul

import (
	"slices"
	"testing"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestOnlyAFailedCheckIsBlamedOnTheApplication(t *testing.T) {
	critical := func(id, output string) *api.HealthCheck {
		return &api.HealthCheck{CheckID: id, Status: api.HealthCritical, Output: output}
	}
	alive := &api.HealthCheck{CheckID: "serfHealth", Status: api.HealthPassing, Output: "Agent alive and reachable"}
	lost := critical("serfHealth", "Agent not live or unreachable")
	passing := &api.HealthCheck{CheckID: "tcp", Status: api.HealthPassing, Output: "connected"}
	for name, c := range map[string]struct {
		checks             api.HealthChecks
		unheard, agentless bool
	}{
		"passing":                             {api.HealthChecks{alive, passing}, false, false},
		"none":                                {nil, false, false},
		"not run":                             {api.HealthChecks{alive, passing, critical("tcp", "")}, true, false},
		"not run, without an agent":           {api.HealthChecks{passing, critical("tcp", "")}, false, false},
		"an alias of one not run":             {api.HealthChecks{alive, critical("alias", `Aliased check "tcp" failing: `)}, true, false},
		"persisted when it passed":            {api.HealthChecks{alive, critical("tcp", "TCP connect 10.2.1.2:21000: Success")}, true, false},
		"HTTP persisted when it passed":       {api.HealthChecks{alive, critical("http", "HTTP GET http://10.2.1.2/health: 200 OK Output: fine\n")}, true, false},
		"an alias persisted when it passed":   {api.HealthChecks{alive, critical("alias", "No checks found.")}, true, false},
		"an alias of one persisted like that": {api.HealthChecks{critical("alias", `Aliased check "grpc" failing: gRPC check 10.2.1.2:8080: success`), alive}, true, false},
		"an alias loaded before its service":  {api.HealthChecks{alive, critical("alias", "Service api-1 could not be found on node node-2")}, true, false},
		"failed":                              {api.HealthChecks{alive, critical("tcp", "connection refused")}, false, false},
		"HTTP failed":                         {api.HealthChecks{alive, critical("http", "HTTP GET http://10.2.1.2/health: 503 Service Unavailable Output: 200 OK")}, false, false},
		"an alias of one that failed":         {api.HealthChecks{alive, critical("alias", `Aliased check "tcp" failing: connection refused`)}, false, false},
		"one not run and one failed":          {api.HealthChecks{alive, critical("a", ""), critical("b", "connection refused")}, false, false},
		"the node is in maintenance":          {api.HealthChecks{alive, critical("_node_maintenance", "")}, false, false},
		"the service is in maintenance":       {api.HealthChecks{alive, critical("_service_maintenance:api-1", "")}, false, false},
		"its workload is being stopped":       {api.HealthChecks{alive, passing, {CheckID: "api-1-end", Name: endingText, Status: api.HealthCritical}}, false, false},
		"it is, and its check failed":         {api.HealthChecks{alive, critical("tcp", "connection refused"), {CheckID: "api-1-end", Name: endingText, Status: api.HealthCritical}}, false, false},
		"the agent is lost":                   {api.HealthChecks{lost, passing}, false, true},
		"the agent is lost, and one failed":   {api.HealthChecks{lost, critical("tcp", "connection refused")}, false, false},
		"one failed, and the agent is lost":   {api.HealthChecks{critical("tcp", "connection refused"), lost}, false, false},
		"the agent is lost, and one not run":  {api.HealthChecks{lost, critical("tcp", "")}, true, true},
	} {
		if got, want := onlyEnds(c.checks), name == "its workload is being stopped"; got != want {
			t.Errorf("%s: it only ends: %v", name, got)
		}
		if unheard, agentless := blame(c.checks); unheard != c.unheard || agentless != c.agentless {
			t.Errorf("%s: unheard is %v, agentless %v", name, unheard, agentless)
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
	both[1].ending = true
	if got := healthy(); !slices.Equal(got, []string{"node-3"}) {
		t.Errorf("called are those on %q, and one ends that can be reached", got)
	}
	both[1].healthy, both[1].ending = true, false
	if got := healthy(); !slices.Equal(got, []string{"node-3"}) {
		t.Errorf("called are those on %q", got)
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

func TestAnInstanceWhoseAgentIsLostWhileItRestartsStaysAgentless(t *testing.T) {
	unhealthy := endpoint{node: "node-2", id: "api-1", proxyID: "p"}
	healthy, both := unhealthy, unhealthy
	healthy.healthy = true
	both.unheard, both.agentless = true, true
	for name, c := range map[string]struct {
		was  endpoint
		want bool
	}{"it was healthy": {healthy, true}, "it was not": {unhealthy, false}} {
		lost, back := []endpoint{both}, []endpoint{both}
		back[0].agentless = false
		r := &run{}
		r.keepLastWord("api", &service{instances: []endpoint{c.was}}, lost)
		r.keepLastWord("api", &service{instances: lost}, back)
		if lost[0].healthy || lost[0].agentless != c.want || back[0].healthy != c.want {
			t.Errorf("%s: without its agent it is %+v, with it %+v", name, lost[0], back[0])
		}
	}
}

func TestWithoutAnAgentAnInstanceOfThisNodeThatEndsIsCalledIfThereIsNoOther(t *testing.T) {
	d := sample()
	deleted := catalog.Definition{ID: "web-1", Service: "web", Checks: []catalog.CheckResult{{Name: "Kubernetes readiness", Output: "pod web is being deleted"}}}
	d.defined = &catalog.Definitions{All: []catalog.Definition{deleted}}
	for _, ends := range []bool{false, true} {
		d.served = map[string]bool{"web-1": ends}
		if all := build(t, d).Services["web"].Instances; len(all) != 1 || all[0].Healthy != ends {
			t.Errorf("it ends: %v, and there are %+v", ends, *all[0])
		}
	}
}

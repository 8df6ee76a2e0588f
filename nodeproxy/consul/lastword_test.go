package consul

import (
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
		if got := unheard(c.checks); got != c.want {
			t.Errorf("%s: unheard is %v", name, got)
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
		r := &run{Source: &Source{earlier: c.earlier}}
		found := []endpoint{{node: "node-2", id: "api-1", proxyID: "p", unheard: true}, {node: "node-2", id: "api-2", proxyID: "q"}}
		r.keepLastWord("api", c.old, found)
		if found[0].healthy != c.want || found[1].healthy {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

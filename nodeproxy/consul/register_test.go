package consul

import (
	"testing"

	"github.com/hashicorp/consul/api"
)

// TestASidecarThatTheOperatorRegistersMeanwhileIsNotReplaced registers what was decided before the operator's came. A client,
// which there is none, would be asked to.
func TestASidecarThatTheOperatorRegistersMeanwhileIsNotReplaced(t *testing.T) {
	self := &api.AgentServiceRegistration{ID: proxyService, Name: proxyService}
	app := &api.AgentService{ID: "api-1", Service: "api", Port: 8080}
	reg := sidecar(app, 21500)
	operators := &api.AgentService{ID: reg.ID, Service: reg.Name, Kind: api.ServiceKindConnectProxy, Port: 21234, Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "api"}}
	r := &run{Source: &Source{world: &world{data: data{local: map[string]*api.AgentService{
		app.ID: app, operators.ID: operators, proxyService: {ID: proxyService, Service: proxyService},
	}}}}}
	w := &wanted{self: self, sidecars: map[string]wantedSidecar{reg.ID: {app, 21500}}, needed: []string{"api"}}
	if err := r.register(t.Context(), w, false, func(string) bool { return true }); err != nil {
		t.Error(err)
	}
}

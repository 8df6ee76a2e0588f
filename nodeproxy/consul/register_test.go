package consul

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
)

// TestASidecarThatTheOperatorRegistersMeanwhileIsNotReplaced registers what was decided before the operator's came. A client,
// which there is none, would be asked to.
func TestASidecarThatTheOperatorRegistersMeanwhileIsNotReplaced(t *testing.T) {
	self := &api.AgentServiceRegistration{ID: proxyService, Name: proxyService}
	app := &api.AgentService{ID: "api-1", Service: "api", Port: 8080}
	reg := sidecar(app, 21500, false)
	operators := &api.AgentService{ID: reg.ID, Service: reg.Name, Kind: api.ServiceKindConnectProxy, Port: 21234, Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "api"}}
	r := &run{Source: &Source{world: &world{data: data{local: map[string]*api.AgentService{
		app.ID: app, operators.ID: operators, proxyService: {ID: proxyService, Service: proxyService},
	}}}}}
	w := &wanted{self: self, sidecars: map[string]wantedSidecar{reg.ID: {app, 21500, false}}, needed: []string{"api"}}
	if err := r.register(t.Context(), w, false, func(string) bool { return true }); err != nil {
		t.Error(err)
	}
}

// TestTheIDOfASidecarThatSomethingElseHasIsNamed has an instance without a sidecar, and what would be that one's ID with another
// service, or with a sidecar of another.
func TestTheIDOfASidecarThatSomethingElseHasIsNamed(t *testing.T) {
	of := func(name string) *api.AgentServiceConnectProxyConfig {
		return &api.AgentServiceConnectProxyConfig{DestinationServiceName: name, DestinationServiceID: name + "-1", LocalServicePort: 8080}
	}
	for what, other := range map[string]*api.AgentService{
		"a service":            {Service: "billing", Port: 9000},
		"a sidecar of another": {Service: "web-proxy", Kind: api.ServiceKindConnectProxy, Port: 21234, Proxy: of("web")},
	} {
		d := sample()
		app := &api.AgentService{ID: "api-1", Service: "api", Address: "10.1.0.3", Port: 8080}
		other.ID = app.ID + sidecarSuffix
		d.local[app.ID], d.local[other.ID] = app, other
		if what == "a service" {
			delete(d.local, "web-1-sidecar-proxy")
		}
		given := map[string]uint16{app.ID: 21500}
		b := builderOf(d, "api")
		b.given = given
		snap, err := b.build(1, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("%q, as it would be called, is the ID of an instance of %q", other.ID, other.Service)
		if !strings.Contains(problems(snap), want) {
			t.Errorf("%s: the problems are %s, want %s", what, problems(snap), want)
		}
		for _, inst := range snap.LocalInstances() {
			if inst.ID == app.ID && (inst.Mesh.IsValid() || !inst.Address.IsValid()) {
				t.Errorf("%s: the instance is at %s, %s", what, inst.Address, inst.Mesh)
			}
		}
		snap.Leaves = map[string]*tls.Certificate{"api": {}}
		if w := wantedOf(b.cfg, d, snap, []string{"api"}, given); len(w.sidecars) != 0 {
			t.Errorf("%s: wanted are %+v", what, w.sidecars)
		}
		other.Meta = map[string]string{managedBy: ours}
		if w := wantedOf(b.cfg, d, snap, []string{"api"}, given); len(w.sidecars) != 1 {
			t.Errorf("%s: once that is ours, wanted are %+v", what, w.sidecars)
		}
	}
}

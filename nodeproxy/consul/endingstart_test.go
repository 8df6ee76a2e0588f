package consul

import (
	"testing"

	"github.com/hashicorp/consul/api"
)

func TestUntilItIsKnownWhoIsServedWhatEndedStillEnds(t *testing.T) {
	const app, side = "api-1", "api-1-sidecar-proxy"
	ours := &api.AgentService{Meta: map[string]string{managedBy: ours, endingMeta: "true"}}
	inCatalog := &catalogNode{checks: map[string]*api.HealthCheck{
		"api-1-sidecar-proxy-app": {ServiceID: side, Output: endingText}, "web-1-sidecar-proxy-app": {ServiceID: "web-1-sidecar-proxy"},
	}}
	for name, d := range map[string]data{
		"a sidecar of ours":       {local: map[string]*api.AgentService{side: ours}},
		"one of the operator's":   {local: map[string]*api.AgentService{side: {}}, marked: map[string]string{endingCheck + side: side}},
		"a node without an agent": {marked: inCatalog.ending()},
	} {
		ends := func(app, side string, want bool) {
			t.Helper()
			if got := d.ends(app, side); got != want {
				t.Errorf("%s: served %v, settled %v: %s ends: %v", name, d.served, d.settled, app, got)
			}
		}
		ends(app, side, true)
		ends("web-1", "web-1-sidecar-proxy", false)
		if !d.wereEnding() {
			t.Errorf("%s: nobody waits to know who is served", name)
		}
		d.served = map[string]bool{"web-1": true}
		ends(app, side, true)
		ends("web-1", "web-1-sidecar-proxy", true)
		d.served = map[string]bool{app: false}
		ends(app, side, false)
		d.served, d.settled = nil, true
		ends(app, side, false)
	}
}

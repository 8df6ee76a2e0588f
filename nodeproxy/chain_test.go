package nodeproxy

import (
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// alias adds a service whose calls go to targets, and returns an outbound listener for it.
func (m *mesh) alias(targets ...*catalog.Target) string {
	ip := netip.MustParseAddr("240.0.0.9")
	m.next.Services["alias"] = &catalog.Service{Name: "alias", Virtual: []netip.Addr{ip}, Chain: &catalog.Route{Targets: targets}}
	return m.origin(netip.AddrPortFrom(ip, 80))
}

func TestCallsGoToTheFirstTargetThatAnswers(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	dead := m.remote("dead", m.silent())
	api := m.instance("web", "web-1", a.addr())
	at := m.alias(
		&catalog.Target{Service: "api", Unreachable: "it is behind a gateway"},
		&catalog.Target{Service: "api", Instances: []*catalog.Instance{dead}},
		&catalog.Target{Service: "web", Instances: []*catalog.Instance{api}},
	)
	m.def = policy.Deny
	m.rules = []policy.Intention{{Source: "web", Destination: "web", Action: policy.Allow}, {Source: "web", Destination: "api", Action: policy.Allow}}
	m.publish()
	client := m.dial(at)
	say(t, client, "x")
	hear(t, a.accept(), "x")
	open := m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))
	if open.Destination.Service != "alias" || open.Destination.Target != "web" || open.Destination.Identity != spiffe("web") {
		t.Errorf("told of as %+v", open.Destination)
	}
	x, err := m.proxy.Explain("web", "alias")
	if err != nil {
		t.Fatal(err)
	}
	if len(x.Targets) != 3 || x.Targets[0].Why == "" || !x.Targets[1].InUse || x.Targets[1].Instances[0].Ejected == "" {
		t.Errorf("explained as %+v", x)
	}
	m.rules = m.rules[1:] // what the connection stands on now is the intention of the target it reached
	m.publish()
	wantReset(t, client)
}

func TestTheIntentionsOfWhatWasDialledDoNotCount(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	api := m.instance("api", "api-1", a.addr())
	at := m.alias(&catalog.Target{Service: "api", Instances: []*catalog.Instance{api}})
	m.def = policy.Deny
	m.rules = []policy.Intention{{Source: "web", Destination: "alias", Action: policy.Allow}}
	m.publish()
	m.wantRefused(at)
	m.rules = []policy.Intention{{Source: "web", Destination: "api", Action: policy.Allow}}
	m.publish()
	say(t, m.dial(at), "x")
	hear(t, a.accept(), "x")
}

func TestWithoutATargetTheRefusalSaysWhyOfEach(t *testing.T) {
	m := newMesh(t)
	at := m.alias(&catalog.Target{Service: "api", Datacenter: "dc2", Unreachable: "it is behind a gateway"}, &catalog.Target{Service: "web", Subset: "v2"})
	m.publish()
	m.wantRefused(at)
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Outbound))
	if e.Reason != catalog.ReasonNoInstance || !strings.Contains(e.Detail, "behind a gateway") || !strings.Contains(e.Detail, "v2.web") {
		t.Errorf("refused with %s: %s", e.Reason, e.Detail)
	}
}

func TestAnUpstreamIsOnlyThatOfTheInstancesTheWorkloadServes(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	api := m.instance("api", "api-1", a.addr())
	to := netip.MustParseAddrPort("127.0.0.1:9191")
	m.instance("web", "web-1", a.addr())
	m.next.Upstreams = map[string][]*catalog.Upstream{"web-1": {
		{At: to, Name: "api", Route: catalog.Route{Targets: []*catalog.Target{{Service: "api", Instances: []*catalog.Instance{api}}}}, Config: catalog.CallConfig{MaxConnections: 1}},
	}}
	m.publish()
	stranger, own := m.origin(to), m.origin(to)
	m.kernel.mu.Lock()
	m.kernel.origins[m.cookie].Instances = []string{"web-1"}
	m.kernel.mu.Unlock()
	m.wantRefused(stranger)
	client := m.dial(own)
	say(t, client, "x")
	server := a.accept()
	hear(t, server, "x")
	m.wantRefused(own)
	denied := m.events.waitN(t, "denied", 2, is(admin.EventDenied, admin.Outbound))
	if denied[0].Reason != catalog.ReasonUnknownService || denied[1].Reason != catalog.ReasonCapacity || !strings.Contains(denied[1].Detail, "MaxConnections") {
		t.Errorf("refused with %s and %s: %s", denied[0].Reason, denied[1].Reason, denied[1].Detail)
	}
	client.Close()
	server.Close()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	say(t, m.dial(own), "x")
	hear(t, a.accept(), "x")
}

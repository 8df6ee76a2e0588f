package nodeproxy

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

func TestStatus(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Version, c.MapABI = "1.2.3", 1 })
	if s := m.proxy.Status(); s.Source.Generation != 0 || s.Source.Error != "broken.hcl:3: no such key" || s.Services == nil || s.Certificates == nil {
		t.Errorf("before the first snapshot: %+v", s)
	}
	m.next.Problems = []catalog.Problem{{Service: "api", Kind: "l7-ignored", Text: "a splitter"}}
	m.rule(policy.Allow)
	m.proxy.Need([]string{"web", "worker"})
	client, server := m.pair()
	say(t, client, "12345")
	hear(t, server, "12345")
	m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))

	s := m.proxy.Status()
	if s.Version != "1.2.3" || s.MapABI != 1 || s.Node != "node-1" || s.Source.Kind != "file" || s.Source.Generation != 1 {
		t.Errorf("%+v", s)
	}
	if s.Policy != (admin.PolicyStatus{Generation: 1, Default: "allow", Intentions: 1}) {
		t.Errorf("policy %+v", s.Policy)
	}
	if s.Connections != (admin.Connections{Active: 2, Max: 1000, Opened: 2}) {
		t.Errorf("connections %+v", s.Connections)
	}
	if len(s.Services) != 2 || s.Services[0].Name != "api" || s.Services[0].Virtual[0] != "240.0.0.1" || s.Services[0].Instances[0].ID != "api-1" {
		t.Errorf("services %+v", s.Services)
	}
	if len(s.Workloads) != 1 || s.Workloads[0].Service != "web" || s.Workloads[0].Mode != "strict" || s.Workloads[0].Namespaces[0] != 42 {
		t.Errorf("workloads %+v", s.Workloads)
	}
	if len(s.Problems) != 1 || s.Problems[0].Kind != "l7-ignored" || s.Kernel.Pins != "/pins" || s.Kernel.Links != 3 {
		t.Errorf("problems %+v, kernel %+v", s.Problems, s.Kernel)
	}
	if len(s.Certificates) != 3 || s.Certificates[0].Service != "api" || s.Certificates[0].Error != "" || s.Certificates[0].NotAfter.IsZero() ||
		s.Certificates[2].Service != "worker" || s.Certificates[2].Error == "" || s.Certificates[2].Identity != spiffe("worker") {
		t.Errorf("certificates %+v", s.Certificates)
	}
	eventually(t, "the bytes are counted", func() bool { live := m.proxy.Connections(); return live[0].Sent == 5 && live[1].Sent == 5 })
	live := m.proxy.Connections()
	if len(live) != 2 || live[0].Event != admin.EventOpen || live[0].Path != admin.PathMTLS || live[0].ID >= live[1].ID {
		t.Errorf("live %+v", live)
	}
}

func TestAnInstanceWithoutAddressHasNoneInStatus(t *testing.T) {
	m := newMesh(t)
	m.add(&catalog.Instance{ID: "api-9", Service: "api", Node: "node-2", Healthy: true})
	m.add(&catalog.Instance{ID: "api-8", Service: "api", Node: "node-2", Healthy: true, Address: netip.MustParseAddrPort("10.0.0.9:80")})
	m.rule(policy.Allow)
	m.publish()
	instances := m.proxy.Status().Services[0].Instances
	if len(instances) != 2 {
		t.Fatalf("instances %+v", instances)
	}
	for _, inst := range instances {
		text, err := json.Marshal(inst)
		if has := strings.Contains(string(text), "address"); err != nil || has == (inst.ID == "api-9") || strings.Contains(string(text), "invalid") {
			t.Errorf("%s is written as %s: %v", inst.ID, text, err)
		}
	}
}

func TestNeedReachesTheSource(t *testing.T) {
	m := newMesh(t)
	m.proxy.Need([]string{"web"})
	m.source.mu.Lock()
	defer m.source.mu.Unlock()
	if len(m.source.needed) != 1 || m.source.needed[0] != "web" {
		t.Errorf("the source was told %v", m.source.needed)
	}
}

func TestExplain(t *testing.T) {
	m := newMesh(t)
	if _, err := m.proxy.Explain("web", "api"); catalog.ReasonOf(err, "") != catalog.ReasonNotReady {
		t.Errorf("before the first snapshot: %v", err)
	}
	m.rule(policy.Allow)
	inst := m.remote("api-1", m.silent())
	m.next.Services["api"].IgnoredL7 = []string{"service-router api"}
	m.publish()

	e, err := m.proxy.Explain("web", "api")
	if err != nil || !e.Allowed || e.Intention != "web => api (allow), intentions.hcl:1" || len(e.Considered) != 1 || e.Path != admin.PathMTLS || len(e.Missing) != 0 || len(e.Ignored) != 1 {
		t.Errorf("%+v, %v", e, err)
	}
	for _, at := range []string{"240.0.0.1", "240.0.0.1:9", inst.Address.String()} {
		if e, err := m.proxy.Explain("web", at); err != nil || e.Destination != "api" {
			t.Errorf("%s: %+v, %v", at, e, err)
		}
	}
	for _, unknown := range []string{"nosuch", "10.9.9.9:80", netip.AddrPortFrom(inst.Address.Addr(), 1).String()} {
		if _, err := m.proxy.Explain("web", unknown); !errors.Is(err, admin.ErrNotFound) || !strings.Contains(err.Error(), unknown) {
			t.Errorf("%s: %v", unknown, err)
		}
	}
	m.rule(policy.Deny)
	m.publish()
	if e, _ := m.proxy.Explain("web", "api"); e.Allowed || e.Path != admin.PathNone || !strings.Contains(e.Why, "deny") {
		t.Errorf("%+v", e)
	}
	if e, _ := m.proxy.Explain("batch", "web"); len(e.Missing) != 2 || !strings.Contains(e.Missing[0], `no workload of "batch"`) || !strings.Contains(e.Missing[1], `"web" has no instance`) {
		t.Errorf("%+v", e)
	}
}

func TestVerdictsOfTheKernelAreTold(t *testing.T) {
	m := newMesh(t)
	m.publish()
	w := &workload.Workload{ID: 7, Service: "web", Cgroup: "/cg/web"}
	m.proxy.Verdict(workload.KernelVerdict{
		Reason: catalog.ReasonBoundDevice, Workload: w, PID: 5, Comm: "ping",
		Source: netip.MustParseAddrPort("10.0.0.7:0"), Destination: apiVIP(),
	})
	m.proxy.Verdict(workload.KernelVerdict{Inbound: true, Reason: catalog.ReasonPlaintext, Workload: w, Destination: netip.MustParseAddrPort("10.0.0.7:80")})
	m.proxy.Verdict(workload.KernelVerdict{Inbound: true, Allowed: true, Reason: catalog.ReasonPlaintext})
	events, _ := m.events.all()
	out, in, let := events[0], events[1], events[2]
	if out.Event != admin.EventDenied || out.Source.Service != "web" || out.Source.PID != 5 || out.Destination.Service != "api" || out.Path != admin.PathNone || out.Detail == "" {
		t.Errorf("%+v", out)
	}
	if out.Source.Address != "" {
		t.Errorf("the source address %q of a socket that has none yet", out.Source.Address)
	}
	if in.Event != admin.EventDenied || in.Direction != admin.Inbound || in.Destination.Service != "web" || in.Path != admin.PathPlaintext || in.Reason != catalog.ReasonPlaintext {
		t.Errorf("%+v", in)
	}
	if let.Event != admin.EventOpen || let.Verdict != admin.Allowed || let.Path != admin.PathPlaintext {
		t.Errorf("%+v", let)
	}
	if n := m.proxy.Status().Connections.Denied; n != 2 {
		t.Errorf("%d denied", n)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, cfg := range map[string]Config{
		"empty":     {},
		"no limits": {Node: "n", Source: &fakeSource{}, Kernel: &fakeKernel{}, Observer: &recorder{}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

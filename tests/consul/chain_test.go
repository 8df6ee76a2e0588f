package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// serve makes w serve the test application.
func (m *mesh) serve(w *netlab.Workload, addresses ...string) {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"serve"}, addresses...)})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
}

// instance is place for one of several instances of a service, at a port by which its answers can be told from others':
// it has a check that mark sets, and meta.
func (m *mesh) instance(node int, service, id string, port int, meta map[string]string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].Workload(id)
	m.must(err)
	m.Daemons[node].Enroll(w, service)
	m.serve(w, fmt.Sprintf(":%d", port))
	s := Service(service, id, w.IPv4.String(), port)
	s["Meta"] = meta
	s["Check"] = map[string]any{"CheckID": id, "Name": "set by the test", "TTL": "1h", "Status": "passing"}
	m.must(m.agents[node].Register(m.ctx(), s))
	return w
}

// mark sets the check of an instance: pass or fail.
func (m *mesh) mark(node int, id, how string) {
	m.t.Helper()
	m.must(m.agents[node].Do(m.ctx(), http.MethodPut, "/v1/agent/check/"+how+"/"+id+"?note=set+by+the+test", nil, nil))
}

// at says whether an answer came from the instance at a port.
func at(port int) func(string) bool {
	answer := regexp.MustCompile(fmt.Sprintf(`(?m)^accept=.* local=\S+:%d$`, port))
	return answer.MatchString
}

// virtual is the virtual IP of what may have no instances.
func (m *mesh) virtual(node int, service string) string {
	m.t.Helper()
	ip, err := m.Daemons[node].Virtual(m.ctx(), service)
	m.must(err)
	return netip.AddrPortFrom(ip, 80).String()
}

// targets waits until the chain of a service is as check wants it.
func (m *mesh) targets(node int, service string, check func([]admin.Target) error) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		for _, svc := range s.Services {
			if svc.Name == service {
				return check(svc.Targets)
			}
		}
		return fmt.Errorf("there is no service %s", service)
	})
	m.must(err)
}

// uses waits until a service's calls go to a target.
func (m *mesh) uses(node int, service, target string) {
	m.t.Helper()
	m.targets(node, service, func(targets []admin.Target) error {
		for _, t := range targets {
			if t.InUse && t.Name == target {
				return nil
			}
		}
		return fmt.Errorf("the targets of %s are %+v", service, targets)
	})
}

func TestCallsFollowTheDiscoveryChain(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	const v1, v2, spare = 8081, 8082, 8083
	m.instance(1, "api", "api-1", v1, map[string]string{"version": "v1"})
	m.instance(1, "api", "api-2", v2, map[string]string{"version": "v2"})
	m.instance(1, "spare", "spare-1", spare, nil)
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "spare", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api",
		"Subsets": map[string]any{"old": map[string]any{"Filter": "Service.Meta.version == v1"}, "new": map[string]any{"Filter": "Service.Meta.version == v2"}}}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "alias",
		"Redirect": map[string]any{"Service": "api", "ServiceSubset": "new"}}))
	m.start([]string{"web", "batch"}, []string{"api", "spare"})

	alias := m.virtual(0, "alias")
	m.uses(0, "alias", "new.api")
	m.eventually("web is redirected to the subset", web, alias, at(v2))
	for range 10 {
		if out := m.dial(web, alias, "peer"); !at(v2)(out) {
			t.Fatalf("not the subset: %s", out)
		}
	}
	if out := m.dial(batch, alias, "peer"); reached(out) {
		t.Errorf("batch may not call api, and does by another name: %s", out)
	}

	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "DefaultSubset": "old",
		"Subsets":  map[string]any{"old": map[string]any{"Filter": "Service.Meta.version == v1"}, "new": map[string]any{"Filter": "Service.Meta.version == v2"}},
		"Failover": map[string]any{"*": map[string]any{"Targets": []map[string]any{{"ServiceSubset": "new"}, {"Service": "spare"}}}}}))
	vip := m.virtual(0, "api")
	m.uses(0, "api", "old.api")
	m.eventually("web reaches the default subset", web, vip, at(v1))
	m.mark(1, "api-1", "fail")
	m.uses(0, "api", "new.api")
	m.eventually("web reaches the next subset", web, vip, at(v2))
	m.mark(1, "api-2", "fail")
	m.uses(0, "api", "spare")
	m.eventually("web reaches the other service", web, vip, at(spare))
	if out := m.dial(batch, vip, "peer"); reached(out) {
		t.Errorf("batch may not call spare, and does after failover: %s", out)
	}
	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "api")
	m.must(err)
	if len(explained.Targets) != 3 || explained.Targets[2].Name != "spare" || !explained.Targets[2].InUse || !explained.Allowed {
		t.Errorf("explained: %+v", explained)
	}
	m.must(m.agents[0].Intentions(m.ctx(), "spare", map[string]string{"web": "deny"}))
	m.eventually("the intentions of the target in use count", web, vip, func(out string) bool { return !reached(out) })
	m.mark(1, "api-1", "pass")
	m.uses(0, "api", "old.api")
	m.eventually("web is back at the default subset", web, vip, at(v1))

	m.must(m.agents[0].Remove(m.ctx(), "service-resolver", "alias"))
	m.eventually("a virtual IP that was given back is refused", web, alias, func(out string) bool { return !reached(out) })
}

func TestConnectTimeoutOfAnInstanceThatSwallowsSYNs(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api := m.place(1, "api")
	silent := api.IPv4.Next() // nobody has it
	m.must(m.agents[1].Register(m.ctx(), Service("api", "api-silent", silent.String(), port)))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "ConnectTimeout": "200ms"}))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"api"})
	vip := m.vip(0, "api")
	m.must(m.Daemons[0].AwaitInstances(m.ctx(), "api", 2))
	ejected := ""
	for i := 0; ejected == "" && i < 40; i++ {
		if out := m.dial(web, vip, "peer"); !at(port)(out) {
			t.Fatalf("dial %d: %s", i, out)
		}
		status, err := m.Daemons[0].Admin().Status(m.ctx())
		m.must(err)
		for _, svc := range status.Services {
			for _, inst := range svc.Instances {
				if inst.ID == "api-silent" && inst.Ejected != "" {
					ejected = inst.Ejected
				}
			}
		}
	}
	if !strings.Contains(ejected, "timeout") { // the kernel itself says "no route to host" after three seconds
		t.Errorf("the silent instance is ejected for %q", ejected)
	}
}

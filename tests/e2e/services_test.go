package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const adminPort = port + 1010

// TestAWorkloadServesSeveralServicesByPort has one workload in node 1's own namespace that is web and also web-admin. user may call
// web, ops may call web-admin, on the same node and from the other; far is where both are not.
func TestAWorkloadServesSeveralServicesByPort(t *testing.T) {
	t.Parallel()
	for path, same := range map[admin.Path]string{admin.PathDirect: "direct", admin.PathMTLS: "mtls"} {
		t.Run(string(path), func(t *testing.T) { severalServices(t, path, fmt.Sprintf("same_node = %q\n", same)) })
	}
}

func severalServices(t *testing.T, path admin.Path, config string) {
	m := newMesh(t)
	web, err := m.Nodes[0].HostWorkload("web")
	m.must(err)
	m.Daemons[0].EnrollCgroup(meshlab.Enrolment{Cgroup: web.Cgroup, Service: "web", More: `also_serves = ["web-admin"]`})
	m.Daemons[0].Extra = config
	m.define(0, "web", port, web.IPv4)
	m.define(0, "web-admin", adminPort, web.IPv4)
	m.serve(web, fmt.Sprintf(":%d", port))
	admins := m.serve(web, fmt.Sprintf(":%d", adminPort))
	user, ops, far, api := m.place(0, "user"), m.place(0, "ops"), m.place(1, "far"), m.place(1, "api")
	other, err := m.Nodes[0].HostWorkload("other")
	m.must(err)
	m.Daemons[0].Enroll(other, "other")
	m.must(m.Define(0, "other", meshlab.Service("other", "other-1", other.IPv4.String(), 8085, "")))
	m.sleeper(other.Cgroup, other.Namespace)
	m.allow("web", "user")
	m.allow("web-admin", "ops", "far")
	m.allow("api", "web")
	m.start()
	traced, remote := m.traced(0), m.traced(1)

	reaches := func(from workload, service string, number uint16, path admin.Path) {
		t.Helper()
		tr := traced
		if from.Node == m.Nodes[1] {
			tr = remote
		}
		for _, to := range []string{m.vip(service), at(web.IPv4, number)} {
			if out := m.dial(from, to, "peer"); !strings.Contains(out, fmt.Sprintf(":%d\n", number)) {
				t.Errorf("%s does not reach %s at %s: %s", from.Name, service, to, out)
			}
			c := tr.await("connection of "+from.Name+" to "+to, outboundOf(admin.EventClose, from, path))
			if c.Destination.Service != service || c.Source.Service != from.Name || !strings.HasPrefix(c.Destination.Instance, service+"-1") {
				t.Errorf("%s to %s at %s is traced as %+v", from.Name, service, to, c)
			}
		}
	}
	reaches(user, "web", port, path)
	reaches(ops, "web-admin", adminPort, path)
	reaches(far, "web-admin", adminPort, admin.PathTunnel)
	for _, from := range []struct {
		workload
		numbers []uint16
	}{
		{user, []uint16{adminPort}}, {ops, []uint16{port}}, {far, []uint16{port}}, {other, []uint16{port, adminPort}}, {m.stranger(0), []uint16{port, adminPort}},
	} {
		for _, number := range from.numbers {
			m.getsNothing(from.workload, "-timeout", "3s", at(web.IPv4, number))
			if from.Namespace == web.Namespace {
				m.getsNothing(from.workload, "-timeout", "3s", fmt.Sprintf("127.0.0.1:%d", number))
			}
		}
	}
	traced.await("refusal of a stranger's plaintext to web-admin", func(c admin.Connection) bool {
		return c.Reason == catalog.ReasonPlaintext && c.Destination.Service == "web-admin" && strings.HasSuffix(c.Destination.Address, fmt.Sprintf(":%d", adminPort))
	})
	for _, number := range []uint16{port, adminPort} { // its own calls are its own affair
		m.reaches(web, fmt.Sprintf("127.0.0.1:%d", number))
	}
	who := identities(m)
	m.reaches(web, m.vip("api"))
	if got := who(); got != "web" {
		t.Errorf("the workload calls as %q", got)
	}
	m.getsNothing(api, m.vip("web-admin"))

	status, err := m.Daemons[0].Await(m.ctx(), func(*admin.Status) error { return nil })
	m.must(err)
	i := slices.IndexFunc(status.Workloads, func(w admin.Workload) bool { return w.Cgroup == web.Cgroup.Path() })
	if w := status.Workloads[i]; w.Services() != "web,web-admin" || len(w.Instances) != 2 || w.State != "protected" || w.Detail != "" {
		t.Errorf("shown as %+v", w)
	}
	if path == admin.PathMTLS { // whichever path is taken, the canaries take none
		results := m.canaries(0)
		for _, service := range []string{"web", "web-admin"} {
			says(t, results, check.OK, "canary web (web,web-admin)", "mTLS at", "/svc/"+service+",")
			says(t, results, check.OK, "canary web (web,web-admin)", "where instance "+service+"-1 is delivered to")
		}
		says(t, results, check.OK, "canary web (web,web-admin)", "plaintext to "+at(web.IPv4, adminPort)+" is refused")
	}
	e, err := m.Daemons[0].Admin().Explain(m.ctx(), "ops", "web-admin")
	if m.must(err); !e.Allowed || e.Path != path || len(e.Missing) > 0 {
		t.Errorf("ops to web-admin is explained as %+v", e)
	}
	e, err = m.Daemons[0].Admin().Explain(m.ctx(), "web-admin", "api")
	if m.must(err); !slices.ContainsFunc(e.Missing, func(why string) bool { return strings.Contains(why, `calls others as "web"`) }) {
		t.Errorf("web-admin to api is explained as %+v", e)
	}

	// What listens on one of its ports and is not its own gets nothing, and the other service goes on.
	admins.Kill()
	_ = admins.Wait(m.ctx()) // it was killed
	squatter := m.serve(other, fmt.Sprintf(":%d", adminPort))
	m.getsNothing(ops, "-timeout", "3s", m.vip("web-admin"))
	m.getsNothing(far, "-timeout", "3s", m.vip("web-admin"))
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("the squatter has accepted: %s", squatter.Output())
	}
	traced.await("refused delivery", func(c admin.Connection) bool {
		return c.Reason == catalog.ReasonNotTheWorkloads && c.Destination.Service == "web-admin"
	})
	m.reaches(user, m.vip("web"))
	m.oneServiceTwice(web)
}

// oneServiceTwice asserts what is said where web's workload is not the only one that is web, or that says so twice.
func (m *mesh) oneServiceTwice(web *netlab.Workload) {
	m.t.Helper()
	second, err := m.Nodes[0].HostWorkload("second")
	m.must(err)
	m.baselines[0] = nil
	if out, err := m.nodeproxy(0, "enroll", second.Cgroup.Path(), "--service", "web", "--service", "web"); err == nil || !strings.Contains(out, `service "web" twice`) {
		m.t.Errorf("one service twice is enrolled: %v: %s", err, out)
	}
	_, err = m.nodeproxy(0, "enroll", second.Cgroup.Path(), "--service", "web-admin", "--service", "metrics")
	m.must(err)
	m.awaitWorkload(second.Cgroup, "web-admin", "empty")
	m.sleeper(second.Cgroup, second.Namespace)
	w := m.awaitWorkload(second.Cgroup, "web-admin", "protected")
	if want := fmt.Sprintf(`port %d of the node is guarded for service "web,web-admin"`, adminPort); w.Services() != "web-admin,metrics" || !strings.Contains(w.Detail, want) {
		m.t.Errorf("shown as %+v, want %q", w, want)
	}
	m.must(m.Daemons[0].Admin().Unenroll(m.ctx(), admin.EnrollRequest{Cgroup: second.Cgroup.Path()}))
	m.reaches(web, fmt.Sprintf("127.0.0.1:%d", port))
}

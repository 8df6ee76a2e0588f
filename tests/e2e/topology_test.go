package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// identities makes api answer everybody, and returns who node 2 says called: the source identity of the next connection.
func identities(m *mesh) func() string {
	m.t.Helper()
	m.allow("api", "*")
	traced := m.traced(1)
	return func() string {
		m.t.Helper()
		c := traced.await("inbound connection", func(c admin.Connection) bool { return c.Event == "close" && c.Direction == admin.Inbound })
		return c.Source.Service
	}
}

// from runs the client in any cgroup and namespace.
func (m *mesh) from(cgroup *netlab.Cgroup, ns *netlab.Namespace, args ...string) string {
	m.t.Helper()
	p, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: append([]string{"dial"}, args...), Cgroup: cgroup, Namespace: ns})
	m.must(err)
	m.must(p.Wait(m.ctx()))
	return p.Output()
}

// sleeper keeps a cgroup populated.
func (m *mesh) sleeper(cgroup *netlab.Cgroup, ns *netlab.Namespace) *netlab.Process {
	m.t.Helper()
	p, err := m.Lab.Start(netlab.Command{Path: "sleep", Args: []string{"1000"}, Cgroup: cgroup, Namespace: ns})
	m.must(err)
	return p
}

func (m *mesh) child(w *netlab.Workload, name string) *netlab.Cgroup {
	m.t.Helper()
	c, err := w.Cgroup.Child(name)
	m.must(err)
	return c
}

func TestOfNestedWorkloadsTheNearestGivesTheIdentity(t *testing.T) {
	m := newMesh(t)
	outer := m.place(0, "outer")
	m.place(1, "api")
	inner, below := m.child(outer, "inner"), m.child(outer, "below")
	m.Daemons[0].EnrollCgroup(meshlab.Enrolment{Cgroup: inner, Service: "inner"})
	m.must(m.Define(0, "inner", meshlab.Service("inner", "inner-1", outer.IPv4.String(), 9000, "")))
	m.sleeper(inner, outer.Namespace)
	m.start()
	who := identities(m)
	m.awaitGeneration(1)
	m.awaitGeneration(0)
	for _, tc := range []struct {
		cgroup *netlab.Cgroup
		want   string
	}{{outer.Cgroup, "outer"}, {inner, "inner"}, {below, "outer"}} {
		if out := m.from(tc.cgroup, outer.Namespace, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			t.Errorf("%s does not reach api: %s", tc.cgroup.Path(), out)
			continue
		}
		if got := who(); got != tc.want {
			t.Errorf("a process in %s is %q, not %q", tc.cgroup.Path(), got, tc.want)
		}
	}
}

func TestTwoServicesInOnePodHaveTheirOwnIdentities(t *testing.T) {
	m := newMesh(t)
	pod, err := m.Nodes[0].Workload("pod")
	m.must(err)
	api := m.place(1, "api")
	groups := map[string]*netlab.Cgroup{}
	for i, service := range []string{"front", "back"} {
		groups[service] = m.child(pod, service)
		m.Daemons[0].EnrollCgroup(meshlab.Enrolment{Cgroup: groups[service], Service: service})
		number := uint16(8001 + i)
		m.must(m.Define(0, service, meshlab.Service(service, service+"-1", pod.IPv4.String(), number, "")))
		p, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf(":%d", number)}, Cgroup: groups[service], Namespace: pod.Namespace})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "ready"))
		m.allow(service, "api")
	}
	m.start()
	who := identities(m)
	m.awaitGeneration(0)
	m.awaitGeneration(1)
	for service, cgroup := range groups {
		m.from(cgroup, pod.Namespace, m.vip("api"), "peer")
		if got := who(); got != service {
			t.Errorf("a process of %s is taken for %q", service, got)
		}
	}
	for i, service := range []string{"front", "back"} {
		out := m.dial(api, m.vip(service), "peer")
		if !strings.Contains(out, fmt.Sprintf(":%d\n", 8001+i)) {
			t.Errorf("%s is not reached on its own port %d: %s", service, 8001+i, out)
		}
	}
}

func TestTwoWorkloadsInTheNodesNamespaceAreNotTakenForEachOther(t *testing.T) {
	m := newMesh(t)
	api := m.place(1, "api")
	who := make(map[string]*netlab.Workload)
	numbers := map[string]uint16{"red": 8081, "blue": 8082}
	for service, number := range numbers {
		w, err := m.Nodes[0].HostWorkload(service)
		m.must(err)
		m.Daemons[0].Enroll(w, service)
		m.define(0, service, number, w.IPv4)
		m.serve(w, fmt.Sprintf(":%d", number))
		who[service] = w
	}
	m.allow("red", "api")
	m.start()
	identity := identities(m)
	m.awaitGeneration(0)
	m.awaitGeneration(1)
	for service, w := range who {
		m.reaches(w, m.vip("api"))
		if got := identity(); got != service {
			t.Errorf("%s is taken for %q", service, got)
		}
	}
	if out := m.dial(api, m.vip("red"), "peer"); !strings.Contains(out, fmt.Sprintf(":%d\n", numbers["red"])) {
		t.Errorf("red is not reached at its port: %s", out)
	}
	m.getsNothing(api, m.vip("blue"))
	m.getsNothing(who["red"], fmt.Sprintf("127.0.0.1:%d", numbers["blue"]))
	m.getsNothing(who["blue"], fmt.Sprintf("127.0.0.1:%d", numbers["red"]))
	m.reaches(who["red"], fmt.Sprintf("127.0.0.1:%d", numbers["red"]))
}

func TestAnInnerWorkloadThatIsUnenrolledFailsNoConnection(t *testing.T) {
	m := newMeshAlone(t)
	m.Daemons[0].Labels = "  xattr {\n    enabled = true\n  }\n"
	outer := m.place(0, "outer")
	m.place(1, "api")
	inner := m.child(outer, "inner")
	m.must(m.Define(0, "inner", meshlab.Service("inner", "inner-1", outer.IPv4.String(), 9000, "")))
	m.sleeper(inner, outer.Namespace)
	m.allow("api", "outer", "inner")
	m.start()
	for range 3 {
		m.label(inner, "service", "inner")
		m.awaitWorkload(inner, "inner", "protected")
		m.unlabel(inner, "service")
		for range 60 {
			if out := m.from(inner, outer.Namespace, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
				t.Fatalf("a connection fails: %s", out)
			}
		}
		m.awaitWorkload(inner, "", "")
	}
}

func TestACgroupWithTwoNamespacesIsServedInBoth(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	second, v4, _, err := m.Nodes[0].Pod()
	m.must(err)
	m.sleeper(web.Cgroup, second)
	m.start()
	m.awaitNamespaces(0, web.Cgroup, 2)
	m.reaches(web, m.vip("api"))
	if out := m.from(web.Cgroup, second, m.vip("api"), "peer"); !strings.Contains(out, "accept="+hostPrefix(v4)) {
		t.Errorf("from the second namespace: %s", out)
	}
}

// awaitNamespaces waits until a workload is served in n namespaces.
func (m *mesh) awaitNamespaces(node int, cgroup *netlab.Cgroup, n int) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if w.Cgroup == cgroup.Path() && len(w.Namespaces) == n && w.State == "protected" {
				return nil
			}
		}
		return fmt.Errorf("the workloads are %+v", s.Workloads)
	})
	m.must(err)
}

func TestAWorkloadThatComesBackInANewNamespaceIsServedThere(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	m.start()
	m.reaches(web, m.vip("api"))
	m.baselines[0] = nil
	for range 3 {
		pids, err := web.Cgroup.PIDs()
		m.must(err)
		for _, pid := range pids {
			p, err := os.FindProcess(pid)
			m.must(err)
			m.must(p.Kill())
		}
		next, v4, _, err := m.Nodes[0].Pod()
		m.must(err)
		p := m.sleeper(web.Cgroup, next)
		m.eventually("api is reached from the new namespace", func() error {
			if out := m.from(web.Cgroup, next, "-timeout", "2s", m.vip("api"), "peer"); !strings.Contains(out, "accept="+hostPrefix(v4)) {
				return fmt.Errorf("%w: %s", errNotYet, out)
			}
			return nil
		})
		p.Kill()
	}
	m.sleeper(web.Cgroup, web.Namespace)
	m.eventually("web is served at its own address again", func() error {
		status, err := m.Daemons[0].Admin().Status(m.ctx())
		if err == nil && (len(status.Workloads) != 1 || len(status.Workloads[0].Instances) != 1) {
			err = fmt.Errorf("%w: %+v", errNotYet, status.Workloads)
		}
		return err
	})
	m.settle(0)
}

func TestEqualAddressesAndPortsInTwoNamespacesDoNotMeet(t *testing.T) {
	m := newMesh(t)
	m.place(1, "api")
	who := map[string]*netlab.Workload{}
	for _, service := range []string{"red", "blue"} {
		who[service] = m.place(0, service)
	}
	m.start()
	identity := identities(m)
	m.awaitGeneration(0)
	m.awaitGeneration(1)
	// The redirected connection is between loopback addresses, so an equal source port makes an equal 4-tuple but for the
	// daemon's own port.
	for range 5 {
		for service, w := range who {
			out := m.dial(w, "-bind", "127.0.0.1:7777", m.vip("api"), "peer")
			if !strings.Contains(out, "accept=") {
				t.Fatalf("%s does not reach api: %s", service, out)
			}
			if got := identity(); got != service {
				t.Errorf("%s is taken for %q", service, got)
			}
		}
	}
}

func TestAnAddressThatTwoNamespacesHaveIsGuardedInTheWorkloadsAlone(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	plain, err := m.Nodes[0].Workload("plain")
	m.must(err)
	m.serve(plain, ":8080")
	shared := netip.MustParseAddr("10.99.0.1")
	for _, w := range []*netlab.Workload{web, plain} {
		m.must(w.Namespace.Address(netlab.Uplink, netip.PrefixFrom(shared, 32)))
	}
	m.start()
	if out := m.from(plain.Cgroup, web.Namespace, "-timeout", "3s", at(shared, port), "peer"); strings.Contains(out, "accept=") {
		t.Errorf("a stranger in the workload's namespace reaches its strict port: %s", out)
	}
	m.reaches(plain, at(shared, port))
	m.reaches(web, at(shared, port)) // its own
}

func TestAnAncestorOfTheDaemonIsRefusedAsAWorkload(t *testing.T) {
	m, web, _ := pair(t)
	root := filepath.Dir(m.Cgroup().Path())
	for _, path := range []string{root, m.Cgroup().Path(), m.Nodes[0].Cgroup.Path(), filepath.Join(m.Nodes[0].Cgroup.Path(), "nodeproxy")} {
		err := m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: path, Service: "web"})
		if err == nil {
			t.Errorf("%s was enrolled", path)
		}
	}
	m.reaches(web, m.vip("api"))
}

func TestACgroupThatGoesAndComesWhileItIsEnrolledDisturbsNobody(t *testing.T) {
	m, web, _ := pair(t)
	m.baselines[0] = nil
	root := m.Nodes[0].Cgroup
	for i := range 30 {
		name := fmt.Sprintf("short-%d", i%3)
		cgroup, err := root.Child(name)
		m.must(err)
		enrolled := make(chan error, 1)
		go func() {
			enrolled <- m.Daemons[0].Admin().Enroll(t.Context(), admin.EnrollRequest{Cgroup: cgroup.Path(), Service: "web"})
		}()
		if i%2 == 0 {
			m.must(<-enrolled)
			m.must(cgroup.Remove())
		} else {
			m.must(cgroup.Remove())
			<-enrolled // whether it was still there is a matter of luck
		}
		_ = m.Daemons[0].Admin().Unenroll(m.ctx(), admin.EnrollRequest{Cgroup: cgroup.Path()})
	}
	m.reaches(web, m.vip("api"))
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if len(s.Workloads) != 1 {
			return fmt.Errorf("the workloads are %+v", s.Workloads)
		}
		return nil
	})
	m.must(err)
}

func TestAWorkloadEnrolledByHandIsCapturedUntilItIsUnenrolled(t *testing.T) {
	m := newMesh(t)
	web, err := m.Nodes[0].Workload("web")
	m.must(err)
	m.serve(web, ":8080")
	m.place(1, "api")
	m.allow("api", "web")
	m.start()
	m.baselines[0] = nil
	request := admin.EnrollRequest{Cgroup: web.Cgroup.Path(), Service: "web"}
	m.must(m.Daemons[0].Admin().Enroll(m.ctx(), request))
	m.eventually("web reaches api by its virtual IP", func() error {
		if out := m.dial(web, "-timeout", "2s", m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
	m.must(m.Daemons[0].Admin().Unenroll(m.ctx(), request))
	m.eventually("no program runs for it", func() error {
		if n := effective(t, web.Cgroup.Path()); n != 0 {
			return fmt.Errorf("%d programs run", n)
		}
		return nil
	})
	m.getsNothing(web, "-timeout", "2s", m.vip("api"))
	m.settle(0)
}

func TestAVirtualIPOfNobodyIsRefused(t *testing.T) {
	m, web, _ := pair(t)
	traced := m.traced(0)
	if out := m.dial(web, "240.0.99.99:80", "peer"); !strings.Contains(out, "refused: ") {
		t.Errorf("an unassigned virtual IP is not refused: %s", out)
	}
	traced.await("refusal", func(c admin.Connection) bool { return c.Reason == catalog.ReasonUnknownService })
}

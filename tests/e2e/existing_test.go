package e2e

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

// goesOn asserts that a stream that a client prints has not ended.
func (m *mesh) goesOn(what string, p *netlab.Process) {
	m.t.Helper()
	before := strings.Count(p.Output(), "a line")
	m.eventually(what+" goes on", func() error {
		if strings.Count(p.Output(), "a line") < before+20 {
			return errNotYet
		}
		return nil
	})
}

// ends asserts that a client's stream ends with that error.
func (m *mesh) ends(what string, p *netlab.Process, want string) {
	m.t.Helper()
	if err := p.Wait(m.ctx()); err != nil || !strings.Contains(p.Output(), "end: "+want) {
		m.t.Errorf("%s does not end with %s: %v: %.300s", what, want, err, p.Output())
	}
}

// stream opens a connection of which the application sends for ever.
func (m *mesh) stream(from *netlab.Workload, args ...string) *netlab.Process {
	m.t.Helper()
	return m.startDial(from, "a line", append(args, "stream")...)
}

// startApart starts node 2's daemon before node 1's, whose workloads' enrolment then finds node 2's in the mesh.
func (m *mesh) startApart() {
	m.t.Helper()
	m.must(m.Daemons[1].Start(m.ctx()))
	_, err := m.Daemons[1].AwaitProtected(m.ctx())
	m.must(err)
	m.must(m.Daemons[0].Start(m.ctx()))
	for i := range m.Daemons {
		m.settle(i)
	}
}

const resetsExisting = "existing_connections = \"reset\"\n"

func TestWhatAWorkloadDialledBeforeItsEnrolmentIsResetIfConfigured(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.define(1, "api", port, api.IPv4, api.IPv6)
	m.allow("api", "web")
	outside, err := m.Nodes[1].Workload("outside")
	m.must(err)
	m.serve(outside, ":8080")
	m.Daemons[0].Extra = resetsExisting // the other node keeps what it has
	bypassing := map[string]*netlab.Process{
		"IPv4": m.stream(web, at(api.IPv4, port)), "IPv6": m.stream(web, at(api.IPv6, port)), "v4-mapped": m.stream(web, "-mapped", at(api.IPv4, port)),
	}
	others := map[string]*netlab.Process{
		"a destination outside": m.stream(web, at(outside.IPv4, port)), "its own loopback": m.stream(web, "127.0.0.1:8080"),
		"what a process outside the mesh dialled": m.stream(outside, at(api.IPv4, port)),
	}
	m.startApart()
	meshed := m.stream(web, m.vip("api"))
	for name, p := range bypassing {
		m.ends(name, p, "ECONNABORTED")
	}
	for name, p := range others {
		m.goesOn(name, p)
		p.Kill()
	}
	m.goesOn("a connection through the mesh", meshed)
	meshed.Kill()
}

func TestWhatAWorkloadAcceptedBeforeItsEnrolmentIsResetIfConfigured(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.define(1, "api", port, api.IPv4, api.IPv6)
	m.allow("api", "web")
	host, err := m.Nodes[1].HostWorkload("host")
	m.must(err)
	m.Daemons[1].Enroll(host, "host")
	m.define(1, "host", 8081, host.IPv4)
	m.serve(host, ":8081", ":8082")
	m.Daemons[1].Extra = resetsExisting + "inbound {\n  plaintext_from = [\"" + m.Nodes[0].IPv4.String() + "/32\"]\n}\n"
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	monitor, err := m.Nodes[0].HostWorkload("monitor")
	m.must(err)
	neighbour, err := m.Nodes[1].HostWorkload("neighbour")
	m.must(err)
	plain := map[string]*netlab.Process{
		"a stranger by IPv4": m.stream(stranger, at(api.IPv4, port)), "a stranger by IPv6": m.stream(stranger, at(api.IPv6, port)),
		"a stranger at the node's port": m.stream(stranger, at(host.IPv4, 8081)), "a process of the node, on loopback": m.stream(neighbour, "127.0.0.1:8081"),
	}
	others := map[string]*netlab.Process{
		"its own loopback":        m.stream(api, "127.0.0.1:8080"),
		"the node's own loopback": m.stream(host, "127.0.0.1:8081"), "an undeclared port of the node": m.stream(stranger, at(host.IPv4, 8082)),
		"a network whose plaintext is taken": m.stream(monitor, at(api.IPv4, port)),
	}
	m.start()
	meshed := m.stream(web, m.vip("api"))
	for name, p := range plain {
		m.ends(name, p, "reset")
	}
	for name, p := range others {
		m.goesOn(name, p)
		p.Kill()
	}
	m.goesOn("a connection through the mesh", meshed)
	meshed.Kill()
}

func TestOlderConnectionsGoOnForAsLongAsConfiguredWhicheverDaemonRuns(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.allow("api", "web")
	const grace = 3 * time.Second
	m.Daemons[0].Extra = "existing_connections = \"" + grace.String() + "\"\n"
	p := m.stream(web, at(api.IPv4, port))
	m.startApart()
	logged := func(message string) time.Time {
		t.Helper()
		line := regexp.MustCompile(`time=(\S+) level=INFO msg="` + message + `"`)
		m.must(m.Daemons[0].Process.WaitOutput(m.ctx(), message))
		at, err := time.Parse(time.RFC3339, line.FindStringSubmatch(m.Daemons[0].Process.Output())[1])
		m.must(err)
		return at
	}
	enrolled := logged("workload enrolled")
	m.stop(0)
	m.restart(0)
	m.ends("the older connection", p, "ECONNABORTED")
	if lived := logged("connections older than the enrolment are reset").Sub(enrolled); lived < grace {
		t.Errorf("it went on for %v, not for %v", lived, grace)
	}
	for _, part := range []string{"reason=existing source_service=web", "destination_service=api destination_address=" + at(api.IPv4, port), "path=plaintext"} {
		m.must(m.Daemons[0].Process.WaitOutput(m.ctx(), part))
	}
	if n := m.denials(0, catalog.ReasonExisting); n != 1 {
		t.Errorf("%v connections are counted, of one that was reset", n)
	}
}

func TestARestartedDaemonLeavesConnectionsAlone(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.allow("api", "web")
	kept := m.stream(web, at(api.IPv4, port))
	m.startApart()
	m.stop(0)
	m.Daemons[0].Extra = resetsExisting
	m.restart(0)
	m.reaches(web, m.vip("api"))
	m.goesOn("a connection that an earlier daemon kept", kept)
	kept.Kill()
}

func TestWhatGoesDirectIsNoConnectionOlderThanTheEnrolment(t *testing.T) {
	m := newMesh(t)
	web, near, far := m.place(0, "web"), m.place(0, "near"), m.place(1, "far")
	m.allow("near", "web")
	m.allow("far", "web")
	m.Daemons[0].Extra = "existing_connections = \"5s\"\n"
	older := m.stream(web, at(far.IPv4, port))
	m.startApart()
	first := m.stream(web, at(near.IPv4, port))
	m.ends("the older connection", older, "ECONNABORTED")
	second := m.stream(web, at(near.IPv4, port))
	for _, p := range []*netlab.Process{first, second} {
		m.goesOn("a connection within the node", p)
		p.Kill()
	}
}

func TestAnObservedWorkloadKeepsWhatItHasOpen(t *testing.T) {
	m, web, api := labelled(t)
	m.stop(0)
	m.Daemons[0].Extra = "existing_connections = \"3s\"\n"
	other, err := m.Nodes[0].Workload("other")
	m.must(err)
	m.define(0, "other", port, other.IPv4)
	m.serve(other, ":8080")
	watched, older := m.stream(web, at(api.IPv4, port)), m.stream(other, at(api.IPv4, port))
	m.restart(0)
	m.settle(1) // its baseline, now that other is defined
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	m.label(web.Cgroup, "mesh", "observe")
	m.awaitWorkload(web.Cgroup, "web", "observed")
	m.label(other.Cgroup, "service", "other")
	m.ends("the connection of one that was enrolled later", older, "ECONNABORTED")
	m.goesOn("a connection of the one that is only observed", watched)
	watched.Kill()
	m.unlabel(web.Cgroup, "mesh")
	for _, w := range []*netlab.Workload{web, other} {
		m.unlabel(w.Cgroup, "service")
		m.awaitWorkload(w.Cgroup, "", "")
	}
}

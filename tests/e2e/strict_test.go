package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// strangers are places from which nobody may reach a strict port: outside the mesh, and inside but denied.
func strangers(t *testing.T, m *mesh) map[string]*netlab.Workload {
	t.Helper()
	places := make(map[string]*netlab.Workload)
	for node := range m.Nodes {
		place, err := m.Nodes[node].HostWorkload("stranger")
		m.must(err)
		places["a stranger on "+m.Nodes[node].Name] = place
		pod, err := m.Nodes[node].Workload("pod")
		m.must(err)
		places["a stranger in a pod of "+m.Nodes[node].Name] = pod
		places["a denied workload of "+m.Nodes[node].Name] = m.place(node, "batch"+m.Nodes[node].Name[len("node-"):])
	}
	return places
}

func TestAStrictPortOfANamespaceGivesStrangersNothing(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	second := netip.AddrFrom4([4]byte{10, 2, 1, 3})
	m.must(api.Namespace.Address(netlab.Uplink, netip.PrefixFrom(second, 24)))
	server := m.serve(api, ":8080", ":9999")
	m.allow("api", "web")
	places := strangers(t, m)
	m.start()
	traced := m.traced(1)
	for name, from := range places {
		for what, to := range map[string]string{
			"its address": at(api.IPv4, port), "a second address": at(second, port), "its IPv6 address": at(api.IPv6, port),
			"an undeclared port": at(api.IPv4, 9999),
		} {
			out := m.dial(from, "-timeout", "3s", to, "peer")
			if strings.Contains(out, "accept=") {
				t.Errorf("%s reaches %s, %s: %s", name, what, to, out)
			}
		}
	}
	if strings.Contains(server.Output(), "accepted") {
		t.Errorf("the application has accepted: %s", server.Output())
	}
	c := traced.await("plaintext refusal", func(c admin.Connection) bool { return c.Reason == catalog.ReasonPlaintext })
	if c.Direction != admin.Inbound || c.Verdict != admin.Denied || c.Destination.Service != "api" {
		t.Errorf("the refusal is traced as %+v", c)
	}
	if n := m.denials(1, catalog.ReasonPlaintext); n == 0 {
		t.Error("no refusal is counted")
	}
	m.reaches(web, at(api.IPv4, port))
	out := m.dial(api, "127.0.0.1:9999", "peer")
	if !strings.Contains(out, "end: eof") {
		t.Errorf("the workload does not reach its own loopback: %s", out)
	}
}

func TestAStrictPortInTheHostsNamespaceGivesStrangersNothing(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	node := m.Nodes[1]
	api, err := node.HostWorkload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	m.define(1, "api", port, api.IPv4, api.IPv6)
	server := m.serve(api, ":8080", ":9999")
	m.allow("api", "web")
	places := strangers(t, m)
	neighbour, err := node.HostWorkload("neighbour") // whose connections to itself are announced, too
	m.must(err)
	m.Daemons[1].Enroll(neighbour, "neighbour")
	m.define(1, "neighbour", 8081, neighbour.IPv4, neighbour.IPv6)
	m.serve(neighbour, ":8081")
	places["a denied workload in the same namespace"] = neighbour
	m.start()
	for name, from := range places {
		for what, to := range map[string]string{
			"127.0.0.1": "127.0.0.1:8080", "::1": "[::1]:8080", "its address": at(api.IPv4, port), "its IPv6 address": at(api.IPv6, port),
			"another address of the node": "10.2.1.1:8080",
		} {
			if from.Namespace != node.Namespace && (what == "127.0.0.1" || what == "::1") {
				continue // that is its own loopback
			}
			if out := m.dial(from, "-timeout", "3s", to, "peer"); strings.Contains(out, "accept=") {
				t.Errorf("%s reaches %s, %s: %s", name, what, to, out)
			}
		}
	}
	if strings.Contains(server.Output(), "accepted") {
		t.Errorf("the application has accepted: %s", server.Output())
	}
	m.reaches(web, m.vip("api"))
	m.reaches(api, "127.0.0.1:8080") // the workload itself
	if out := m.dial(places["a stranger on node-2"], "127.0.0.1:9999", "peer"); !strings.Contains(out, "accept=") {
		t.Errorf("a port in the host's namespace that no service declares is closed: %s", out)
	}
}

func TestAPermissivePortLetsPlaintextInAndCountsIt(t *testing.T) {
	m := newMesh(t)
	api := m.place(1, "api")
	web := m.place(0, "web")
	m.allow("api", "web")
	m.Daemons[1].Extra = "inbound {\n  mode = \"permissive\"\n}\n"
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	m.start()
	traced := m.traced(1)
	m.reaches(stranger, at(api.IPv4, port))
	c := traced.await("plaintext connection", func(c admin.Connection) bool { return c.Path == admin.PathPlaintext })
	if c.Verdict != admin.Allowed || c.Direction != admin.Inbound || c.Destination.Service != "api" {
		t.Errorf("the connection is traced as %+v", c)
	}
	if n := m.metric(1, "nodeproxy_connections_opened_total", `path="plaintext"`, `destination_service="api"`); n != 1 {
		t.Errorf("one plaintext connection is counted as %v", n)
	}
	m.reaches(web, m.vip("api"))
}

func TestAModeInTheWorkloadsOwnBlockGoesBeforeTheNodes(t *testing.T) {
	m := newMesh(t)
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].EnrollCgroup(meshlab.Enrolment{Cgroup: api.Cgroup, Service: "api", Mode: "permissive"})
	m.define(1, "api", port, api.IPv4)
	m.serve(api, ":8080")
	strict := m.place(1, "strict")
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	m.start()
	m.reaches(stranger, at(api.IPv4, port))
	m.getsNothing(stranger, "-timeout", "3s", at(strict.IPv4, port))
}

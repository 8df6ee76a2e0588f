package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// marked is a mesh whose second daemon heeds what is registered with the mark.
func marked(t *testing.T) *mesh {
	t.Helper()
	m := newMesh(t)
	m.Daemons[1].Labels = "  consul {\n    enabled = true\n  }\n"
	return m
}

// enlist registers an instance at an address of node 2, with meta in keys and values.
func (m *mesh) enlist(service, id string, port uint16, meta ...string) {
	m.t.Helper()
	marks := map[string]string{}
	for i := 0; i+1 < len(meta); i += 2 {
		marks[meta[i]] = meta[i+1]
	}
	m.must(m.agents[1].Register(m.ctx(), map[string]any{"Name": service, "ID": id, "Address": m.Nodes[1].IPv4.String(), "Port": port, "Meta": marks}))
}

// task is one of an allocation, with the namespace and the cgroup that Nomad's exec driver gives it.
func (m *mesh) task(allocation, name string) *netlab.Workload {
	m.t.Helper()
	ns, ip, ip6, err := m.Nodes[1].Pod()
	m.must(err)
	cgroup, err := m.Nodes[1].Cgroup.Child(allocation + "." + name + ".scope")
	m.must(err)
	return &netlab.Workload{Name: name, Node: m.Nodes[1], Namespace: ns, Cgroup: cgroup, IPv4: ip, IPv6: ip6}
}

// portmap leads a port of node 2 to a task's, as the CNI plugin of that name does.
func (m *mesh) portmap(port uint16, to netip.AddrPort) {
	m.t.Helper()
	for _, chain := range []string{"PREROUTING", "OUTPUT"} {
		_, err := m.Run(m.ctx(), netlab.Command{Path: "/usr/sbin/iptables", Namespace: m.Nodes[1].Namespace, Args: []string{"-t", "nat", "-A", chain, "-p", "tcp", "-d", m.Nodes[1].IPv4.String(), "--dport", fmt.Sprint(port), "-j", "DNAT", "--to-destination", to.String()}})
		m.must(err)
	}
}

// awaitFound waits until node 2's daemon has a cgroup in a state, "" for not at all.
func (m *mesh) awaitFound(cgroup *netlab.Cgroup, service, state string) {
	m.t.Helper()
	_, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if w.Cgroup == cgroup.Path() {
				if w.Service == service && w.State == state && w.Provider == "consul" {
					return nil
				}
				return fmt.Errorf("it is %+v", w)
			}
		}
		if state == "" {
			return nil
		}
		return fmt.Errorf("workloads are %+v, problems %+v, refused %+v", s.Workloads, s.Problems, s.Refused)
	})
	m.must(err)
}

// awaitSays waits until node 2's daemon has a problem that contains all of texts.
func (m *mesh) awaitSays(texts ...string) {
	m.t.Helper()
	_, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, p := range s.Problems {
			said := true
			for _, text := range texts {
				said = said && strings.Contains(p.Text, text)
			}
			if said {
				return nil
			}
		}
		return fmt.Errorf("problems are %+v", s.Problems)
	})
	m.must(err)
}

// awaitClaimRefused waits until node 2's daemon refuses an instance for a reason, and asserts that nothing was given to it.
func (m *mesh) awaitClaimRefused(instance, service, why string) {
	m.t.Helper()
	status, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, r := range s.Refused {
			if r.Name == "instance "+instance && strings.Contains(r.Why, why) {
				return nil
			}
		}
		return fmt.Errorf("refused are %+v, want %q", s.Refused, why)
	})
	m.must(err)
	for _, c := range status.Certificates {
		if c.Service == service {
			m.t.Errorf("a certificate was fetched: %+v", c)
		}
	}
	for _, w := range status.Workloads {
		if w.Service == service {
			m.t.Errorf("a workload: %+v", w)
		}
	}
}

// checkedAgain returns what is nil once the agent's check of an instance passes and more of its probes were let in.
func (m *mesh) checkedAgain(id string) func() error {
	probed := func() float64 {
		s, err := m.Daemons[1].Admin().Status(m.ctx())
		m.must(err)
		return float64(s.Kernel.Counters["probed"])
	}
	before := probed()
	return func() error {
		var checks map[string]struct{ ServiceID, Name, Status, Output string }
		if err := m.agents[1].Do(m.ctx(), http.MethodGet, "/v1/agent/checks", nil, &checks); err != nil {
			return err
		}
		for _, c := range checks {
			if c.ServiceID == id && c.Name == "port" && c.Status == "passing" && probed() > before+2 {
				return nil
			}
		}
		return fmt.Errorf("checks are %+v, %v probes were let in", checks, probed()-before)
	}
}

func TestTasksOfNomadAreFoundByMetaAlone(t *testing.T) {
	m := marked(t)
	const allocation, other, mapped = "2fd0a1c6-7f3f-4b8e-9d35-3f1f0c9a6b11", "9c0de5f2-1111-4222-8333-444455556666", 23456
	web := m.place(0, "web")
	api := m.task(allocation, "api")
	m.serves(api, programs.app, "serve", fmt.Sprintf(":%d", port))
	m.serves(api, programs.app, "serve", "127.0.0.1:7000") // its own affair
	m.portmap(mapped, netip.AddrPortFrom(api.IPv4, port))
	at := netip.AddrPortFrom(m.Nodes[1].IPv4, mapped).String()
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	m.eventually("the port is mapped", stranger, at, reached)
	id := "_nomad-task-" + allocation + "-group-api-api-http"
	m.enlist("api", id, mapped, "nodeproxy", "enabled")
	m.must(m.agents[1].Do(m.ctx(), http.MethodPut, "/v1/agent/check/register", map[string]any{"Name": "port", "ServiceID": id, "TCP": at, "Interval": "200ms"}, nil))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "web", map[string]string{"api": "allow"}))
	m.start([]string{"web"}, []string{"api", "second"})

	m.awaitFound(api.Cgroup, "api", "protected")
	onPort := func(out string) bool {
		return strings.Contains(out, fmt.Sprintf(":%d\n", port)) && strings.Contains(out, "end: eof")
	}
	m.eventually("web reaches api", web, m.vip(0, "api"), onPort)
	m.eventually("web reaches api by its registered address", web, at, onPort)
	m.eventually("api reaches web", api, m.vip(1, "web"), reached)
	if out := m.dial(stranger, "-timeout", "3s", at, "peer"); reached(out) {
		t.Errorf("a stranger reaches api in plaintext: %s", out)
	}

	m.must(m.agents[1].Await(m.ctx(), "has checked api since it is protected", m.checkedAgain(id)))

	second := m.task(other, "second")
	for _, p := range []string{":8001", ":8002"} {
		m.serves(second, programs.app, "serve", p)
	}
	m.portmap(mapped+1, netip.AddrPortFrom(second.IPv4, 8002))
	id2 := "_nomad-task-" + other + "-group-second-second-http"
	m.enlist("second", id2, mapped+1, "nodeproxy", "enabled")
	m.awaitSays(id2, "[8001 8002]", "nodeproxy-port")
	m.enlist("second", id2, mapped+1, "nodeproxy", "enabled", "nodeproxy-port", "8002")
	m.awaitFound(second.Cgroup, "second", "protected")
	m.must(m.agents[0].Intentions(m.ctx(), "second", map[string]string{"web": "allow"}))
	m.eventually("web reaches the port that meta says", web, m.vip(0, "second"), func(out string) bool { return strings.Contains(out, ":8002\n") })

	m.must(m.agents[1].Deregister(m.ctx(), id))
	m.must(m.agents[1].Await(m.ctx(), "has no sidecar of it", func() error {
		if _, there := m.registrations(1)[id+"-sidecar-proxy"]; there {
			return fmt.Errorf("it has")
		}
		return nil
	}))
	m.awaitFound(api.Cgroup, "api", "protected") // it still runs
	if out := m.dial(stranger, "-timeout", "3s", at, "peer"); reached(out) {
		t.Errorf("a task that ends is open to strangers: %s", out)
	}
	m.must(api.Cgroup.Remove())
	m.awaitFound(api.Cgroup, "", "")
	m.enlist("second", id2, mapped+1, "nodeproxy", "disabled")
	m.awaitFound(second.Cgroup, "", "")
}

func TestASquattedPortGetsNoIdentity(t *testing.T) {
	m := marked(t)
	const number = 7000
	node := m.Nodes[1]
	at := fmt.Sprintf("%s:%d", node.IPv4, number)
	m.start(nil, []string{"bank"})
	m.enlist("bank", "bank-1", number, "nodeproxy", "enabled")
	m.awaitSays("bank-1", "nothing listens at "+at)
	cgroup := func(name string) *netlab.Cgroup {
		c, err := node.Cgroup.Child(name)
		m.must(err)
		return c
	}
	listen := func(in *netlab.Cgroup) *netlab.Process {
		p, err := m.Start(netlab.Command{Path: programs.app, Args: []string{"serve", at}, Cgroup: in, Namespace: node.Namespace})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "ready"))
		return p
	}
	session, err := cgroup("user.slice").Child("session.scope")
	m.must(err)
	delegated := cgroup("delegated")
	m.must(os.Chown(delegated.Path(), 65534, 65534))
	pod, err := cgroup("kubepods").Child("pod1")
	m.must(err)
	for in, why := range map[*netlab.Cgroup]string{
		session: "that is a user's", delegated: "is not root's", pod: "that is a pod's", cgroup(strings.Repeat("0123456789abcdef", 4)): "that is a container's",
		cgroup("bank.socket"): "that is a socket of systemd's",
	} {
		squatter := listen(in)
		m.awaitClaimRefused("bank-1", "bank", why)
		squatter.Kill()
	}

	outside := cgroup("outside")
	p, err := m.Start(netlab.Command{Path: "unshare", Cgroup: outside, Args: []string{"--user", "--map-root-user", "--net", "sh", "-c",
		`ip link set lo up && ip address add "$1/32" dev lo && exec "$0" serve "$2"`, programs.app, node.IPv4.String(), at}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	m.awaitClaimRefused("bank-1", "bank", "another user namespace")

	bank := cgroup("bank")
	own := listen(bank)
	m.awaitFound(bank, "bank", "protected") // whoever else has the address
	own.Kill()
	thief := cgroup("thief")
	squatter := listen(thief)
	m.awaitSays("bank-1", bank.Path(), thief.Path())
	m.awaitFound(thief, "", "")
	m.awaitFound(bank, "bank", "empty")
	squatter.Kill()
	listen(bank)
	m.awaitFound(bank, "bank", "protected")
	m.enlist("bank", "bank-1", number, "nodeproxy", "enabled", "nodeproxy-service", "vault")
	m.awaitClaimRefused("bank-1", "vault", "only the service that it registers")
}

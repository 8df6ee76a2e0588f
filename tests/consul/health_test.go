package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

const (
	hostPort   = 8090 // of the service in the node's namespace
	hostHealth = 8091 // its gRPC health server
	podHealth  = 9090
	unchecked  = 7070
)

// statuses is what the agent says of each check of a registration, by name.
func (m *mesh) statuses(node int, id string) map[string]string {
	m.t.Helper()
	var all map[string]struct{ ServiceID, Status, Name, Output string }
	m.must(m.agents[node].Do(m.ctx(), http.MethodGet, "/v1/agent/checks", nil, &all))
	found := make(map[string]string)
	for _, c := range all {
		if c.ServiceID == id {
			found[c.Name] = c.Status
			if c.Status != "passing" {
				found[c.Name] += ": " + c.Output
			}
		}
	}
	return found
}

// counter is one of the kernel's, on a node.
func (m *mesh) counter(node int, name string) uint64 {
	m.t.Helper()
	status, err := m.Daemons[node].Admin().Status(m.ctx())
	m.must(err)
	return status.Kernel.Counters[name]
}

// serves starts a program in a workload and waits until it says that it is ready.
func (m *mesh) serves(w *netlab.Workload, path string, args ...string) {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: path, Args: args})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
}

// checkedService is a registration with an HTTP, a TCP and a gRPC check, every second, and a sidecar of Consul's making.
func checkedService(name, address, checkedAt string, port, healthPort int) map[string]any {
	return map[string]any{
		"Name": name, "ID": name + "-1", "Address": address, "Port": port,
		"Connect": map[string]any{"SidecarService": map[string]any{}},
		"Checks": []map[string]any{
			{"Name": "http", "HTTP": fmt.Sprintf("http://%s:%d/page", checkedAt, port), "Interval": "1s", "Timeout": "10s"},
			{"Name": "tcp", "TCP": fmt.Sprintf("%s:%d", checkedAt, port), "Interval": "1s", "Timeout": "10s"},
			{"Name": "grpc", "GRPC": fmt.Sprintf("%s:%d", checkedAt, healthPort), "Interval": "1s", "Timeout": "10s"},
		},
	}
}

func TestTheAgentsChecksPassWhereAStrangerIsRefused(t *testing.T) {
	m := newMesh(t)
	native, err := Native()
	m.must(err)
	pod, err := m.Nodes[0].Workload("pod")
	m.must(err)
	m.nginx(pod, fmt.Sprintf("%s:%d", pod.IPv4, port))
	m.serves(pod, native, "health", fmt.Sprintf("%s:%d", pod.IPv4, podHealth))
	m.serves(pod, programs.app, "serve", fmt.Sprintf("%s:%d", pod.IPv4, unchecked))
	m.Daemons[0].Enroll(pod, "pod")
	service := checkedService("pod", pod.IPv4.String(), pod.IPv4.String(), port, podHealth)
	service["Connect"] = Service("pod", "pod-1", pod.IPv4.String(), port)["Connect"]
	m.register(pod, service)

	host, err := m.Nodes[0].HostWorkload("host")
	m.must(err)
	m.nginx(host, fmt.Sprintf("127.0.0.1:%d", hostPort))
	m.serves(host, native, "health", fmt.Sprintf("127.0.0.1:%d", hostHealth))
	m.Daemons[0].Enroll(host, "host")
	m.register(host, checkedService("host", "", "127.0.0.1", hostPort, hostHealth)) // its sidecar is checked at 127.0.0.1, too
	m.start([]string{"pod", "host"}, nil)

	m.passing("pod-1", "http", "tcp", "grpc")
	m.passing("host-1", "http", "tcp", "grpc")
	m.passing("host-1-sidecar-proxy", "Connect Sidecar Listening", "Connect Sidecar Aliasing host-1")
	m.staysPassing("pod-1", "host-1", "host-1-sidecar-proxy")

	stranger, err := m.Nodes[0].HostWorkload("stranger")
	m.must(err)
	agent := &netlab.Workload{Name: "agent", Node: m.Nodes[0], Namespace: m.Nodes[0].Namespace, Cgroup: m.agents[0].cfg.Cgroup}
	for _, to := range []string{fmt.Sprintf("%s:%d", pod.IPv4, port), fmt.Sprintf("127.0.0.1:%d", hostPort)} {
		if ok, out := m.browses(stranger, to); ok || !strings.Contains(out, "onnect") {
			t.Errorf("a curl of the same host at %s: %s", to, out)
		}
		if ok, out := m.browses(agent, to); !ok {
			t.Errorf("a curl in the agent's cgroup at %s: %s", to, out)
		}
	}
	if ok, out := m.echoes(agent, fmt.Sprintf("%s:%d", pod.IPv4, unchecked)); ok {
		t.Errorf("the agent's cgroup reaches a port without a check: %s", out)
	}
	if text := m.metrics(0); counts(text, "nodeproxy_denied_total", map[string]string{"destination_service": "host", "reason": "handshake-failed"}) {
		t.Errorf("checks of the sidecar are counted as denials:\n%s", text)
	}
}

// passing waits until exactly these checks of a registration of the first node pass.
func (m *mesh) passing(id string, names ...string) {
	m.t.Helper()
	m.await("the checks of "+id+" pass", func() error {
		found := m.statuses(0, id)
		for _, name := range names {
			if found[name] != "passing" {
				return fmt.Errorf("%v", found)
			}
		}
		if len(found) != len(names) {
			return fmt.Errorf("%v", found)
		}
		return nil
	})
}

// staysPassing watches checks while probes are let through thirty more times.
func (m *mesh) staysPassing(ids ...string) {
	m.t.Helper()
	before := m.counter(0, "probed")
	m.await("thirty probes are let through", func() error {
		for _, id := range ids {
			for name, status := range m.statuses(0, id) {
				if status != "passing" {
					m.t.Fatalf("%s of %s does not stay passing: %s", name, id, status)
				}
			}
		}
		if n := m.counter(0, "probed") - before; n < 30 {
			return fmt.Errorf("%d were", n)
		}
		return nil
	})
}

func TestWhatTheAgentRunsInIsNoWorkload(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.start([]string{"web"}, nil)
	for _, cgroup := range []*netlab.Cgroup{m.agents[0].cfg.Cgroup, m.Nodes[0].Cgroup} {
		m.await("its cgroup is known", func() error {
			err := m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: cgroup.Path(), Service: "evil"})
			switch {
			case err == nil:
				m.t.Fatalf("%s is enrolled", cgroup.Path())
			case !strings.Contains(err.Error(), "daemon itself") && !strings.Contains(err.Error(), "Consul agent"):
				return err
			}
			return nil
		})
	}
	m.must(m.Daemons[0].Stop(m.ctx()))
	m.Daemons[0].Extra = fmt.Sprintf("inbound {\n  probers = [%q]\n}\n", m.Nodes[0].Cgroup.Path())
	m.must(m.Daemons[0].Start(m.ctx()))
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		for _, p := range s.Problems {
			if p.Kind == "prober" && strings.Contains(p.Text, m.Nodes[0].Cgroup.Path()) {
				return nil
			}
		}
		return fmt.Errorf("no problem says that a cgroup above the workloads is no prober: %v", s.Problems)
	})
	m.must(err)
	stranger, err := m.Nodes[0].HostWorkload("stranger")
	m.must(err)
	if out := m.dial(stranger, netip.AddrPortFrom(web.IPv4, port).String(), "peer"); reached(out) {
		t.Errorf("a process below what is refused as a prober's reaches web: %s", out)
	}
}

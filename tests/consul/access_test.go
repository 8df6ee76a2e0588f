package consul

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const noACLs = "acl {\n  enabled = false\n}\n"

// asker makes a workload of the first node that is enrolled with more in its block, and only calls.
func (m *mesh) asker(service, more string, onHost bool) *netlab.Workload {
	m.t.Helper()
	make := m.Nodes[0].Workload
	if onHost {
		make = m.Nodes[0].HostWorkload
	}
	w, err := make(service)
	m.must(err)
	m.Daemons[0].EnrollCgroup(meshlab.Enrolment{Cgroup: w.Cgroup, Service: service, More: more})
	m.must(m.agents[0].Register(m.ctx(), map[string]any{"Name": service, "ID": service + "-1", "Port": 9999}))
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", "127.0.0.1:9998"}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return w
}

// asks says whether a workload gets an answer of an agent.
func (m *mesh) asks(w *netlab.Workload, at string) bool {
	m.t.Helper()
	out := m.dial(w, "-half", at, "GET /v1/status/leader HTTP/1.0\r\n\r")
	if strings.Contains(out, "HTTP/1.0 200") {
		return true
	}
	if !strings.Contains(out, "ECONNREFUSED") {
		m.t.Errorf("%s is not refused at %s: %s", w.Name, at, out)
	}
	return false
}

func (m *mesh) access(want map[*netlab.Workload]bool, onHost *netlab.Workload) {
	m.t.Helper()
	for w, allowed := range want {
		for _, node := range m.Nodes {
			if at := netip.AddrPortFrom(node.IPv4, 8500).String(); m.asks(w, at) != allowed {
				m.t.Errorf("%s asks the agent at %s: %v, want %v", w.Name, at, !allowed, allowed)
			}
		}
	}
	if onHost != nil && m.asks(onHost, "127.0.0.1:8500") != want[onHost] {
		m.t.Errorf("%s asks the agent at 127.0.0.1: want %v", onHost.Name, want[onHost])
	}
}

func (m *mesh) accessIsCounted(service string) {
	m.t.Helper()
	counted := regexp.MustCompile(fmt.Sprintf(`nodeproxy_denied_total\{[^}]*reason="consul-access"[^}]*source_service="%s"[^}]*\} [1-9]`, service))
	m.must(m.until("the refusal is counted", func() error {
		if text := m.metrics(0); !counted.MatchString(text) {
			return fmt.Errorf("it is not in\n%s", text)
		}
		return nil
	}))
}

func TestWithoutACLsOnlyWhoMustAsksTheAgents(t *testing.T) {
	m := newMeshWith(t, Config{HCL: noACLs, Open: true})
	web, allowed, onHost := m.asker("web", "", false), m.asker("allowed", "    consul_access = \"allow\"\n", false), m.asker("host", "", true)
	native := m.asker("native", "", false)
	m.must(m.agents[0].Register(m.ctx(), map[string]any{
		"Name": "native", "ID": "native-1", "Address": native.IPv4.String(), "Port": 9000, "Connect": map[string]any{"Native": true},
	}))
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	m.start([]string{}, []string{})
	m.access(map[*netlab.Workload]bool{web: false, onHost: false, allowed: true, native: true, stranger: true}, onHost)
	m.accessIsCounted("web")
}

func TestWithACLsTheTokensDecideUnlessConfiguredOtherwise(t *testing.T) {
	m := newMeshWith(t, Config{Open: true})
	web, refused := m.asker("web", "", false), m.asker("refused", "    consul_access = \"refuse\"\n", false)
	m.start([]string{"web", "refused"}, []string{})
	m.access(map[*netlab.Workload]bool{web: true, refused: false}, nil)
	m.accessIsCounted("refused")
}

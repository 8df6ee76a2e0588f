package consul

import (
	"fmt"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

func refused(out string) bool { return !reached(out) }

func TestMutualTLSModeLetsPlaintextIntoAServiceWhereTheMeshAllowsIt(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	stranger, err := m.Nodes[1].Workload("stranger")
	m.must(err)
	m.start([]string{"web"}, []string{"api"})
	plaintext := fmt.Sprintf("%s:%d", api.IPv4, port)
	m.eventually("web reaches api", web, m.vip(0, "api"), reached)
	if out := m.dial(stranger, plaintext, "peer"); reached(out) {
		t.Errorf("a strict service answers plaintext: %s", out)
	}
	mode := func(mode string) {
		m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "tcp", "MutualTLSMode": mode}))
	}
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "mesh", "AllowEnablingPermissiveMutualTLS": true}))
	mode("permissive")
	m.eventually("plaintext is let in", stranger, plaintext, reached)
	m.eventually("web still reaches api", web, m.vip(0, "api"), reached)
	mode("strict")
	m.eventually("plaintext is refused again", stranger, plaintext, refused)
}

func TestMaxInboundConnectionsOfAServiceIsItsLimit(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "tcp", "MaxInboundConnections": 2}))
	m.start([]string{"web"}, []string{"api"})
	vip := m.vip(0, "api")
	m.eventually("web reaches api", web, vip, reached)

	var held []*netlab.Process
	for range 2 {
		p, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"dial", vip, "hold"}})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "held"))
		held = append(held, p)
	}
	for range 3 {
		if out := m.dial(web, vip, "peer"); reached(out) {
			t.Errorf("a third connection is let in: %s", out)
		}
	}
	if text := m.metrics(1); !strings.Contains(text, fmt.Sprintf("reason=%q", catalog.ReasonCapacity)) {
		t.Errorf("no refusal is counted for the reason capacity:\n%s", text)
	}
	held[0].Kill()
	m.eventually("there is a place again", web, vip, reached)
}

// TestPassiveHealthCheckOfACallerEjectsAfterItsFailures has an instance whose sidecar is none: its port is a plain listener that
// counts who comes.
func TestPassiveHealthCheckOfACallerEjectsAfterItsFailures(t *testing.T) {
	const failures, broken = 3, 20080
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	bad, err := m.Nodes[1].Workload("bad")
	m.must(err)
	listener, err := bad.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf(":%d", broken)}})
	m.must(err)
	m.must(listener.WaitOutput(m.ctx(), "ready"))
	s := reg("api", bad, port, broken)
	s["ID"] = "api-2"
	sidecar := s["Connect"].(map[string]any)["SidecarService"].(map[string]any)
	sidecar["Checks"] = []map[string]any{{"Name": "set by the test", "TTL": "1h", "Status": "passing"}}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "web", "Protocol": "tcp", "UpstreamConfig": map[string]any{
		"Defaults": map[string]any{"PassiveHealthCheck": map[string]any{"MaxFailures": failures, "Interval": "1s", "BaseEjectionTime": "1h", "MaxEjectionPercent": 100}}}}))
	m.Daemons[0].Plain = true // a tunnel that is not taken up is dialled twice
	m.start([]string{"web"}, []string{"api"})
	vip := m.vip(0, "api")
	m.eventually("web reaches api", web, vip, reached) // it has read how web calls
	m.must(m.agents[1].Register(m.ctx(), s))
	m.must(m.Daemons[0].AwaitInstances(m.ctx(), "api", 2))
	came := func() int { return strings.Count(listener.Output(), "accepted") }
	for i := 0; came() < failures; i++ {
		if out := m.dial(web, vip, "peer"); !reached(out) {
			t.Fatalf("with one instance left a connection fails: %s", out)
		}
		if i == 100 {
			t.Fatalf("%d of 100 connections tried the instance first", came())
		}
	}
	for range 20 {
		if out := m.dial(web, vip, "peer"); !reached(out) {
			t.Fatalf("after the ejection a connection fails: %s", out)
		}
	}
	if n := came(); n != failures {
		t.Errorf("the instance was tried %d times, and is ejected after %d failures:\n%s", n, failures, listener.Output())
	}
}

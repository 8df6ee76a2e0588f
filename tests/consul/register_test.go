package consul

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/tests/netlab"
)

// registration is a service as an agent shows it.
type registration struct {
	Kind, ID, Service, Address string
	Port                       int
	Tags                       []string
	Meta                       map[string]string
	Proxy                      *struct {
		DestinationServiceID, LocalServiceAddress string
		LocalServicePort                          int
	}
}

func (m *mesh) registrations(node int) map[string]registration {
	m.t.Helper()
	all := make(map[string]registration)
	m.must(m.agents[node].Do(m.ctx(), http.MethodGet, "/v1/agent/services", nil, &all))
	return all
}

// awaitRegistrations waits until exactly these are registered with a node's agent.
func (m *mesh) awaitRegistrations(node int, ids ...string) map[string]registration {
	m.t.Helper()
	var all map[string]registration
	slices.Sort(ids)
	m.must(m.agents[node].Await(m.ctx(), fmt.Sprintf("has %s", ids), func() error {
		all = m.registrations(node)
		if got := slices.Sorted(maps.Keys(all)); !slices.Equal(got, ids) {
			return fmt.Errorf("it has %s", got)
		}
		return nil
	}))
	return all
}

// awaitChecks waits until all checks of a registration pass.
func (m *mesh) awaitChecks(node int, id string) {
	m.t.Helper()
	m.must(m.agents[node].Await(m.ctx(), "passes the checks of "+id, func() error {
		var checks map[string]struct{ ServiceID, Status, Name string }
		if err := m.agents[node].Do(m.ctx(), http.MethodGet, "/v1/agent/checks", nil, &checks); err != nil {
			return err
		}
		n := 0
		for _, c := range checks {
			if c.ServiceID != id {
				continue
			}
			if n++; c.Status != "passing" {
				return fmt.Errorf("%s is %s", c.Name, c.Status)
			}
		}
		if n == 0 {
			return fmt.Errorf("it has none")
		}
		return nil
	}))
}

func TestAServiceWithoutASidecarIsRegistered(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	p, err := api.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf("%s:%d", api.IPv4, port)}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	plain := map[string]any{"Name": "api", "ID": "api-1", "Address": api.IPv4.String(), "Port": port, "Tags": []string{"blue"}, "Meta": map[string]string{"version": "2"}}
	m.must(m.agents[1].Register(m.ctx(), plain))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"api"})

	const sidecar = "api-1-sidecar-proxy"
	first := m.awaitRegistrations(1, "api-1", sidecar, "node-proxy")[sidecar]
	if first.Service != "api-sidecar-proxy" || first.Address != api.IPv4.String() || first.Port < 21500 || first.Port > 21999 ||
		!slices.Equal(first.Tags, []string{"blue"}) || !maps.Equal(first.Meta, map[string]string{"version": "2", "managed-by": "nodeproxy"}) ||
		first.Proxy.DestinationServiceID != "api-1" || first.Proxy.LocalServicePort != port {
		t.Errorf("registered: %+v", first)
	}
	m.awaitChecks(1, sidecar)
	m.awaitChecks(1, "node-proxy")
	m.awaitRegistrations(0, "web-1", "web-1-sidecar-proxy", "node-proxy") // web has a sidecar of the operator's
	vip := m.vip(0, "api")
	m.eventually("web reaches api", web, vip, reached)

	m.must(m.Daemons[1].Stop(m.ctx()))
	m.must(m.Daemons[1].Start(m.ctx()))
	_, err = m.Daemons[1].AwaitProtected(m.ctx())
	m.must(err)
	if again := m.awaitRegistrations(1, "api-1", sidecar, "node-proxy")[sidecar]; again.Port != first.Port {
		t.Errorf("after a restart it has port %d, and had %d", again.Port, first.Port)
	}
	m.eventually("web reaches api after a restart of its daemon", web, vip, reached)

	m.must(m.agents[1].Deregister(m.ctx(), "api-1"))
	m.awaitRegistrations(1, "node-proxy")

	m.must(m.agents[1].Register(m.ctx(), plain))
	if again := m.awaitRegistrations(1, "api-1", sidecar, "node-proxy")[sidecar]; again.Port != first.Port {
		t.Errorf("registered again it has port %d, and had %d", again.Port, first.Port)
	}

	own := maps.Clone(plain)
	own["Connect"] = map[string]any{"SidecarService": map[string]any{"Port": 21234, "Checks": []map[string]any{{"Name": "application", "AliasService": "api-1"}}}}
	m.must(m.agents[1].Register(m.ctx(), own))
	if operators := m.awaitRegistrations(1, "api-1", sidecar, "node-proxy")[sidecar]; operators.Port != 21234 || operators.Meta["managed-by"] != "" {
		t.Errorf("the operator's sidecar was replaced: %+v", operators)
	}

	m.must(m.agents[1].Deregister(m.ctx(), "api-1")) // and its sidecar with it
	native := maps.Clone(plain)
	native["Connect"] = map[string]any{"Native": true}
	m.must(m.agents[1].Register(m.ctx(), native))
	m.awaitRegistrations(1, "api-1", "node-proxy")

	m.must(m.agents[1].Register(m.ctx(), plain))
	m.awaitRegistrations(1, "api-1", sidecar, "node-proxy")
	m.must(m.Daemons[1].Stop(m.ctx()))
	out, err := m.Run(m.ctx(), netlab.Command{
		Path: programs.nodeproxy, Args: []string{"cleanup", "--node", "node-2", "--pins", m.Daemons[1].Pins, "--config", m.Daemons[1].ConfigPath()},
		Namespace: m.Nodes[1].Namespace,
	})
	m.must(err)
	if !strings.Contains(out, "removed registration "+sidecar) {
		t.Errorf("cleanup says %s", out)
	}
	m.awaitRegistrations(1, "api-1")
}

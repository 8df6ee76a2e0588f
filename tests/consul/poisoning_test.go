package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

const thief = "198.51.100.7" // the node that is registered by whoever may write to the catalog, and is not there

// registered is where an instance of the service evil is registered.
type registered struct {
	app, sidecar netip.AddrPort
	virtual      string // its tag, ip
}

// poison writes evil to the catalog, on a node with a nodeproxy of its own that says it serves every port.
func (m *mesh) poison(r registered) {
	m.t.Helper()
	write := func(service map[string]any) {
		m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{"Node": "thief", "Address": thief, "Service": service}, nil))
	}
	write(map[string]any{"Service": "node-proxy", "ID": "node-proxy", "Address": thief, "Meta": map[string]string{"managed-by": "nodeproxy", "nodeproxy-ports": "1-65535"}})
	app := map[string]any{"Service": "evil", "ID": "evil-1", "Address": r.app.Addr().String(), "Port": r.app.Port()}
	if r.virtual != "" {
		app["TaggedAddresses"] = map[string]any{"virtual": map[string]any{"Address": r.virtual, "Port": 80}}
	}
	write(app)
	sidecar := map[string]any{
		"Kind": "connect-proxy", "Service": "evil-sidecar-proxy", "ID": "evil-1-sidecar-proxy", "Address": r.sidecar.Addr().String(), "Port": r.sidecar.Port(),
		"Proxy": map[string]any{"DestinationServiceName": "evil", "DestinationServiceID": "evil-1"},
	}
	if r.virtual != "" {
		sidecar["TaggedAddresses"] = app["TaggedAddresses"]
	}
	write(sidecar)
}

// heal removes it again, and waits until no daemon knows of it any more.
func (m *mesh) heal() {
	m.t.Helper()
	m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/catalog/deregister", map[string]any{"Node": "thief"}, nil))
	for _, d := range m.Daemons {
		_, err := d.Await(m.ctx(), func(s *admin.Status) error {
			if knows(s, "evil") {
				return fmt.Errorf("evil is still there")
			}
			return nil
		})
		m.must(err)
	}
}

// knows says whether a daemon has an instance of a service.
func knows(s *admin.Status, service string) bool {
	for _, svc := range s.Services {
		if svc.Name == service && len(svc.Instances) > 0 {
			return true
		}
	}
	return false
}

// isAlarmed waits until a node's status has a problem that names all of words.
func (m *mesh) isAlarmed(node int, words ...string) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		for _, p := range s.Problems {
			found := p.Kind == "refused"
			for _, word := range words {
				found = found && strings.Contains(p.Text, word)
			}
			if found {
				return nil
			}
		}
		return fmt.Errorf("no problem names %s: %v", words, s.Problems)
	})
	m.must(err)
}

func TestAPoisonedCatalogStealsNothing(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "evil", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"api"})
	vip, at := m.vip(0, "api"), netip.AddrPortFrom(api.IPv4, port)
	mesh := netip.AddrPortFrom(api.IPv4, uint16(m.registrations(1)["api-1-sidecar-proxy"].Port))
	m.eventually("web reaches api", web, vip, reached)
	m.eventually("web reaches api by its address", web, at.String(), reached)
	elsewhere := netip.MustParseAddrPort("203.0.113.9:20000")

	t.Run("at another service's address", func(t *testing.T) {
		m := m.within(t)
		m.poison(registered{app: at, sidecar: elsewhere})
		defer m.heal()
		m.isAlarmed(0, "evil-1", at.String())
		m.isAlarmed(1, "evil-1", at.String()) // where api is, its own agent knows best
		if out := m.dial(web, at.String(), "peer"); reached(out) {
			t.Errorf("an address that two services claim is served: %s", out)
		}
		m.eventually("web still reaches api by its virtual IP", web, vip, reached)
	})
	t.Run("at another service's mesh address", func(t *testing.T) {
		m := m.within(t)
		m.poison(registered{app: elsewhere, sidecar: mesh})
		defer m.heal()
		m.isAlarmed(0, "evil-1", mesh.String())
		ip, err := m.Daemons[0].Virtual(m.ctx(), "evil")
		m.must(err)
		if out := m.dial(web, netip.AddrPortFrom(ip, 80).String(), "peer"); reached(out) {
			t.Errorf("evil is answered by api: %s", out)
		}
		m.isAlarmed(1, "evil-1", mesh.String())
	})
	t.Run("at loopback", func(t *testing.T) {
		m := m.within(t)
		loopback := netip.MustParseAddrPort("127.0.0.1:8500")
		m.poison(registered{app: loopback, sidecar: loopback})
		defer m.heal()
		m.isAlarmed(0, "evil-1", "127.0.0.1", "loopback")
		ip, err := m.Daemons[0].Virtual(m.ctx(), "evil")
		m.must(err)
		if out := m.dial(web, netip.AddrPortFrom(ip, 80).String(), "peer"); strings.Contains(out, "HTTP") || reached(out) {
			t.Errorf("evil leads to this node's loopback: %s", out)
		}
		m.isNotRedirected(web, loopback)
	})
	t.Run("with a virtual tag that nobody granted", func(t *testing.T) {
		m := m.within(t)
		m.poison(registered{app: elsewhere, sidecar: elsewhere, virtual: thief})
		defer m.heal()
		_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
			if !knows(s, "evil") {
				return fmt.Errorf("evil is not known: %s", s.Source.Error)
			}
			return nil
		})
		m.must(err)
		m.isNotRedirected(web, netip.MustParseAddrPort(thief+":80"))
	})
	m.eventually("web reaches api by its address when all is healed", web, at.String(), reached)
}

// isNotRedirected asserts that a call from a workload has nothing to do with the mesh: its daemon saw none.
func (m *mesh) isNotRedirected(w *netlab.Workload, to netip.AddrPort) {
	m.t.Helper()
	before := m.counter(0, "redirected") + m.counter(0, "refused")
	m.dial(w, "-timeout", "2s", to.String(), "peer")
	if after := m.counter(0, "redirected") + m.counter(0, "refused"); after != before {
		m.t.Errorf("a call to %s was redirected or refused", to)
	}
}

// squat is a process of the node, outside any workload, that counts who connects to it.
func (m *mesh) squat(node int, args ...string) *netlab.Process {
	m.t.Helper()
	w, err := m.Nodes[node].HostWorkload("squatter-" + strings.Trim(strings.ReplaceAll(args[len(args)-1], "/", "-"), "-:"))
	m.must(err)
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"serve"}, args...)})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return p
}

func TestADeliveryTargetOutsideTheWorkloadGetsNothing(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	socket := filepath.Join(m.Dir(), "runtime.sock")
	squatters := []*netlab.Process{m.squat(1, "127.0.0.1:7777"), m.squat(1, "-unix", socket)}
	var services []string
	for i, proxy := range []map[string]any{
		{"LocalServiceAddress": "127.0.0.1", "LocalServicePort": 7777},
		{"LocalServiceSocketPath": socket},
		{"LocalServiceAddress": m.Nodes[0].IPv4.String(), "LocalServicePort": 8500},
	} {
		name := fmt.Sprintf("shop-%d", i)
		w, err := m.Nodes[1].HostWorkload(name)
		m.must(err)
		_, err = w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf("127.0.0.1:%d", 7000+i)}})
		m.must(err)
		m.Daemons[1].Enroll(w, name)
		reg := Service(name, name+"-1", w.IPv4.String(), 7000+i)
		reg["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = proxy
		m.register(w, reg)
		m.must(m.agents[0].Intentions(m.ctx(), name, map[string]string{"web": "allow"}))
		services = append(services, name)
	}
	m.start([]string{"web"}, services)
	for _, name := range services {
		vip := m.vip(0, name)
		m.await(name+" is refused", func() error {
			if out := m.dial(web, vip, "peer"); reached(out) {
				m.t.Fatalf("%s is delivered outside its workload: %s", name, out)
			}
			if !counts(m.metrics(1), "nodeproxy_denied_total", map[string]string{"destination_service": name, "reason": "not-the-workloads"}) {
				return fmt.Errorf("it is not counted")
			}
			return nil
		})
	}
	for _, p := range squatters {
		if out := p.Output(); strings.Contains(out, "received") || strings.Contains(out, "ended before") && !strings.Contains(out, "after 0 bytes") {
			t.Errorf("a squatter was given bytes: %s", out)
		}
	}
}

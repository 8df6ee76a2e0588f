package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
)

// newPeers is two clusters of a node each, with mesh gateways gate-1 and gate-2: the first calls the second "far", and is
// called "near" by it. Both allow whatever no intention denies.
func newPeers(t *testing.T) *mesh {
	t.Helper()
	m := newClusters(t, func(m *mesh, i int) Config {
		dir := filepath.Join(m.Nodes[i].Dir, "agent.d") // one file can have only one block "addresses"
		m.must(os.MkdirAll(dir, 0o700))
		m.must(os.WriteFile(filepath.Join(dir, "peering.hcl"), []byte("addresses {\n  grpc_tls = \"0.0.0.0\"\n}\npeering {\n  enabled = true\n}\n"), 0o600))
		return Config{HCL: fmt.Sprintf("datacenter = \"dc%d\"\nconnect {\n  enabled = true\n}\n", i+1), Definitions: dir}
	})
	var made struct{ PeeringToken string }
	m.must(m.agents[1].Do(m.ctx(), http.MethodPost, "/v1/peering/token", map[string]any{"PeerName": "near"}, &made))
	m.must(m.agents[0].Do(m.ctx(), http.MethodPost, "/v1/peering/establish", map[string]any{"PeerName": "far", "PeeringToken": made.PeeringToken}, nil))
	return m
}

func TestServicesOfAPeerAreCalledAndItsServicesCall(t *testing.T) {
	m := newPeers(t)
	const near, far = 8081, 8082
	web, batch, legacy := m.place(0, "web"), m.place(0, "batch"), m.foreign(0, "legacy")
	m.instance(0, "api", "api-near", near, nil)
	m.instance(1, "api", "api-far", far, nil)
	gate1, gate2 := m.gateway(0, "mesh", "gate-1"), m.gateway(1, "mesh", "gate-2")
	const local = "127.0.0.1:9191"
	upstream := func(service string, at netip.Addr, mode string) {
		s := Service(service, service+"-1", at.String(), port)
		s["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": []map[string]any{
			{"DestinationName": "api", "DestinationPeer": "far", "LocalBindPort": 9191, "MeshGateway": map[string]any{"Mode": mode}},
		}}
		m.must(m.agents[0].Register(m.ctx(), s))
	}
	upstream("web", web.IPv4, "local")
	upstream("legacy", legacy.IPv4, "")
	m.envoy(legacy, "legacy-1", 19000)
	export := func(names ...string) {
		services := []map[string]any{}
		for _, name := range names {
			services = append(services, map[string]any{"Name": name, "Consumers": []map[string]any{{"Peer": "near"}}})
		}
		m.must(m.agents[1].Write(m.ctx(), map[string]any{"Kind": "exported-services", "Name": "default", "Services": services}))
	}
	export("api")
	intend := func(actions map[string]string) {
		var sources []map[string]any
		for name, action := range actions {
			sources = append(sources, map[string]any{"Name": name, "Peer": "near", "Action": action})
		}
		m.must(m.agents[1].Write(m.ctx(), map[string]any{"Kind": "service-intentions", "Name": "api", "Sources": sources}))
	}
	intend(map[string]string{"web": "allow", "legacy": "allow", "batch": "deny"})
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "abroad", "Redirect": map[string]any{"Service": "api", "Peer": "far"}}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api",
		"Failover": map[string]any{"*": map[string]any{"Targets": []map[string]any{{"Peer": "far"}}}}}))
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	told := m.identities(0)
	abroad, api := m.virtual(0, "abroad"), m.virtual(0, "api")
	m.uses(0, "abroad", "api.external.far")

	m.eventually("web reaches the peer's service", web, abroad, at(far))
	out := m.dial(web, abroad, "peer")
	status, err := m.Daemons[1].Admin().Status(m.ctx())
	m.must(err)
	identity := ""
	for _, c := range status.Certificates {
		identity = c.Identity // there is only api's
	}
	if e := told(from(out)); !at(far)(out) || e.Destination.Identity != identity || e.Destination.Gateway == "" || e.Path != admin.PathMTLS ||
		e.Destination.Peer != netip.AddrPortFrom(gate2.IPv4, wanPort).String() {
		t.Errorf("%s was told of as %s %+v, and the service is %s", out, e.Path, e.Destination, identity)
	}
	m.eventually("web reaches it through the gateway here", web, local, at(far))
	out = m.dial(web, local, "peer")
	if e := told(from(out)); !at(far)(out) || e.Destination.Gateway != "gate-1-1" || e.Destination.Peer != netip.AddrPortFrom(gate1.IPv4, gatewayPort).String() {
		t.Errorf("%s was told of as %+v", out, e.Destination)
	}
	m.eventually("an Envoy of another cluster reaches what nodeproxy serves", legacy, local, at(far))
	if out := m.dial(batch, abroad, "peer"); reached(out) {
		t.Errorf("batch is denied on the peer's side, and reaches it: %s", out)
	}
	m.eventually("web reaches what is near", web, api, at(near))
	m.mark(0, "api-near", "fail")
	m.uses(0, "api", "api.external.far")
	m.eventually("web reaches the peer after failover", web, api, at(far))

	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "abroad")
	m.must(err)
	if !explained.Allowed || !strings.Contains(explained.Why, `peer "far"`) || explained.Gateway == "" || len(explained.Missing) != 0 {
		t.Errorf("explained as %+v", explained)
	}
	intend(map[string]string{"web": "deny", "legacy": "allow"})
	m.eventually("the peer's intentions count at once", web, abroad, func(out string) bool { return !reached(out) })
	export("nothing")
	m.targets(0, "abroad", func(targets []admin.Target) error {
		if len(targets) != 1 || !strings.Contains(targets[0].Why, `exports no instance of "api"`) {
			return fmt.Errorf("the targets are %+v", targets)
		}
		return nil
	})
}

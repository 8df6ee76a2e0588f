package consul

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

func TestOtherDatacentersAreReachedThroughMeshGateways(t *testing.T) {
	m := newDatacenters(t)
	const near, far = 8081, 8082
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.instance(0, "api", "api-near", near, nil)
	m.instance(1, "api", "api-far", far, nil)
	gate1, gate2 := m.gateway(0, "mesh", "gate-1"), m.gateway(1, "mesh", "gate-2")
	legacy := m.foreign(0, "legacy")
	const local = "127.0.0.1:9191"
	upstream := func(service, mode string) map[string]any {
		s := Service(service, service+"-1", web.IPv4.String(), port)
		s["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": []map[string]any{
			{"DestinationName": "api", "Datacenter": "dc2", "LocalBindPort": 9191, "MeshGateway": map[string]any{"Mode": mode}},
		}}
		return s
	}
	m.must(m.agents[0].Register(m.ctx(), upstream("web", "none")))
	ofLegacy := upstream("legacy", "local")
	ofLegacy["Address"] = legacy.IPv4.String()
	m.must(m.agents[0].Register(m.ctx(), ofLegacy))
	m.envoy(legacy, "legacy-1", 19000)
	write := func(entry map[string]any) {
		t.Helper()
		m.must(m.agents[0].Write(m.ctx(), entry))
	}
	mode := func(mode string) map[string]any { return map[string]any{"Mode": mode} }
	write(map[string]any{"Kind": "proxy-defaults", "Name": "global", "MeshGateway": mode("local")})
	write(map[string]any{"Kind": "service-resolver", "Name": "abroad", "Redirect": map[string]any{"Service": "api", "Datacenter": "dc2"}})
	write(map[string]any{"Kind": "service-resolver", "Name": "api", "Failover": map[string]any{"*": map[string]any{"Datacenters": []string{"dc2"}}}})
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"batch": "deny"}))
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	told := m.identities(0)
	// goes repeats a call until it is answered by way of a gateway, "" for none, at an address.
	goes := func(to, gateway string, at1 netip.AddrPort) {
		t.Helper()
		var last string
		for ctx := m.ctx(); ctx.Err() == nil; {
			out := m.dial(web, to, "peer")
			if !at(far)(out) {
				last = out
				continue
			}
			e := told(from(out))
			last = fmt.Sprintf("%s: %+v", e.Path, e.Destination)
			if with := e.Destination; with.Gateway != gateway || gateway != "" && with.Peer != at1.String() {
				continue
			} else if e.Path != admin.PathMTLS && gateway != "" || !strings.HasSuffix(with.Identity, "/dc/dc2/svc/api") || (with.Instance == "") != (gateway != "") {
				t.Errorf("to %s: %s", to, last)
			}
			return
		}
		t.Errorf("web does not reach %s through gateway %q: %s", to, gateway, last)
	}
	abroad, api := m.virtual(0, "abroad"), m.virtual(0, "api")

	goes(abroad, "gate-1-1", netip.AddrPortFrom(gate1.IPv4, gatewayPort))
	goes(local, "", netip.AddrPort{})
	if out := m.dial(batch, abroad, "peer"); reached(out) {
		t.Errorf("batch may not call api, and does through gateways: %s", out)
	}
	m.eventually("an Envoy of dc1 reaches what nodeproxy serves in dc2", legacy, local, at(far))
	m.eventually("web reaches what is near", web, api, at(near))
	m.mark(0, "api-near", "fail")
	m.uses(0, "api", "api.dc2")
	goes(api, "gate-1-1", netip.AddrPortFrom(gate1.IPv4, gatewayPort))

	write(map[string]any{"Kind": "service-defaults", "Name": "web", "MeshGateway": mode("remote")})
	goes(abroad, "gate-2-1", netip.AddrPortFrom(gate2.IPv4, wanPort))
	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "abroad")
	m.must(err)
	if x := explained; x.Gateway != "gate-2-1" || len(x.Targets) != 1 || x.Targets[0].Gateway != "remote" || len(x.Missing) != 0 {
		t.Errorf("explained as %+v", x)
	}

	m.mark(1, "api-far", "fail")
	m.eventually("nobody is there behind the gateway", web, abroad, func(out string) bool { return !reached(out) })
	explained, err = m.Daemons[0].Admin().Explain(m.ctx(), "web", "abroad")
	m.must(err)
	if all := fmt.Sprint(explained.Missing); !strings.Contains(all, "api.dc2 has no healthy instance") {
		t.Errorf("explained as %s", all)
	}
}

func TestTerminatingGatewaysAreDestinationsAndOthersAreClients(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	outside, err := m.Nodes[0].Workload("outside")
	m.must(err)
	ports := map[string]int{"old-db": 8081, "old-cache": 8082}
	legacy, err := m.Nodes[1].Workload("legacy")
	m.must(err)
	for name, port := range ports {
		m.serve(legacy, fmt.Sprintf(":%d", port))
		m.must(m.agents[1].Register(m.ctx(), map[string]any{"Name": name, "ID": name + "-1", "Address": legacy.IPv4.String(), "Port": port}))
	}
	write := func(entry map[string]any) {
		t.Helper()
		m.must(m.agents[0].Write(m.ctx(), entry))
	}
	write(map[string]any{"Kind": "terminating-gateway", "Name": "egress", "Services": []map[string]any{{"Name": "old-db"}, {"Name": "old-cache"}}})
	write(map[string]any{"Kind": "ingress-gateway", "Name": "front", "Listeners": []map[string]any{
		{"Port": 9000, "Protocol": "tcp", "Services": []map[string]any{{"Name": "api"}}}}})
	write(map[string]any{"Kind": "api-gateway", "Name": "door", "Listeners": []map[string]any{{"Name": "in", "Port": 9000, "Protocol": "tcp"}}})
	write(map[string]any{"Kind": "tcp-route", "Name": "door-api", "Services": []map[string]any{{"Name": "api"}},
		"Parents": []map[string]any{{"Kind": "api-gateway", "Name": "door", "SectionName": "in"}}})
	for name := range ports {
		m.must(m.agents[0].Intentions(m.ctx(), name, map[string]string{"web": "allow"}))
	}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"front": "allow", "door": "allow"}))
	egress, front, door := m.gateway(0, "terminating", "egress"), m.gateway(0, "ingress", "front"), m.gateway(1, "api", "door")
	m.start([]string{"web", "batch"}, []string{"api"})
	told := m.identities(0)

	for name, port := range ports {
		vip := m.vip(0, name)
		m.eventually("the gateway leads to "+name, web, vip, at(port))
		out := m.dial(web, vip, "peer")
		e := told(from(out))
		if with := e.Destination; !at(port)(out) || with.Gateway != "egress-1" || with.Peer != netip.AddrPortFrom(egress.IPv4, gatewayPort).String() || !strings.HasSuffix(with.Identity, "/svc/"+name) {
			t.Errorf("%s is told of as %+v", out, with)
		}
		if out := m.dial(batch, vip, "peer"); reached(out) {
			t.Errorf("batch may not call %s, and does: %s", name, out)
		}
	}
	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "old-db")
	m.must(err)
	if explained.Gateway != "egress-1" || len(explained.Missing) != 0 {
		t.Errorf("explained as %+v", explained)
	}

	for name, w := range map[string]*netlab.Workload{"front": front, "door": door} {
		m.eventually(name+" calls api", outside, netip.AddrPortFrom(w.IPv4, 9000).String(), at(port))
	}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"front": "deny", "door": "allow"}))
	m.eventually("front is denied", outside, netip.AddrPortFrom(front.IPv4, 9000).String(), func(out string) bool { return !reached(out) })
	if out := m.dial(outside, netip.AddrPortFrom(door.IPv4, 9000).String(), "peer"); !at(port)(out) {
		t.Errorf("door may call api: %s", out)
	}
}

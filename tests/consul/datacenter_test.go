package consul

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
)

// newDatacenters is two nodes, each of a datacenter of its own, joined over the WAN, without ACLs: whatever no intention
// denies is allowed.
func newDatacenters(t *testing.T) *mesh {
	t.Helper()
	return newClusters(t, func(m *mesh, i int) Config {
		hcl := fmt.Sprintf("datacenter = \"dc%d\"\nprimary_datacenter = \"dc1\"\nconnect {\n  enabled = true\n}\n", i+1)
		if i > 0 {
			hcl += fmt.Sprintf("retry_join_wan = [%q]\nretry_interval_wan = \"1s\"\n", m.Nodes[0].IPv4)
		}
		return Config{HCL: hcl}
	})
}

// newClusters is two nodes, each with a server of its own that is configured as more says.
func newClusters(t *testing.T, more func(m *mesh, i int) Config) *mesh {
	t.Helper()
	require(t)
	t.Parallel()
	lab, err := meshlab.New(programs.nodeproxy)
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Mesh: lab, t: t}
	for _, d := range m.Daemons {
		d.Env = []string{"GORACE=halt_on_error=0 exitcode=66"}
		d.Source = "source \"consul\" {}\n"
	}
	t.Cleanup(m.finish)
	for i, node := range m.Nodes {
		cgroup, err := node.Cgroup.Child("consul")
		m.must(err)
		cfg := more(m, i)
		cfg.Node, cfg.Namespace, cfg.Cgroup, cfg.Address = node.Name, node.Namespace, cgroup, node.IPv4.String()
		m.agents[i], err = Start(m.ctx(), m.Lab, cfg)
		m.must(err)
	}
	return m
}

func TestOtherDatacentersAreReachedDirectly(t *testing.T) {
	m := newDatacenters(t)
	const near, far = 8081, 8082
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.instance(0, "api", "api-near", near, nil)
	m.instance(1, "api", "api-far", far, nil)
	const local = "127.0.0.1:9191"
	s := Service("web", "web-1", web.IPv4.String(), port)
	s["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": []map[string]any{
		{"DestinationName": "api", "Datacenter": "dc2", "LocalBindPort": 9191},
	}}
	m.must(m.agents[0].Register(m.ctx(), s))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"batch": "deny"}))
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "abroad", "Redirect": map[string]any{"Service": "api", "Datacenter": "dc2"}}))
	failover := func(mode string) {
		t.Helper()
		m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "api", "MeshGateway": map[string]any{"Mode": mode}}))
		m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "Failover": map[string]any{"*": map[string]any{"Datacenters": []string{"dc2"}}}}))
	}
	failover("none")
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	told := m.identities(0)

	abroad, api := m.virtual(0, "abroad"), m.virtual(0, "api")
	m.eventually("web is redirected to the other datacenter", web, abroad, at(far))
	m.eventually("web reaches the other datacenter by its upstream", web, local, at(far))
	m.eventually("batch is denied", batch, abroad, func(out string) bool { return !reached(out) })
	m.eventually("web reaches what is near", web, api, at(near))
	m.mark(0, "api-near", "fail")
	m.uses(0, "api", "api.dc2")
	m.eventually("web reaches the other datacenter after failover", web, api, at(far))
	out := m.dial(web, api, "peer")
	if with := told(from(out)).Destination; !at(far)(out) || !strings.HasSuffix(with.Identity, "/dc/dc2/svc/api") || with.Target != "api.dc2" {
		t.Errorf("%s was told of as %+v", out, with)
	}

	failover("local")
	m.targets(0, "api", func(targets []admin.Target) error {
		if len(targets) != 2 || !strings.Contains(targets[1].Why, "mesh gateways") {
			return fmt.Errorf("the targets are %+v", targets)
		}
		return nil
	})
	m.eventually("what is behind a gateway is not reached", web, api, func(out string) bool { return !reached(out) })
	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", netip.MustParseAddrPort(api).Addr().String())
	m.must(err)
	if all := fmt.Sprint(explained.Missing); !strings.Contains(all, "mesh gateways") {
		t.Errorf("explained as %s", all)
	}
	m.mark(0, "api-near", "pass")
	m.eventually("web is back at what is near", web, api, at(near))
}

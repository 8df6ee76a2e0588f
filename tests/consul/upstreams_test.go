package consul

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// hosted makes a workload in the node's own network namespace.
func (m *mesh) hosted(node int, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].HostWorkload(service)
	m.must(err)
	m.Daemons[node].Enroll(w, service)
	return w
}

// idle keeps a process in w.
func (m *mesh) idle(w *netlab.Workload) {
	m.t.Helper()
	_, err := w.Start(netlab.Command{Path: "/bin/sleep", Args: []string{"3600"}})
	m.must(err)
}

func TestExplicitUpstreamsAreTheWorkloadsOwn(t *testing.T) {
	m := newMesh(t)
	const api, spare = 8081, 8082
	m.instance(1, "api", "api-1", api, nil)
	m.instance(1, "spare", "spare-1", spare, nil)
	web, batch := m.hosted(0, "web"), m.hosted(0, "batch") // they share a loopback
	m.serve(web, fmt.Sprintf("%s:%d", web.IPv4, port))
	m.idle(batch)
	const local, meta, query = "127.0.0.1:9191", "127.0.0.1:9192", "127.0.0.1:9193"
	holder, err := m.Start(netlab.Command{Path: programs.app, Args: []string{"serve", local}, Namespace: m.Nodes[0].Namespace}) // as an Envoy does
	m.must(err)
	m.must(holder.WaitOutput(m.ctx(), "ready"))

	register := func(meta string, upstreams ...map[string]any) {
		t.Helper()
		s := Service("web", "web-1", web.IPv4.String(), port)
		s["Meta"] = map[string]string{"nodeproxy-upstreams": meta}
		s["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": upstreams}
		m.must(m.agents[0].Register(m.ctx(), s))
	}
	toAPI := map[string]any{"DestinationName": "api", "LocalBindPort": 9191}
	socket := filepath.Join(m.Nodes[0].Dir, "spare.sock")
	register("spare:9192, spare:9191, spare:"+socket, toAPI, // the first of two at one port counts
		map[string]any{"DestinationName": "nearest", "DestinationType": "prepared_query", "LocalBindPort": 9193},
		map[string]any{"DestinationName": "spare", "LocalBindSocketPath": "run/spare.sock"})
	m.must(m.agents[0].Register(m.ctx(), Service("batch", "batch-1", web.IPv4.String(), port+1)))
	m.must(m.agents[0].Do(m.ctx(), http.MethodPost, "/v1/query", map[string]any{"Name": "nearest", "Service": map[string]any{"Service": "spare"}}, nil))
	n := 2
	m.must(m.agents[0].Write(m.ctx(), map[string]any{"Kind": "service-defaults", "Name": "web",
		"UpstreamConfig": map[string]any{"Overrides": []map[string]any{{"Name": "api", "Limits": map[string]any{"MaxConnections": n}}}}}))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "spare", map[string]string{"web": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api", "spare"})

	m.eventually("web reaches api by its upstream", web, local, at(api))
	m.eventually("web reaches spare by meta", web, meta, at(spare))
	m.eventually("web reaches spare at a socket", web, socket, at(spare))
	if out := m.dial(batch, socket, "peer"); reached(out) {
		t.Errorf("another workload has web's socket: %s", out)
	}
	m.eventually("web reaches what the query answers", web, query, at(spare))
	held := func(out string) bool { return strings.Contains(out, "local="+local) }
	if out := m.dial(batch, local, "peer"); !held(out) {
		t.Errorf("another workload does not reach what is bound there: %s", out)
	}
	if out := m.dial(batch, meta, "peer"); !strings.Contains(out, "ECONNREFUSED") {
		t.Errorf("another workload has web's upstream: %s", out)
	}
	explained, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", query)
	m.must(err)
	if explained.Destination != "nearest" || len(explained.Targets) != 1 || explained.Targets[0].Name != "spare" || !explained.Allowed {
		t.Errorf("the query is explained as %+v", explained)
	}
	status, err := m.Daemons[0].Admin().Status(m.ctx())
	m.must(err)
	if all := fmt.Sprint(status.Problems); !strings.Contains(all, "local_bind_socket_path") || !strings.Contains(all, "where upstream \"api\"") {
		t.Errorf("what is refused is not told: %s", all)
	}
	if status.Source.Error != "" {
		t.Errorf("the documented rules are not enough: %s", status.Source.Error)
	}

	var streams []*netlab.Process
	for range n {
		p, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"dial", local, "stream"}})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "a line"))
		streams = append(streams, p)
	}
	if out := m.dial(web, local, "peer"); reached(out) {
		t.Errorf("a third connection to api is let through: %s", out)
	}
	if out := m.dial(web, meta, "peer"); !at(spare)(out) {
		t.Errorf("MaxConnections of api limits calls to spare: %s", out)
	}
	if text := m.metrics(0); !strings.Contains(text, `reason="capacity"`) {
		t.Error("the refusal is not counted as capacity")
	}
	for _, p := range streams {
		p.Kill()
	}
	m.eventually("there is room again", web, local, at(api))

	register("spare:9192")
	m.eventually("an upstream that is gone is let alone", web, local, held)
	holder.Kill()
	register("spare:9192", toAPI)
	m.eventually("an upstream that comes back needs nobody at its port", web, local, at(api))
	_, err = m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if strings.Contains(fmt.Sprint(s.Problems), "local_bind_socket_path") {
			return fmt.Errorf("an upstream that is gone is still told of")
		}
		return nil
	})
	m.must(err)
}

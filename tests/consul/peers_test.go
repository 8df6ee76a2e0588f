package consul

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/tests/netlab"
)

// foreign makes a workload that is not enrolled, with the test application, registered with its node's agent.
func (m *mesh) foreign(node int, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].Workload(service)
	m.must(err)
	m.must(m.agents[node].Register(m.ctx(), Service(service, service+"-1", w.IPv4.String(), port)))
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf(":%d", port)}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return w
}

// startClient runs a program in a workload that asks the agent of its node.
func (m *mesh) startClient(w *netlab.Workload, path string, args ...string) *netlab.Process {
	m.t.Helper()
	agent := m.agents[slices.Index(m.Nodes[:], w.Node)]
	p, err := w.Start(netlab.Command{
		Path: path, Args: args, Env: []string{"CONSUL_HTTP_ADDR=unix://" + agent.Socket(), "CONSUL_HTTP_TOKEN=" + Management},
	})
	m.must(err)
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.t.Logf("output of %s in %s:\n%s", args, w.Name, p.Output())
		}
	})
	return p
}

// builtin runs Consul's built-in proxy in a workload.
func (m *mesh) builtin(w *netlab.Workload, args ...string) {
	m.t.Helper()
	binary, err := Binary()
	m.must(err)
	m.startClient(w, binary, append([]string{"connect", "proxy"}, args...)...)
}

// metrics are those of a node's daemon.
func (m *mesh) metrics(node int) string {
	m.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: m.Nodes[node].Namespace.Dial}}
	resp, err := client.Get("http://127.0.0.1:20210/metrics")
	m.must(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	m.must(err)
	return string(text)
}

// eventually repeats a dial until its output is as wanted.
func (m *mesh) eventually(what string, w *netlab.Workload, to string, want func(string) bool) {
	m.t.Helper()
	var out string
	for ctx := m.ctx(); ctx.Err() == nil; {
		if out = m.dial(w, to, "peer"); want(out) {
			return
		}
	}
	m.t.Errorf("%s: from %s to %s: %s", what, w.Name, to, out)
}

func TestTheBuiltInProxyIsAPeerBothWays(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	legacy, stranger := m.foreign(1, "legacy"), m.foreign(1, "stranger")
	m.builtin(legacy, "-sidecar-for", "legacy-1")
	const local = "127.0.0.1:9191"
	m.builtin(legacy, "-service", "legacy", "-upstream", "api:"+local)
	m.builtin(stranger, "-service", "stranger", "-upstream", "api:"+local)
	m.must(m.agents[0].Intentions(m.ctx(), "legacy", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"legacy": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api"})

	vip := m.vip(0, "legacy")
	m.eventually("nodeproxy calls the built-in proxy", web, vip, reached)
	if out := m.dial(batch, vip, "peer"); reached(out) {
		t.Errorf("batch may not call legacy, and does: %s", out)
	}
	m.eventually("the built-in proxy calls nodeproxy", legacy, local, reached)
	if out := m.dial(stranger, local, "peer"); reached(out) || !strings.Contains(out, "connected") {
		t.Errorf("stranger may not call api: %s", out)
	}
	if text := m.metrics(1); !regexp.MustCompile(`nodeproxy_denied_total\{[^}]*destination_service="api"[^}]*reason="intention"[^}]*source_service="stranger"[^}]*\} [1-9]`).MatchString(text) {
		t.Errorf("the denial of stranger is not counted:\n%s", text)
	}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"legacy": "deny"}))
	m.eventually("the built-in proxy is denied", legacy, local, func(out string) bool { return !reached(out) })
}

func TestTheNativeLibraryIsAPeerBothWays(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	cache, err := m.Nodes[1].Workload("cache")
	m.must(err)
	at := netip.AddrPortFrom(cache.IPv4, 9000)
	m.must(m.agents[1].Register(m.ctx(), map[string]any{
		"Name": "cache", "ID": "cache-1", "Address": at.Addr().String(), "Port": at.Port(), "Connect": map[string]any{"Native": true},
	}))
	native, err := Native()
	m.must(err)
	m.must(m.startClient(cache, native, "serve", "cache", at.String()).WaitOutput(m.ctx(), "ready"))
	m.must(m.agents[0].Intentions(m.ctx(), "cache", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"cache": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api"})

	vip := m.vip(0, "cache")
	m.eventually("nodeproxy calls the native service", web, vip, func(out string) bool { return strings.Contains(out, "accept=cache") })
	if out := m.dial(batch, vip, "peer"); reached(out) {
		t.Errorf("batch may not call cache, and does: %s", out)
	}
	if out := m.dial(web, at.String(), "peer"); reached(out) {
		t.Errorf("the native service's own address is redirected: %s", out)
	}
	call := func(as string) string {
		p := m.startClient(cache, native, "dial", as, "api")
		_ = p.Wait(m.ctx()) // it fails when it is denied
		return p.Output()
	}
	if out := call("cache"); !reached(out) {
		t.Errorf("the native client does not reach api: %s", out)
	}
	if out := call("stranger"); reached(out) {
		t.Errorf("stranger may not call api, and does: %s", out)
	}
}

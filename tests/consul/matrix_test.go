package consul

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

// The programs of a server's workload, each behind a service of its own: "echo-KIND" and "http-KIND".
const (
	echoPort = port
	httpPort = 8081
)

const page = "a page of nginx\n"

// callers are the kinds of clients that each server has: the one that its intentions allow, the one that they deny, and one
// that none names. By default nothing is allowed.
var callers = []string{"friend", "foe", "stranger"}

// peer is one side of the matrix.
type peer struct {
	kind string
	// serve makes the services' public sides in a workload whose programs listen on loopback only.
	serve func(m *mesh, w *netlab.Workload, service string, local int)
	// call makes ways from a workload to destinations, and returns them by destination.
	call func(m *mesh, w *netlab.Workload, service string, destinations []string) map[string]string
}

var peers = []peer{
	{"builtin", (*mesh).serveBuiltin, (*mesh).callBuiltin},
	{"native", (*mesh).serveNative, (*mesh).callNative},
	{"envoy", (*mesh).serveEnvoy, (*mesh).callEnvoy},
	{"nodeproxy", (*mesh).serveNodeproxy, nil},
}

// reg is a registration with a sidecar at a port of its own, and upstreams from upstreamPort on.
func reg(service string, w *netlab.Workload, local, public int, upstreams ...string) map[string]any {
	var list []map[string]any
	for i, name := range upstreams {
		list = append(list, map[string]any{"DestinationName": name, "LocalBindPort": upstreamPort + i})
	}
	r := Service(service, service+"-1", w.IPv4.String(), local)
	sidecar := r["Connect"].(map[string]any)["SidecarService"].(map[string]any)
	sidecar["Port"], sidecar["Address"] = public, w.IPv4.String()
	sidecar["Proxy"] = map[string]any{"LocalServiceAddress": "127.0.0.1", "LocalServicePort": local, "Upstreams": list}
	return r
}

const upstreamPort = 9191

func (m *mesh) serveBuiltin(w *netlab.Workload, service string, local int) {
	m.register(w, reg(service, w, local, local+12000))
	m.builtin(w, "-sidecar-for", service+"-1")
}

func (m *mesh) serveNative(w *netlab.Workload, service string, local int) {
	native, err := Native()
	m.must(err)
	at := netip.AddrPortFrom(w.IPv4, uint16(local+12000))
	m.register(w, map[string]any{
		"Name": service, "ID": service + "-1", "Address": at.Addr().String(), "Port": at.Port(), "Connect": map[string]any{"Native": true},
	})
	p := m.startClient(w, native, "serve", service, at.String(), fmt.Sprintf("127.0.0.1:%d", local))
	m.must(p.WaitOutput(m.ctx(), "ready"))
}

func (m *mesh) serveEnvoy(w *netlab.Workload, service string, local int) {
	m.register(w, reg(service, w, local, local+12000))
	m.envoy(w, service+"-1", local+10000)
}

func (m *mesh) serveNodeproxy(w *netlab.Workload, service string, local int) {
	m.register(w, reg(service, w, local, local+12000))
}

func (m *mesh) callBuiltin(w *netlab.Workload, service string, destinations []string) map[string]string {
	args := []string{"-service", service}
	ways := make(map[string]string)
	for i, name := range destinations {
		ways[name] = fmt.Sprintf("127.0.0.1:%d", upstreamPort+i)
		args = append(args, "-upstream", name+":"+ways[name])
	}
	m.builtin(w, args...)
	return ways
}

func (m *mesh) callNative(w *netlab.Workload, service string, destinations []string) map[string]string {
	native, err := Native()
	m.must(err)
	ways := make(map[string]string)
	for i, name := range destinations {
		ways[name] = fmt.Sprintf("127.0.0.1:%d", upstreamPort+i)
		m.must(m.startClient(w, native, "forward", service, name, ways[name]).WaitOutput(m.ctx(), "ready"))
	}
	return ways
}

func (m *mesh) callEnvoy(w *netlab.Workload, service string, destinations []string) map[string]string {
	ways := make(map[string]string)
	for i, name := range destinations {
		ways[name] = fmt.Sprintf("127.0.0.1:%d", upstreamPort+i)
	}
	m.register(w, reg(service, w, port, 20000, destinations...))
	m.envoy(w, service+"-1", 19000)
	return ways
}

func (m *mesh) register(w *netlab.Workload, service map[string]any) {
	m.t.Helper()
	m.must(m.agent(w).Register(m.ctx(), service))
}

func (m *mesh) agent(w *netlab.Workload) *Agent {
	if w.Node == m.Nodes[0] {
		return m.agents[0]
	}
	return m.agents[1]
}

// programsOf starts the echo server and nginx on loopback in a workload.
func (m *mesh) programsOf(w *netlab.Workload) {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf("127.0.0.1:%d", echoPort)}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	m.nginx(w, fmt.Sprintf("127.0.0.1:%d", httpPort))
}

// nginx starts Debian's nginx in a workload and waits until it answers.
func (m *mesh) nginx(w *netlab.Workload, listen string) {
	m.t.Helper()
	nginx := program(m.t, "nginx")
	dir, err := os.MkdirTemp(m.Dir(), "nginx-")
	m.must(err)
	m.must(os.WriteFile(filepath.Join(dir, "page"), []byte(page), 0o644))
	conf := filepath.Join(dir, "nginx.conf")
	m.must(os.WriteFile(conf, fmt.Appendf(nil, `daemon off; user root; pid %[1]s/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
  server { listen %[2]s; root %[1]s; }
}
`, dir, listen), 0o644))
	_, err = w.Start(netlab.Command{Path: nginx, Args: []string{"-c", conf, "-p", dir}})
	m.must(err)
	m.await("nginx answers", func() error {
		conn, err := w.Namespace.Dial(m.ctx(), "tcp", listen)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// program finds one of Debian's, which make test installs.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, candidate := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	t.Fatalf("there is no %s: install Debian's packages as make test does", name)
	return ""
}

// await repeats check until it returns nil, or patience ends.
func (m *mesh) await(what string, check func() error) {
	m.t.Helper()
	ctx := m.ctx()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			m.t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
	}
}

// echoes says whether bytes sent along a way come back.
func (m *mesh) echoes(w *netlab.Workload, to string) (bool, string) {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"echo", to}})
	m.must(err)
	m.must(p.Wait(m.ctx()))
	return strings.HasPrefix(p.Output(), "echoed "), p.Output()
}

// browses says whether curl gets the page along a way.
func (m *mesh) browses(w *netlab.Workload, to string) (bool, string) {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: program(m.t, "curl"), Args: []string{"-sS", "--max-time", "30", "http://" + to + "/page"}})
	m.must(err)
	err = p.Wait(m.ctx())
	return err == nil && p.Output() == page, p.Output()
}

// calls is what a client does with each service.
func (m *mesh) calls(w *netlab.Workload, service, to string) (bool, string) {
	m.t.Helper()
	if strings.HasPrefix(service, "http-") {
		return m.browses(w, to)
	}
	return m.echoes(w, to)
}

func servicesOf(kind string) []string { return []string{"echo-" + kind, "http-" + kind} }

// server makes a server of a kind on the second node. nodeproxy has a workload for each service, for a workload is one
// identity.
func (m *mesh) server(p peer) {
	m.t.Helper()
	for i, service := range servicesOf(p.kind) {
		w, err := m.Nodes[1].Workload(service)
		m.must(err)
		m.programsOf(w)
		if p.kind == "nodeproxy" {
			m.Daemons[1].Enroll(w, service)
		}
		p.serve(m, w, service, []int{echoPort, httpPort}[i])
		m.must(m.agents[0].Intentions(m.ctx(), service, m.intentionsFor()))
	}
}

func (m *mesh) intentionsFor() map[string]string {
	actions := make(map[string]string)
	for _, p := range peers {
		actions[p.kind+"-friend"], actions[p.kind+"-foe"] = "allow", "deny"
	}
	return actions
}

// cell is one client and one server, with the ways of each caller to the server's services.
type cell struct {
	clients map[string]*netlab.Workload
	ways    map[string]map[string]string
	kind    string // of the client
	server  string
	judge   int // the node whose nodeproxy denies
}

// meets asserts what each of a cell's callers meets.
func (m *mesh) meets(c cell) {
	m.t.Helper()
	for _, service := range servicesOf(c.server) {
		m.await("the allowed client reaches "+service, func() error {
			if ok, out := m.calls(c.clients["friend"], service, c.ways["friend"][service]); !ok {
				return fmt.Errorf("it gets %.300s", out)
			}
			return nil
		})
		for _, caller := range []string{"foe", "stranger"} {
			m.await(caller+" is denied by the intentions of "+service, func() error {
				if ok, out := m.calls(c.clients[caller], service, c.ways[caller][service]); ok {
					m.t.Fatalf("the %s reaches %s: %.300s", caller, service, out)
				}
				return m.denied(c.judge, c.kind+"-"+caller, service)
			})
		}
	}
}

// denied says whether the daemon of a node counted a denial of the pair by its intentions. A client may fail before it gets
// there.
func (m *mesh) denied(node int, source, service string) error {
	m.t.Helper()
	labels := map[string]string{"source_service": source, "destination_service": service, "reason": "intention"}
	if !counts(m.metrics(node), "nodeproxy_denied_total", labels) {
		return fmt.Errorf("no denial of %s at %s is counted", source, service)
	}
	return nil
}

func TestTheMatrixOfPeers(t *testing.T) {
	m := newMesh(t)
	for _, p := range peers {
		m.server(p)
	}
	clients := make(map[string]map[string]*netlab.Workload)
	own := make([]string, 0, len(callers))
	for _, p := range peers {
		clients[p.kind] = make(map[string]*netlab.Workload)
		for _, caller := range callers {
			service := p.kind + "-" + caller
			w, err := m.Nodes[0].Workload(service)
			m.must(err)
			clients[p.kind][caller] = w
			m.register(w, Service(service, service+"-1", w.IPv4.String(), port)) // metrics name services of the mesh alone
			if p.kind == "nodeproxy" {
				m.Daemons[0].Enroll(w, service)
				own = append(own, service)
				_, err := w.Start(netlab.Command{Path: "sleep", Args: []string{"infinity"}}) // it is protected before it calls
				m.must(err)
			}
		}
	}
	m.start(own, servicesOf("nodeproxy"))

	for _, server := range peers {
		t.Run("nodeproxy calls "+server.kind, func(t *testing.T) {
			m := m.within(t)
			ways := make(map[string]map[string]string)
			for _, caller := range callers {
				ways[caller] = make(map[string]string)
				for _, service := range servicesOf(server.kind) {
					ways[caller][service] = m.vip(0, service)
				}
			}
			m.meets(cell{clients["nodeproxy"], ways, "nodeproxy", server.kind, 0})
		})
	}
	for _, client := range peers {
		if client.call == nil {
			continue
		}
		t.Run(client.kind+" calls nodeproxy", func(t *testing.T) {
			m := m.within(t)
			ways := make(map[string]map[string]string)
			for _, caller := range callers {
				ways[caller] = client.call(m, clients[client.kind][caller], client.kind+"-"+caller, servicesOf("nodeproxy"))
			}
			m.meets(cell{clients[client.kind], ways, client.kind, "nodeproxy", 1})
		})
	}
}

// within is m for a subtest.
func (m *mesh) within(t *testing.T) *mesh {
	sub := *m
	sub.t = t
	return &sub
}

// counts says whether a series with all these labels is above 0.
func counts(metrics, name string, labels map[string]string) bool {
	for line := range strings.Lines(metrics) {
		if !strings.HasPrefix(line, name+"{") || strings.HasSuffix(strings.TrimSpace(line), " 0") {
			continue
		}
		has := true
		for k, v := range labels {
			has = has && strings.Contains(line, fmt.Sprintf("%s=%q", k, v))
		}
		if has {
			return true
		}
	}
	return false
}

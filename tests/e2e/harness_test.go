package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const (
	// patience is how long a test waits for what must happen. It is long because the machine may be busy.
	patience = time.Minute
	port     = 8080
)

// mesh is two nodes under test. Its methods fail the test.
type mesh struct {
	*meshlab.Mesh
	t         *testing.T
	markers   *atomic.Uint32 // of awaitGeneration
	virtual   map[string]netip.Addr
	agents    *consul.Plane // nil: the source is the mesh directory
	baselines [2]*footprint // of daemons that must return to it; nil: not measured, or ended by the test
}

// newMesh makes two nodes. At the end of the test it asserts that the daemons are back at their baseline, end well, and
// that nothing remains of them. Other tests run beside it: most of the time each of them waits.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	require(t)
	t.Parallel()
	return makeMesh(t)
}

// newMeshAlone is newMesh for a test beside which no other may run: its daemon heeds the extended attributes of every cgroup of
// the machine, or it takes all that the machine can do.
func newMeshAlone(t *testing.T) *mesh {
	t.Helper()
	require(t)
	return makeMesh(t)
}

func require(t *testing.T) {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: end to end")
	}
	requireSource(t)
}

func makeMesh(t *testing.T) *mesh {
	t.Helper()
	lab, err := meshlab.New(programs.nodeproxy)
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Mesh: lab, t: t, markers: new(atomic.Uint32), virtual: make(map[string]netip.Addr)}
	for _, d := range m.Daemons {
		d.Env = []string{"GORACE=halt_on_error=0 exitcode=66 atexit_sleep_ms=0"}
	}
	t.Cleanup(m.finish)
	if *source == "consul" {
		m.useAgents()
	}
	return m
}

// in returns m for a subtest.
func (m *mesh) in(t *testing.T) *mesh {
	sub := *m
	sub.t = t
	return &sub
}

// onEveryPath runs a test with tunnels between the nodes, and with plain Connect connections alone.
func onEveryPath(t *testing.T, test func(t *testing.T, m *mesh, between admin.Path)) {
	t.Parallel()
	t.Run("tunnel", func(t *testing.T) { test(t, newMesh(t), admin.PathTunnel) })
	t.Run("mtls", func(t *testing.T) {
		m := newMesh(t)
		for _, d := range m.Daemons {
			d.Plain = true
		}
		test(t, m, admin.PathMTLS)
	})
}

var errNotYet = errors.New("not yet")

// pair is the mesh of most tests: web on node 1, api on node 2, web may connect to api, both run and are protected.
func pair(t *testing.T) (m *mesh, web, api *netlab.Workload) {
	t.Helper()
	m = newMesh(t)
	web, api = m.place(0, "web"), m.place(1, "api")
	m.allow("api", "web")
	m.start()
	return m, web, api
}

func (m *mesh) finish() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i, d := range m.Daemons {
		if m.baselines[i] == nil {
			continue
		}
		if !m.t.Failed() {
			m.awaitBaseline(ctx, i)
		}
		if err := d.Stop(ctx); err != nil {
			m.t.Errorf("stop the daemon of %s: %v", d.Node.Name, err)
		}
		if strings.Contains(d.Process.Output(), "DATA RACE") {
			m.t.Errorf("the daemon of %s has a data race:\n%s", d.Node.Name, d.Process.Output())
		}
	}
	if m.t.Failed() {
		for _, d := range m.Daemons {
			if d.Process != nil {
				m.t.Logf("output of the daemon of %s:\n%s", d.Node.Name, d.Process.Output())
			}
		}
	}
	pinned, err := m.Pinned()
	if err != nil {
		m.t.Errorf("list what is pinned: %v", err)
	}
	if err := m.Close(); err != nil {
		m.t.Errorf("close the lab: %v", err)
	}
	if leaks := m.Leaks(); len(leaks) > 0 {
		m.t.Errorf("after close there remain: %s", strings.Join(leaks, ", "))
	}
	m.gone(pinned)
}

// gone asserts that the kernel frees objects.
func (m *mesh) gone(objects []netlab.BPFObject) {
	m.t.Helper()
	m.eventually("every program, map and link is gone", func() error {
		objects = slices.DeleteFunc(objects, func(o netlab.BPFObject) bool { return !o.Exists() })
		if len(objects) > 0 {
			return fmt.Errorf("%v remain", objects)
		}
		return nil
	})
}

// place makes a workload with its own namespace that is enrolled and defined as service, and runs the test application in
// it, on both address families.
func (m *mesh) place(node int, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Place(node, service, port)
	m.must(err)
	m.serve(w, fmt.Sprintf(":%d", port))
	return w
}

// define defines the instances of a service on a node: one for each address.
func (m *mesh) define(node int, service string, port uint16, addresses ...netip.Addr) {
	m.t.Helper()
	var text strings.Builder
	for i, a := range addresses {
		text.WriteString(meshlab.Service(service, fmt.Sprintf("%s-%d", service, i+1), a.String(), port, ""))
	}
	m.must(m.Define(node, service, text.String()))
}

// serve runs the test application in a workload, until the test ends, and returns when it listens.
func (m *mesh) serve(w *netlab.Workload, args ...string) *netlab.Process {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"serve"}, args...)})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return p
}

// start starts both daemons, waits until all is protected, knows the virtual IPs, and takes the baselines.
func (m *mesh) start() {
	m.t.Helper()
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
	}
	for i := range m.Daemons {
		m.settle(i)
	}
}

// kill ends a node's daemon with SIGKILL.
func (m *mesh) kill(node int) {
	m.t.Helper()
	m.baselines[node] = nil
	m.Daemons[node].Process.Kill()
}

// stop ends a node's daemon with SIGTERM.
func (m *mesh) stop(node int) {
	m.t.Helper()
	m.baselines[node] = nil
	m.must(m.Daemons[node].Stop(m.ctx()))
}

// restart starts a node's daemon again.
func (m *mesh) restart(node int) {
	m.t.Helper()
	m.must(m.Daemons[node].Start(m.ctx()))
	m.settle(node)
}

// settle waits until the workloads of a node are protected and takes its daemon's baseline.
func (m *mesh) settle(node int) {
	m.t.Helper()
	d := m.Daemons[node]
	if m.agents != nil {
		m.awaitCatalog(node)
	}
	status, err := d.AwaitProtected(m.ctx())
	m.must(err)
	for _, svc := range status.Services {
		for _, text := range svc.Virtual {
			if ip, err := netip.ParseAddr(text); err == nil && ip.Is4() {
				m.virtual[svc.Name] = ip
			}
		}
		m.must(d.AwaitInstances(m.ctx(), svc.Name, len(svc.Instances)))
	}
	m.settleDirect(node)
	m.baselines[node], err = measure(m.ctx(), d)
	m.must(err)
}

// settleDirect waits until a node's daemon has looked at every pair of workloads that may go direct.
func (m *mesh) settleDirect(node int) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.SameNode.Settling {
			return fmt.Errorf("the direct path is not settled: %+v", s.SameNode)
		}
		return nil
	})
	m.must(err)
}

// vip is the virtual IP of a service, with the port that all tests use.
func (m *mesh) vip(service string) string {
	m.t.Helper()
	ip, ok := m.virtual[service]
	if !ok {
		m.t.Fatalf("service %s has no virtual IP", service)
	}
	return netip.AddrPortFrom(ip, 80).String()
}

func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

func (m *mesh) allow(destination string, sources ...string) { m.intend(destination, "allow", sources) }
func (m *mesh) deny(destination string, sources ...string)  { m.intend(destination, "deny", sources) }

func (m *mesh) intend(destination, action string, sources []string) {
	m.t.Helper()
	var list []meshlab.Source
	for _, name := range sources {
		list = append(list, meshlab.Source{Name: name, Action: action})
	}
	m.must(m.Intentions(destination, list...))
}

func (m *mesh) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// ctx ends with the test, or when patience does.
func (m *mesh) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(m.t.Context(), patience, fmt.Errorf("not within %s", patience))
	m.t.Cleanup(cancel)
	return ctx
}

// eventually repeats check until it returns nil. It is for states that nothing announces.
func (m *mesh) eventually(what string, check func() error) {
	m.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Errorf("%s: not within %s: %v", what, patience, err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// workload is a shorthand.
type workload = *netlab.Workload

// app is a command of the test application.
func (m *mesh) app(args ...string) netlab.Command {
	return netlab.Command{Path: programs.app, Args: args}
}

// dial runs the test application's client in a workload and returns its output: see package app.
func (m *mesh) dial(w *netlab.Workload, args ...string) string {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"dial"}, args...)})
	m.must(err)
	m.must(p.Wait(m.ctx()))
	return p.Output()
}

// startDial is dial for a client that goes on; it returns once the client has printed text.
func (m *mesh) startDial(w *netlab.Workload, text string, args ...string) *netlab.Process {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"dial", "-timeout", "5m"}, args...)})
	m.must(err)
	m.t.Cleanup(p.Kill) // before finish, which looks for what connections leave behind
	m.must(p.WaitOutput(m.ctx(), text))
	return p
}

// reaches asserts that an echo of a workload comes back whole.
func (m *mesh) reaches(w *netlab.Workload, args ...string) {
	m.t.Helper()
	out := m.dial(w, append(args, "peer")...)
	if !strings.Contains(out, "accept=") || !strings.Contains(out, "end: eof") {
		m.t.Errorf("%s does not reach %s: %s", w.Name, args, out)
	}
}

// getsNothing asserts that not one byte of an answer comes back.
func (m *mesh) getsNothing(w *netlab.Workload, args ...string) {
	m.t.Helper()
	out := m.dial(w, append(args, "peer")...)
	if strings.Contains(out, "accept=") {
		m.t.Errorf("%s reaches %s: %s", w.Name, args, out)
	}
}

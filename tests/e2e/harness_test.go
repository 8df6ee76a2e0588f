package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const (
	// patience is how long a test waits for what must happen. It is long because the machine may be busy.
	patience = 30 * time.Second
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
// that nothing remains of them.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: end to end")
	}
	requireSource(t)
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

// tracer reads what a node's trace shows from the moment it was made.
type tracer struct {
	t      *testing.T
	events chan admin.Connection
}

// traced follows a node's trace until the test ends. Nothing that happens after it returns is missed.
func (m *mesh) traced(node int) *tracer {
	m.t.Helper()
	conn, err := net.Dial("unix", m.Daemons[node].Socket())
	m.must(err)
	_, err = io.WriteString(conn, "GET /v1/trace HTTP/1.1\r\nHost: nodeproxy\r\n\r\n")
	m.must(err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // answered once the daemon has subscribed us
	m.must(err)
	tr := &tracer{t: m.t, events: make(chan admin.Connection, 1<<16)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for dec := json.NewDecoder(resp.Body); ; {
			var c admin.Connection
			if dec.Decode(&c) != nil {
				return
			}
			tr.events <- c
		}
	}()
	m.t.Cleanup(func() { conn.Close(); <-done; resp.Body.Close() })
	return tr
}

// await waits for an event that match accepts. Those before it are not seen again.
func (tr *tracer) await(what string, match func(admin.Connection) bool) admin.Connection {
	tr.t.Helper()
	var seen []admin.Connection
	for deadline := time.After(patience); ; {
		select {
		case c := <-tr.events:
			if match(c) {
				return c
			}
			seen = append(seen, c)
		case <-deadline:
			tr.t.Fatalf("the trace shows no %s; it shows %+v", what, seen)
		}
	}
}

// denials is the sum of a node's counter of denials for a reason.
func (m *mesh) denials(node int, reason catalog.Reason) float64 {
	m.t.Helper()
	return m.metric(node, "nodeproxy_denied_total", fmt.Sprintf("reason=%q", reason))
}

// metric sums the series of a metric whose labels contain all of labels.
func (m *mesh) metric(node int, name string, labels ...string) float64 {
	m.t.Helper()
	text, err := scrape(m.ctx(), m.Daemons[node])
	m.must(err)
	return sum(text, name, labels...)
}

// series lists the series of a metric that are not 0.
func (m *mesh) series(node int, name string) string {
	m.t.Helper()
	text, err := scrape(m.ctx(), m.Daemons[node])
	m.must(err)
	var all strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, name+"{") && !strings.HasSuffix(line, " 0\n") {
			all.WriteString(line)
		}
	}
	return all.String()
}

func sum(text, name string, labels ...string) (total float64) {
lines:
	for line := range strings.Lines(text) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if found, _, _ := strings.Cut(series, "{"); found != name {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(series, label) {
				continue lines
			}
		}
		v, _ := strconv.ParseFloat(value, 64)
		total += v
	}
	return total
}

// scrape reads the daemon's metrics from inside its node.
func scrape(ctx context.Context, d *meshlab.Daemon) (string, error) {
	conn, err := d.Node.Namespace.Dial(ctx, "tcp", "127.0.0.1:20210")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:20210/metrics", nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// footprint is what a daemon holds on to when no connection is open, but for the tunnels that it keeps ready: status counts
// them, each has one socket, and an inbound one a goroutine.
type footprint struct {
	files      int
	goroutines int
	entries    map[string]int // by map
}

func measure(ctx context.Context, d *meshlab.Daemon) (*footprint, error) {
	status, err := d.Admin().Status(ctx)
	if err != nil {
		return nil, err
	}
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(d.Process.PID()), "fd"))
	if err != nil {
		return nil, err
	}
	ready := status.Connections.Tunnels
	f := &footprint{
		files: len(files) - ready.Outbound - ready.Inbound, goroutines: status.Goroutines - ready.Inbound,
		entries: make(map[string]int),
	}
	for _, m := range status.Kernel.Maps {
		// What was asked once is kept as long as the namespace; grants follow the intentions, whatever connects.
		if m.Name != "dns_resolvers" && m.Name != "grants" {
			f.entries[m.Name] = m.Entries
		}
	}
	return f, nil
}

// exceeds says what of f is more than in base.
func (f *footprint) exceeds(base *footprint) error {
	var errs []error
	if f.files > base.files {
		errs = append(errs, fmt.Errorf("%d file descriptors, %d before", f.files, base.files))
	}
	if f.goroutines > base.goroutines {
		errs = append(errs, fmt.Errorf("%d goroutines, %d before", f.goroutines, base.goroutines))
	}
	for name, n := range f.entries {
		if n > base.entries[name] {
			errs = append(errs, fmt.Errorf("%d entries in map %s, %d before", n, name, base.entries[name]))
		}
	}
	return errors.Join(errs...)
}

// awaitBaseline asserts that a daemon lets go of all that its connections took, once their clients are gone.
func (m *mesh) awaitBaseline(ctx context.Context, node int) {
	var last error
	m.eventually("the daemon of "+m.Nodes[node].Name+" is back at its baseline", func() error {
		now, err := measure(ctx, m.Daemons[node])
		if ctx.Err() != nil {
			return last // which says more than that time is up
		}
		last = err
		if err == nil {
			last = m.comparable(now).exceeds(m.baselines[node])
		}
		return last
	})
}

package nodeproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

const (
	patience    = 20 * time.Second
	trustDomain = "11111111-2222-3333-4444-555555555555.consul"
)

var vip = map[string]netip.Addr{"api": netip.MustParseAddr("240.0.0.1"), "web": netip.MustParseAddr("240.0.0.2")}

// mesh is one node with a Proxy that plays both sides.
type mesh struct {
	t        testing.TB
	root     *mtlstest.Authority
	kernel   *fakeKernel
	source   *fakeSource
	events   *recorder
	proxy    *Proxy
	stop     context.CancelFunc
	finished chan error

	// The next snapshot; change it and publish.
	next   catalog.Snapshot
	def    policy.Action
	rules  []policy.Intention
	cookie uint64

	tunnels bool // every instance is one of a nodeproxy
}

type option func(*Config, *fakeKernel)

func tunnelled(c *Config, _ *fakeKernel) { c.Tunnels = true }

// onEveryPath runs a test with plain Connect connections, and with tunnels.
func onEveryPath(t *testing.T, test func(*testing.T, option)) {
	t.Run("mtls", func(t *testing.T) { test(t, func(*Config, *fakeKernel) {}) })
	t.Run("tunnel", func(t *testing.T) { test(t, tunnelled) })
}

// newMesh starts a Proxy whose snapshot has leaves for web and api, and no instance.
func newMesh(t testing.TB, options ...option) *mesh {
	t.Helper()
	before := runtime.NumGoroutine()
	m := &mesh{
		t: t, root: mtlstest.NewRoot(t), def: policy.Allow,
		kernel: &fakeKernel{
			applied: make(chan uint64), ready: make(chan struct{}), origins: map[uint64]*workload.Origin{},
			served: map[netip.AddrPort]*workload.Served{}, apps: map[string]string{},
		},
		source: &fakeSource{snapshots: make(chan *catalog.Snapshot)},
		events: &recorder{more: make(chan struct{})},
	}
	cfg := Config{
		Node: "node-1", Source: m.source, Kernel: m.kernel, Observer: m.events, Log: slog.New(slog.DiscardHandler),
		Limits: Limits{Connections: 1000, PerWorkload: 100, Handshake: 10 * time.Second, Connect: 10 * time.Second, Drain: 0},
	}
	for _, o := range options {
		o(&cfg, m.kernel)
	}
	m.tunnels = cfg.Tunnels
	var err error
	if m.proxy, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	m.next = catalog.Snapshot{
		Node: "node-1", TrustDomain: trustDomain, Datacenter: "dc1",
		Services: map[string]*catalog.Service{
			"web": {Name: "web", Virtual: []netip.Addr{vip["web"]}},
			"api": {Name: "api", Virtual: []netip.Addr{vip["api"]}},
		},
	}
	m.trust(m.root)
	ctx, stop := context.WithCancel(context.Background())
	m.stop, m.finished = stop, make(chan error, 1)
	go func() { m.finished <- m.proxy.Run(ctx) }()
	<-m.kernel.ready
	t.Cleanup(func() {
		m.shutdown()
		noLeak(t, before)
	})
	return m
}

func (m *mesh) shutdown() error {
	m.stop()
	select {
	case err := <-m.finished:
		m.finished <- err
		if n := m.proxy.live.len(); n != 0 {
			m.t.Errorf("%d connections are left after Run", n)
		}
		if len(m.proxy.slots.taken) != 0 {
			m.t.Errorf("places are left taken after Run: %v", m.proxy.slots.taken)
		}
		if len(m.proxy.balancer.active) != 0 {
			m.t.Errorf("instances are counted as busy after Run: %v", m.proxy.balancer.active)
		}
		return err
	case <-time.After(patience):
		m.t.Fatal("Run does not return")
		return nil
	}
}

// noLeak fails when more goroutines than before stay.
func noLeak(t testing.TB, before int) {
	deadline := time.Now().Add(patience)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

// trust makes root the only one, and signer's leaves the services'.
func (m *mesh) trust(root *mtlstest.Authority) {
	m.root = root
	m.next.Roots = nil
	m.next.Roots = append(m.next.Roots, root.Cert)
	m.next.Leaves = map[string]*tls.Certificate{"web": m.leaf("web"), "api": m.leaf("api")}
}

func (m *mesh) leaf(service string) *tls.Certificate {
	m.t.Helper()
	return m.root.Leaf(m.t, spiffe(service))
}

func spiffe(service string) string {
	return "spiffe://" + trustDomain + "/ns/default/dc/dc1/svc/" + service
}

// publish delivers m.next and returns when it is in force.
func (m *mesh) publish() uint64 {
	m.t.Helper()
	m.next.Generation++
	p, err := policy.Compile(m.next.Generation, m.def, policy.Identity{TrustDomain: trustDomain}, nil, m.rules)
	if err != nil {
		m.t.Fatal(err)
	}
	next := m.next
	next.Policy = p
	snap, err := catalog.New(next)
	if err != nil {
		m.t.Fatal(err)
	}
	m.source.snapshots <- snap
	select {
	case got := <-m.kernel.applied:
		if got != snap.Generation {
			m.t.Fatalf("generation %d was applied, want %d", got, snap.Generation)
		}
	case <-time.After(patience):
		m.t.Fatal("the snapshot was not applied")
	}
	return snap.Generation
}

// rule replaces the intentions by one from web to api.
func (m *mesh) rule(action policy.Action) {
	m.rules = []policy.Intention{{Source: "web", Destination: "api", Action: action, Origin: "intentions.hcl:1"}}
}

func (m *mesh) listen() *net.TCPListener {
	m.t.Helper()
	lc := net.ListenConfig{KeepAlive: -1}
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err == nil && m.kernel.fromFiles {
		ln, err = throughFile(ln.(*net.TCPListener))
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return ln.(*net.TCPListener)
}

// throughFile is ln as a daemon has it to which it was handed over.
func throughFile(ln *net.TCPListener) (net.Listener, error) {
	defer ln.Close()
	file, err := ln.File()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return net.FileListener(file)
}

// serve runs f with a listener that closes with the kernel.
func (m *mesh) serve(f func(workload.Handler, *net.TCPListener)) netip.AddrPort {
	ln := m.listen()
	m.kernel.mu.Lock()
	defer m.kernel.mu.Unlock()
	m.kernel.listeners = append(m.kernel.listeners, ln)
	m.kernel.serving.Go(func() { f(m.kernel.handler, ln) })
	return addrPort(ln.Addr())
}

// instance adds a local instance of service, whose application listens at app. It is published with the next snapshot.
func (m *mesh) instance(service, id, app string) *catalog.Instance {
	m.t.Helper()
	at := m.serve(func(h workload.Handler, ln *net.TCPListener) { h.ServeInbound(&workload.Namespace{}, ln) })
	inst := &catalog.Instance{
		ID: id, Service: service, Node: "node-1", Local: true, Healthy: true,
		Address: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), at.Port()), Mesh: at, Tunnels: m.tunnels,
	}
	m.kernel.mu.Lock()
	defer m.kernel.mu.Unlock()
	m.kernel.served[at] = &workload.Served{Instance: id, Service: service, Workloads: []*workload.Workload{{ID: 8, Service: service, Cgroup: "/cg/" + service}}}
	m.kernel.apps[id] = app
	m.add(inst)
	return inst
}

// add adds an instance that somebody else serves.
func (m *mesh) add(inst *catalog.Instance) {
	svc := *m.next.Services[inst.Service]
	svc.Instances = append(slices.Clone(svc.Instances), inst)
	services := map[string]*catalog.Service{}
	for name, other := range m.next.Services {
		services[name] = other
	}
	services[inst.Service] = &svc
	m.next.Services = services
}

// remote adds an instance at a mesh address of the test's own.
func (m *mesh) remote(id string, mesh netip.AddrPort) *catalog.Instance {
	inst := &catalog.Instance{
		ID: id, Service: "api", Node: "node-2", Healthy: true,
		Address: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.8"), mesh.Port()), Mesh: mesh, Tunnels: m.tunnels,
	}
	m.add(inst)
	return inst
}

// origin makes an outbound listener: what connects there is a connection of the workload web to destination.
func (m *mesh) origin(to netip.AddrPort) string { return m.originOf(7, to) }

func (m *mesh) originOf(id uint32, to netip.AddrPort) string {
	m.kernel.mu.Lock()
	m.cookie++
	ns := &workload.Namespace{Cookie: m.cookie}
	m.kernel.origins[ns.Cookie] = &workload.Origin{
		Workload:  &workload.Workload{ID: id, Service: "web", Cgroup: "/cg/web"},
		Namespace: ns, Client: netip.MustParseAddrPort("10.0.0.7:4711"), Destination: to, PID: 99, Comm: "curl",
	}
	m.kernel.mu.Unlock()
	return m.serve(func(h workload.Handler, ln *net.TCPListener) { h.ServeOutbound(ns, ln) }).String()
}

func apiVIP() netip.AddrPort { return netip.AddrPortFrom(vip["api"], 80) }

// dial connects to an outbound listener as the application does.
func (m *mesh) dial(at string) *net.TCPConn {
	m.t.Helper()
	conn, err := net.DialTimeout("tcp", at, patience)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.owned(conn)
}

func (m *mesh) owned(conn net.Conn) *net.TCPConn {
	conn.SetDeadline(time.Now().Add(patience))
	m.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// app is an application that gives the test each connection it accepts.
type app struct {
	m     *mesh
	ln    *net.TCPListener
	conns chan *net.TCPConn
}

func (m *mesh) app() *app {
	a := &app{m: m, ln: m.listen(), conns: make(chan *net.TCPConn, 1000)}
	go func() {
		for {
			conn, err := a.ln.AcceptTCP()
			if err != nil {
				return
			}
			a.conns <- conn
		}
	}()
	m.t.Cleanup(func() { a.ln.Close() })
	return a
}

func (a *app) addr() string { return a.ln.Addr().String() }

func (a *app) accept() *net.TCPConn {
	a.m.t.Helper()
	select {
	case conn := <-a.conns:
		return a.m.owned(conn)
	case <-time.After(patience):
		events, _ := a.m.events.all()
		a.m.t.Fatalf("the application was not connected to; events: %+v", events)
		return nil
	}
}

// pair is a published mesh with one instance of api, and both ends of a connection from web to it.
func (m *mesh) pair() (client, server *net.TCPConn) {
	m.t.Helper()
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.publish()
	client = m.dial(m.origin(apiVIP()))
	return client, a.accept()
}

func say(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

func hear(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != text {
		t.Fatalf("read %q, %v; want %q", buf, err, text)
	}
}

// wantRefused connects to at, and wants a reset: of the connect itself, where it is quick, or of the connection.
func (m *mesh) wantRefused(at string) {
	m.t.Helper()
	conn, err := net.DialTimeout("tcp", at, patience)
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	wantReset(m.t, m.owned(conn))
}

// wantReset reads until the end, which must be a reset and not an orderly close.
func wantReset(t testing.TB, conn net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes and %v, want a reset", n, err)
	}
}

func wantEOF(t testing.TB, conn net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, conn); n != 0 || err != nil {
		t.Fatalf("read %d bytes and %v, want the end of the stream", n, err)
	}
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

func text(n int) string { return fmt.Sprintf("%0*d", n, 7) }

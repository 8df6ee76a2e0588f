package nodeproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

func TestNextInstanceIsTriedBeforeTheFirstByte(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	m.remote("refuses", m.silent())
	m.remote("not-api", m.tlsServer(&tls.Config{Certificates: []tls.Certificate{*m.leaf("web")}, ClientAuth: tls.RequireAnyClientCert}))
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	for range 4 { // the good one is drawn first in some
		client := m.dial(at)
		say(t, client, "hello")
		hear(t, a.accept(), "hello")
	}
	for _, e := range m.events.waitN(t, "open", 4, is(admin.EventOpen, admin.Outbound)) {
		if e.Destination.Instance != "api-1" {
			t.Errorf("%+v", e)
		}
	}
}

// dials is a Kernel.Dial that counts.
type dials struct {
	mu sync.Mutex
	to map[netip.AddrPort]int
}

func (d *dials) option(_ *Config, k *fakeKernel) {
	d.to = map[netip.AddrPort]int{}
	k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
		d.mu.Lock()
		d.to[to]++
		d.mu.Unlock()
		return dialTCP(ctx, to.String())
	}
}

func (d *dials) count(to netip.AddrPort) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to[to]
}

func TestAFailedInstanceIsEjected(t *testing.T) {
	var d dials
	m := newMesh(t, d.option)
	a := m.app()
	dead := m.remote("dead", m.silent())
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	begin := time.Now()
	for i := range 40 {
		client := m.dial(at)
		say(t, client, "x")
		hear(t, a.accept(), "x")
		client.Close()
		if i == 0 && d.count(dead.Mesh) == 0 { // not drawn first: make sure that it is ejected
			m.proxy.balancer.failed(dead, syscall.ECONNREFUSED)
		}
	}
	if n := d.count(dead.Mesh); n > 1+int(time.Since(begin)/minEjection) {
		t.Errorf("the dead instance was dialled %d times of 40", n)
	}
	instances := m.proxy.Status().Services[0].Instances
	i := slices.IndexFunc(instances, func(s admin.Instance) bool { return s.ID == "dead" })
	if time.Since(begin) < minEjection && instances[i].Ejected == "" {
		t.Errorf("status does not show the ejection: %+v", instances[i])
	}
}

func TestAnInstanceAddressIsThatInstanceOnly(t *testing.T) {
	var d dials
	m := newMesh(t, d.option)
	a := m.app()
	dead := m.remote("dead", m.silent())
	good := m.instance("api", "api-1", a.addr())
	m.publish()
	m.refused(m.origin(dead.Address), admin.Outbound, catalog.ReasonConnectFailed)
	if d.count(dead.Mesh) != 1 || d.count(good.Mesh) != 0 {
		t.Fatalf("dialled %v", d.to)
	}
	client := m.dial(m.origin(good.Address))
	say(t, client, "x")
	hear(t, a.accept(), "x")
}

func TestFaultsOfThisNodeEjectNobody(t *testing.T) {
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(context.Context, netip.AddrPort) (*net.TCPConn, error) {
			return nil, &net.OpError{Op: "dial", Err: syscall.EMFILE}
		}
	})
	inst := m.remote("api-1", m.silent())
	m.publish()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonConnectFailed)
	if why := m.proxy.balancer.why(inst); why != "" {
		t.Fatalf("ejected: %s", why)
	}
}

func TestAllowedConnectionsAreCutByADeny(t *testing.T) {
	m := newMesh(t)
	m.rule(policy.Allow)
	client, server := m.pair()
	say(t, client, "x")
	hear(t, server, "x")
	stop := make(chan struct{})
	go func() { // it copies while it is cut
		defer close(stop)
		io.Copy(client, neverEnding{})
	}()
	m.rule(policy.Deny)
	begin := time.Now()
	generation := m.publish()
	t.Logf("in force and cut after %s", time.Since(begin))
	wantReset(t, server)
	<-stop
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, io.EOF) {
		t.Errorf("the client reads %v", err)
	}
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		e := m.events.wait(t, "close", is(admin.EventClose, direction))
		if e.Verdict != admin.Denied || e.Reason != catalog.ReasonIntention || e.Generation != generation || e.Intention != "web => api (deny), intentions.hcl:1" {
			t.Errorf("%+v", e)
		}
	}
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonIntention)
}

func TestADenyCutsEitherDirectionOnItsOwn(t *testing.T) {
	t.Run("inbound", func(t *testing.T) {
		m := newMesh(t)
		a := m.app()
		at := m.instance("api", "api-1", a.addr()).Mesh
		m.publish()
		peer := m.peer(at, m.leaf("web"))
		say(t, peer, "x")
		server := a.accept()
		hear(t, server, "x")
		m.rule(policy.Deny)
		m.publish()
		wantReset(t, server)
		wantReset(t, peer) // and no close_notify, which would read as an orderly end
	})
	t.Run("outbound", func(t *testing.T) {
		m := newMesh(t)
		m.remote("api-1", m.tlsServer(&tls.Config{Certificates: []tls.Certificate{*m.leaf("api")}, ClientAuth: tls.RequireAnyClientCert}))
		m.publish()
		client := m.dial(m.origin(apiVIP()))
		m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))
		m.rule(policy.Deny)
		m.publish()
		wantReset(t, client)
	})
}

func TestADenyCutsAConnectionThatIsStillDialling(t *testing.T) {
	dialling := make(chan struct{}, 1)
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, _ netip.AddrPort) (*net.TCPConn, error) {
			dialling <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	inst := m.remote("api-1", m.silent())
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	<-dialling
	m.rule(policy.Deny)
	m.publish()
	wantReset(t, client)
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Outbound))
	if e.Reason != catalog.ReasonIntention || e.Generation != 2 {
		t.Errorf("%+v", e)
	}
	if m.proxy.balancer.why(inst) != "" {
		t.Error("the instance was ejected for it")
	}
}

func TestADenyCutsADeliveryUnderWay(t *testing.T) {
	delivering := make(chan struct{}, 1)
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.deliver = func(ctx context.Context, _ *workload.Served, _ netip.AddrPort) (net.Conn, error) {
			delivering <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	at := m.instance("api", "api-1", "").Mesh
	m.publish()
	peer := m.peer(at, m.leaf("web"))
	if err := peer.Handshake(); err != nil {
		t.Fatal(err)
	}
	<-delivering
	m.rule(policy.Deny)
	m.publish()
	wantReset(t, peer)
	if e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound)); e.Reason != catalog.ReasonIntention {
		t.Errorf("%+v", e)
	}
}

func TestACondemnedConnectionTakesNothingMore(t *testing.T) {
	c := newConnection(1, admin.Outbound)
	denied := errors.New("denied")
	c.condemn(denied, nil)
	ours, theirs := tcpPair(t)
	if err := c.hold(ours); !errors.Is(err, denied) {
		t.Errorf("hold: %v", err)
	}
	wantReset(t, theirs)
	if err := c.open(); !errors.Is(err, denied) {
		t.Errorf("open: %v", err)
	}
	if e := c.finish(nil); e.Event != admin.EventDenied || e.Detail != "denied" {
		t.Errorf("%+v", e)
	}
}

func TestUnconcernedConnectionsSurviveAPolicyChange(t *testing.T) {
	m := newMesh(t)
	client, server := m.pair()
	m.rules = []policy.Intention{{Source: "batch", Destination: "api", Action: policy.Deny}}
	m.publish()
	say(t, client, "still here")
	hear(t, server, "still here")
}

func TestVerdictsAreInTheOrderOfGenerations(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	go func() {
		for conn := range a.conns {
			go io.Copy(conn, conn)
		}
	}()
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := net.DialTimeout("tcp", at, patience)
				if err != nil {
					continue // reset while connecting
				}
				conn.SetDeadline(time.Now().Add(patience))
				io.WriteString(conn, "x")
				conn.Read(make([]byte, 1))
				conn.Close()
			}
		})
	}
	verdicts := func() (points []verdict) {
		events, _ := m.events.all()
		for _, e := range events {
			if e.Sequence != 0 {
				points = append(points, verdict{policy.Verdict{Generation: e.Generation}, e.Sequence})
			}
		}
		return points
	}
	for i := 0; i < 60 || len(verdicts()) < 200; i++ {
		m.rule(policy.Action(i % 2))
		m.publish()
	}
	close(stop)
	callers.Wait()
	m.shutdown()
	a.ln.Close()
	close(a.conns)
	wantOrder(t, verdicts())
}

// wantOrder fails when a verdict of an older generation follows one of a newer.
func wantOrder(t *testing.T, all []verdict) {
	t.Helper()
	slices.SortFunc(all, func(a, b verdict) int { return cmp.Compare(a.sequence, b.sequence) })
	for i := 1; i < len(all); i++ {
		if all[i].Generation < all[i-1].Generation {
			t.Fatalf("verdict %d of generation %d follows verdict %d of generation %d", all[i].sequence, all[i].Generation, all[i-1].sequence, all[i-1].Generation)
		}
	}
}

func TestGateOrdersVerdictsUnderConcurrentSwaps(t *testing.T) {
	var g gate
	swap := func(generation uint64) {
		p, err := policy.Compile(generation, policy.Action(generation%2), policy.Identity{TrustDomain: trustDomain}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		g.swap(&state{snap: &catalog.Snapshot{Policy: p}})
	}
	swap(1)
	src := policy.Identity{TrustDomain: trustDomain, Service: "web"}
	var done atomic.Bool
	var readers sync.WaitGroup
	results := make([][]verdict, 4)
	for i := range results {
		readers.Go(func() {
			for !done.Load() && len(results[i]) < 100000 {
				v := g.decide(src, "api")
				if v.Allowed != (v.Generation%2 == 1) {
					t.Errorf("generation %d decided %v", v.Generation, v.Allowed)
				}
				results[i] = append(results[i], v)
			}
		})
	}
	for generation := range uint64(2000) {
		swap(generation + 2)
	}
	done.Store(true)
	readers.Wait()
	all := slices.Concat(results...)
	wantOrder(t, all)
	if n := len(slices.CompactFunc(all, func(a, b verdict) bool { return a.sequence == b.sequence })); n != len(all) {
		t.Errorf("%d verdicts share %d sequence numbers", len(all), n)
	}
}

func TestRotationDoesNotDisturbLiveConnections(t *testing.T) {
	m := newMesh(t)
	client, server := m.pair()
	say(t, client, "old")
	hear(t, server, "old")
	m.trust(mtlstest.NewRoot(t)) // leaves and root, all at once
	m.publish()
	say(t, client, "still")
	hear(t, server, "still")
	a := m.app()
	m.instance("web", "web-1", a.addr())
	m.publish()
	fresh := m.dial(m.origin(netip.AddrPortFrom(vip["web"], 80)))
	say(t, fresh, "new")
	hear(t, a.accept(), "new")
	say(t, client, "and still")
	hear(t, server, "and still")
}

func TestTheAddressAndNotTheSNISelectsTheCertificate(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	at := map[string]netip.AddrPort{"api": m.instance("api", "api-1", a.addr()).Mesh, "web": m.instance("web", "web-1", a.addr()).Mesh}
	m.publish()
	for service, addr := range at {
		peer := m.peer(addr, m.leaf("web"))
		if err := peer.Handshake(); err != nil {
			t.Fatal(err)
		}
		if got := peer.ConnectionState().PeerCertificates[0].URIs[0].String(); got != spiffe(service) {
			t.Errorf("%s shows the certificate of %s", service, got)
		}
	}
	config := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*m.leaf("web")}, ServerName: "web.default.dc1.internal." + trustDomain}
	peer := tls.Client(m.dial(at["api"].String()), config)
	if err := peer.Handshake(); err == nil {
		t.Error("the SNI of another service was accepted")
	}
}

func TestPerWorkloadCapSparesTheNeighbour(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.PerWorkload = 3 })
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.next.Leaves["batch"] = m.leaf("batch")
	m.publish()
	at := m.originOf(7, apiVIP())
	var held []*net.TCPConn
	for range 3 {
		client := m.dial(at)
		say(t, client, "x")
		server := a.accept()
		hear(t, server, "x")
		held = append(held, client)
	}
	e := m.refused(at, admin.Outbound, catalog.ReasonCapacity)
	if e.Source.Workload != "/cg/web" {
		t.Errorf("%+v", e)
	}
	// A neighbour reaches the same instance, through this node and from elsewhere.
	neighbour := m.peer(m.next.Services["api"].Instances[0].Mesh, m.leaf("batch"))
	say(t, neighbour, "y")
	hear(t, a.accept(), "y")
	// The destination protects itself as well: it counts what one source has.
	greedy := m.peer(m.next.Services["api"].Instances[0].Mesh, m.leaf("web"))
	greedy.Handshake()
	wantReset(t, greedy)
	if e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound)); e.Reason != catalog.ReasonCapacity {
		t.Errorf("%+v", e)
	}
	// A place is free again when a connection ends.
	held[0].SetLinger(0)
	held[0].Close()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	client := m.dial(at)
	say(t, client, "z")
	hear(t, a.accept(), "z")
}

func TestGlobalCap(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Connections = 2 }) // one connection here is two
	client, server := m.pair()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonCapacity)
	client.Close()
	server.Close()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	m.dial(m.origin(apiVIP()))
	m.events.waitN(t, "open", 2, is(admin.EventOpen, admin.Outbound))
}

func TestMaxInboundConnections(t *testing.T) {
	m := newMesh(t)
	m.next.Services["api"].MaxInbound = 1
	client, server := m.pair()
	say(t, client, "x")
	hear(t, server, "x")
	delivered := m.kernel.deliveries()
	m.wantRefused(m.origin(apiVIP()))
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
	if e.Reason != catalog.ReasonCapacity || m.kernel.deliveries() != delivered {
		t.Errorf("%+v after %d deliveries", e, m.kernel.deliveries())
	}
}

func TestSlowHandshakesMeetTheirCapAndSpareOthers(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Handshakes = 8 })
	a := m.app()
	flooded := m.instance("api", "api-1", m.silent().String()).Mesh
	m.instance("web", "web-1", a.addr())
	m.publish()
	for range 50 { // connected, and silent
		conn, err := net.DialTimeout("tcp", flooded.String(), patience)
		if err == nil {
			m.owned(conn)
		}
	}
	// One address may have half of the eight.
	denied := m.events.waitN(t, "capacity", 46, is(admin.EventDenied, admin.Inbound))
	for _, e := range denied {
		if e.Reason != catalog.ReasonCapacity || e.Destination.Instance != "api-1" {
			t.Fatalf("%+v", e)
		}
	}
	eventually(t, "four handshakes in progress", func() bool { return m.proxy.live.len() == 4 })
	for range 10 {
		client := m.dial(m.origin(netip.AddrPortFrom(vip["web"], 80)))
		say(t, client, "x")
		hear(t, a.accept(), "x")
	}
}

func TestASlowHandshakeEndsAtItsDeadline(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Handshake = 100 * time.Millisecond })
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.publish()
	conn := m.dial(at.String())
	say(t, conn, "\x16\x03\x01") // the beginning of a record
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
	if e.Reason != catalog.ReasonHandshakeFailed {
		t.Errorf("%+v", e)
	}
	m.neverDelivered()
}

func TestConnectTimeoutIsTheServices(t *testing.T) {
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, _ netip.AddrPort) (*net.TCPConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	for i := range 5 {
		m.remote(fmt.Sprintf("api-%d", i), m.silent())
	}
	svc := *m.next.Services["api"]
	svc.ConnectTimeout = 100 * time.Millisecond
	m.next.Services["api"] = &svc
	m.publish()
	begin := time.Now()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonConnectFailed)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("gave up after %s, want about two timeouts of 100 ms", took)
	}
}

func TestDrainLetsConnectionsEnd(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = patience })
	client, server := m.pair()
	m.stop()
	m.kernel.serving.Wait()
	say(t, client, "last words")
	hear(t, server, "last words")
	select {
	case <-m.finished:
		t.Fatal("Run returned with a live connection")
	default:
	}
	client.Close()
	server.Close()
	if err := m.shutdown(); err != nil {
		t.Fatal(err)
	}
	if e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound)); e.Verdict != admin.Allowed || e.Reason != "" {
		t.Errorf("%+v", e)
	}
}

func TestADenyCutsWhileDraining(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = time.Hour })
	client, _ := m.pair()
	m.stop()
	m.kernel.serving.Wait()
	m.rule(policy.Deny)
	m.next.Generation++
	p, _ := policy.Compile(m.next.Generation, policy.Deny, policy.Identity{TrustDomain: trustDomain}, nil, m.rules)
	m.next.Policy = p
	snap, err := catalog.New(m.next)
	if err != nil {
		t.Fatal(err)
	}
	m.source.snapshots <- snap
	wantReset(t, client)
	m.shutdown()
}

func TestDrainDeadlineResets(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = 100 * time.Millisecond })
	client, server := m.pair()
	half := m.dial(m.next.Services["api"].Instances[0].Mesh.String()) // a handshake in progress
	eventually(t, "the handshake is in the table", func() bool { return m.proxy.live.len() == 3 })
	if err := m.shutdown(); err != nil {
		t.Fatal(err)
	}
	wantReset(t, client)
	wantReset(t, server)
	wantReset(t, half)
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		if e := m.events.wait(t, "close", is(admin.EventClose, direction)); e.Reason != catalog.ReasonDrain || e.Verdict != admin.Denied {
			t.Errorf("%+v", e)
		}
	}
}

func TestRunReportsWhoFailed(t *testing.T) {
	broken := errors.New("broken")
	m := newMesh(t, func(_ *Config, k *fakeKernel) { k.err = broken })
	if err := m.shutdown(); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	m = newMesh(t, func(c *Config, _ *fakeKernel) { c.Source.(*fakeSource).err = broken })
	if err := <-m.finished; !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	} else {
		m.finished <- err
	}
}

func TestApplyIsTriedAgain(t *testing.T) {
	var tries atomic.Int32
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.apply = func(*catalog.Snapshot) error {
			if tries.Add(1) == 1 {
				return errors.New("map is full")
			}
			return nil
		}
	})
	m.publish() // returns when it was applied
	if tries.Load() != 2 {
		t.Errorf("%d tries", tries.Load())
	}
}

func TestAnOlderSnapshotIsDropped(t *testing.T) {
	m := newMesh(t)
	m.publish()
	old := m.proxy.gate.current().snap
	m.publish()
	m.source.snapshots <- old
	eventually(t, "the old snapshot is taken", func() bool { return len(m.proxy.offers) == 0 })
	m.publish() // fails when the kernel is asked to apply anything before it
}

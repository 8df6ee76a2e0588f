package nodeproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/nodeproxy/workload"
)

// TestATunnelIsUsedForItsOwnPairAlone has one tunnel ready, and no other made.
func TestATunnelIsUsedForItsOwnPairAlone(t *testing.T) {
	var full atomic.Bool
	m := newMesh(t, tunnelled, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
			if full.Load() {
				return nil, errors.New("there shall be no other tunnel")
			}
			return dialTCP(ctx, to.String())
		}
	})
	api := m.instance("api", "api-1", m.echoing())
	other := *api
	other.Datacenter = "dc2"
	m.alias(&catalog.Target{Service: "api", Datacenter: "dc2", Instances: []*catalog.Instance{&other}})
	m.publish()
	own := m.origin(apiVIP())
	first := m.kernel.origins[m.cookie]
	as := func(destination netip.AddrPort, change func(*workload.Origin)) string {
		at := m.origin(destination)
		o := *first
		o.Destination = destination
		change(&o)
		m.kernel.mu.Lock()
		defer m.kernel.mu.Unlock()
		m.kernel.origins[m.cookie] = &o
		return at
	}
	ready := func() {
		eventually(t, "a tunnel is ready", func() bool { return m.proxy.tunnels.pool.Idle() > 0 })
	}
	exchange(t, m, own)
	ready()
	full.Store(true)
	exchange(t, m, as(apiVIP(), func(*workload.Origin) {}))
	for name, at := range map[string]string{
		"of another workload":  as(apiVIP(), func(o *workload.Origin) { o.Workload = &workload.Workload{ID: 8, Service: "web"} }),
		"of another service":   as(apiVIP(), func(o *workload.Origin) { o.Workload = &workload.Workload{ID: 7, Service: "api"} }),
		"in another namespace": as(apiVIP(), func(o *workload.Origin) { o.Namespace = &workload.Namespace{Cookie: 1000} }),
		"from another address": as(apiVIP(), func(o *workload.Origin) { o.Client = netip.MustParseAddrPort("10.0.0.6:4711") }),
		"to another identity":  as(netip.MustParseAddrPort("240.0.0.9:80"), func(*workload.Origin) {}),
	} {
		ready()
		t.Log(name)
		m.wantRefused(at)
	}
	ready()
	exchange(t, m, own)
}

// TestWhatHasExpiredOpensNoStream lets certificates expire while tunnels are ready, and no snapshot comes.
func TestWhatHasExpiredOpensNoStream(t *testing.T) {
	m := newMesh(t, tunnelled)
	short := m.root.Leaf(t, spiffe("web"), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(3 * time.Second) })
	m.next.Leaves = map[string]*tls.Certificate{"web": short, "api": m.next.Leaves["api"]}
	silent := m.silent().String()
	api, web := m.instance("api", "api-1", silent), m.instance("web", "web-1", silent)
	m.publish()
	from, to := m.tunnelTo(api.Mesh, "web"), m.tunnelTo(web.Mesh, "api")
	ends := map[string]*far{"the source's": from, "the destination's": to}
	for whose, f := range ends {
		if err := f.Ping(time.Now().Add(patience)); err != nil || !f.Alive() {
			t.Fatalf("before %s has expired: %v", whose, err)
		}
	}
	<-time.After(time.Until(short.Leaf.NotAfter) + time.Millisecond)
	for whose, f := range ends {
		if f.Alive() {
			t.Errorf("%s has expired, and the tunnel may be used", whose)
		}
		if err := f.open(newOpening("10.0.0.1:1"), roomFor("x")); !errors.Is(err, errTunnelEnded) && !errors.Is(err, errTruncated) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s has expired, and an opening is answered with %v", whose, err)
		}
	}
	m.neverDelivered()
}

func TestAnOpeningIsForTheInstanceThatTheTunnelLeadsTo(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	m.kernel.mu.Lock()
	m.kernel.served[at] = &workload.Served{Instance: "web-1", Service: "web"}
	m.kernel.mu.Unlock()
	wantRefusal(t, f.open(newOpening("10.0.0.1:1"), roomFor("x")), catalog.ReasonUnknownService)
	m.kernel.forget()
	wantRefusal(t, f.open(newOpening("10.0.0.1:1"), roomFor("x")), catalog.ReasonUnknownWorkload)
	m.neverDelivered()
}

// wantClosed waits until the other side closes a tunnel without a stream.
func (f *far) wantClosed(when string) {
	f.t.Helper()
	f.conn.SetDeadline(time.Now().Add(patience))
	if _, err := f.next(); !errors.Is(err, errTunnelEnded) && !errors.Is(err, errTruncated) && !errors.Is(err, syscall.ECONNRESET) {
		f.t.Errorf("%s a tunnel goes on: %v", when, err)
	}
}

func TestATunnelOfAnHourHasNoOtherStream(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	eventually(t, "the other end is ready", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 1 })
	m.proxy.tunnels.mu.Lock()
	for e := range m.proxy.tunnels.ends {
		e.mu.Lock()
		e.link.born = time.Now().Add(-tunnel.MaxLife)
		e.mu.Unlock()
	}
	m.proxy.tunnels.mu.Unlock()
	if err := f.open(newOpening("10.0.0.1:1"), batch{}); err != nil {
		t.Fatal(err)
	}
	a.accept().Close()
	f.closeWrite()
	if _, err := f.next(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	f.wantClosed("after an hour and its stream")
}

func TestIdleTunnelsAreBoundedAndOneTooManyIsGoodForOneStream(t *testing.T) {
	m := newMesh(t, tunnelled, func(c *Config, _ *fakeKernel) {
		c.Limits.Connections, c.Limits.Handshake = 4*idleShare, 2*time.Second
	})
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	for range 4 {
		m.tunnelTo(at, "web")
	}
	eventually(t, "all places are taken", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 4 })
	useful, silent := m.tunnelTo(at, "web"), m.tunnelTo(at, "web")
	if err := useful.open(newOpening("10.0.0.1:1"), roomFor("x")); err != nil {
		t.Fatal(err)
	}
	server := a.accept()
	hear(t, server, "x")
	if _, err := silent.next(); err == nil {
		t.Error("it is answered")
	}
	say(t, server, "y")
	useful.hears("y")
	server.Close()
	useful.closeWrite()
	if _, err := useful.next(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if _, err := useful.next(); err == nil {
		t.Error("a tunnel too many is kept after its stream")
	}
	eventually(t, "the bound holds", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 4 })
}

func TestAnIdleTunnelDoesNotWaitForTheRestOfAFrame(t *testing.T) {
	m := newMesh(t, tunnelled, func(c *Config, _ *fakeKernel) { c.Limits.Handshake = time.Second })
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.publish()
	whole, begun := m.tunnelTo(at, "web"), m.tunnelTo(at, "web")
	eventually(t, "both are idle", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 2 })
	for range 2 {
		if err := whole.Ping(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	begun.seal(make([]byte, 1, 2))
	if _, err := begun.next(); err == nil {
		t.Error("it is answered")
	}
	eventually(t, "one is left", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 1 })
	if err := whole.Ping(time.Now().Add(patience)); err != nil {
		t.Errorf("what was pinged was closed with it: %v", err)
	}
}

func TestNewCertificatesAndRootsRetireTunnels(t *testing.T) {
	for name, change := range map[string]func(*mesh){
		"the source's leaf":      func(m *mesh) { m.renew("web") },
		"the destination's leaf": func(m *mesh) { m.renew("api") },
		"the roots":              func(m *mesh) { m.trust(mtlstest.NewRoot(m.t)) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, tunnelled)
			at := m.echo()
			busy := m.dial(at)
			say(t, busy, "before")
			hear(t, busy, "before")
			exchange(t, m, at)
			eventually(t, "there is an idle tunnel", func() bool { return m.proxy.Status().Connections.Tunnels.Outbound > 0 })
			before := m.ends()
			change(m)
			m.publish()
			eventually(t, "the idle tunnels of before are closed", func() bool { return shared(before, m.ends()) <= 1 })
			say(t, busy, "after")
			hear(t, busy, "after")
			exchange(t, m, at)
			busy.CloseWrite()
			wantEOF(t, busy)
			eventually(t, "the busy one is, after its stream", func() bool { return shared(before, m.ends()) == 0 })
		})
	}
}

// TestEachSideClosesTunnelsOfEarlierTermsByItself has terms change on one side alone.
func TestEachSideClosesTunnelsOfEarlierTermsByItself(t *testing.T) {
	for name, change := range map[string]func(m *mesh, own string){
		"its own leaf": func(m *mesh, own string) { m.renew(own) },
		"a root more":  func(m *mesh, _ string) { m.next.Roots = append(slices.Clone(m.next.Roots), mtlstest.NewRoot(m.t).Cert) },
	} {
		t.Run(name, func(t *testing.T) {
			far := newMesh(t, tunnelled)
			at := far.instance("api", "api-1", far.echoing()).Mesh
			far.publish()
			near := newMesh(t, tunnelled)
			near.trust(far.root)
			near.remote("api-1", at)
			near.publish()
			exchange(t, near, near.origin(apiVIP()))
			eventually(t, "a tunnel is ready", func() bool { return near.proxy.tunnels.pool.Idle() > 0 })
			change(near, "web")
			near.publish()
			eventually(t, "the source has closed it", func() bool { return near.proxy.tunnels.pool.Idle() == 0 })
			f := far.tunnelTo(at, "web")
			if err := f.Ping(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			change(far, "api")
			far.publish()
			f.wantClosed("once the destination's terms are others")
		})
	}
}

// renew replaces the leaf of one service.
func (m *mesh) renew(service string) {
	leaves := map[string]*tls.Certificate{"web": m.next.Leaves["web"], "api": m.next.Leaves["api"]}
	leaves[service] = m.leaf(service)
	m.next.Leaves = leaves
}

// ends are the tunnels that lead here, by their other end.
func (m *mesh) ends() (all []netip.AddrPort) {
	m.proxy.tunnels.mu.Lock()
	defer m.proxy.tunnels.mu.Unlock()
	for e := range m.proxy.tunnels.ends {
		all = append(all, e.client)
	}
	return all
}

func shared(a, b []netip.AddrPort) (n int) {
	for _, x := range a {
		if slices.Contains(b, x) {
			n++
		}
	}
	return n
}

func TestATunnelThatHasOnlyAHandshakesPlaceGivesWay(t *testing.T) {
	m := newMesh(t, tunnelled, func(c *Config, _ *fakeKernel) { c.Limits.Connections, c.Limits.Handshakes = idleShare, 2 })
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	m.tunnelTo(at, "web")
	eventually(t, "it has the place of idle tunnels", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 1 })
	silent := m.tunnelTo(at, "web")
	eventually(t, "the second is ready", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 2 })
	m.proxy.handshakes.mu.Lock()
	for _, s := range m.proxy.handshakes.scopes {
		for e := s[answered].Front(); e != nil; e = e.Next() {
			e.Value.(*handshake).since = time.Now().Add(-2 * slowHandshake)
		}
	}
	m.proxy.handshakes.mu.Unlock()
	useful := m.tunnelTo(at, "web")
	if _, err := silent.next(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	if err := useful.open(newOpening("10.0.0.1:1"), roomFor("x")); err != nil {
		t.Fatal(err)
	}
	hear(t, a.accept(), "x")
}

func TestATunnelThatTheOtherSideClosedIsReplacedUnnoticed(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.echo()
	for range 20 {
		exchange(t, m, at)
		m.proxy.tunnels.retireEnds(func(*tunnelEnd) bool { return true })
	}
}

func TestLegsAllocateNothingForAnOperation(t *testing.T) {
	pool := newBuffers()
	near, far := linkPair(t, pool)
	client, server := securePair(t, pool)
	here, there := tcpPair(t)
	plain, errNear := newPlainLeg(here, pool)
	application, errFar := newPlainLeg(there, pool)
	if err := errors.Join(errNear, errFar); err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2]leg{"a tunnel's": {near, far}, "plain Connect": {client, server}, "an application's": {plain, application}} {
		piece := roomFor(text(1000))
		whole := piece.spans[0]
		n := testing.AllocsPerRun(200, func() {
			piece.spans[0] = whole // which a write uses up
			if err := pair[0].write(piece); err != nil {
				t.Fatal(err)
			}
			if _, err := pair[1].next(); err != nil {
				t.Fatal(err)
			}
			pair[1].release()
		})
		if n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// linkOver makes l the end of a tunnel.
func linkOver(l *secureLeg, server bool) *link {
	return &link{channel: channel{conn: l.conn, socket: l.socket, records: l.records}, session: tunnel.NewSession(server)}
}

// linkPair is both ends of a tunnel with a stream.
func linkPair(t testing.TB, pool *buffers) (client, server *link) {
	c, s := securePair(t, pool)
	client, server = linkOver(c, false), linkOver(s, true)
	done := make(chan error, 1)
	go func() {
		_, err := server.awaitOpening(time.Now().Add(patience), patience)
		done <- errors.Join(err, server.control(tunnel.Accepted, nil))
	}()
	if err := errors.Join(client.open(newOpening("10.0.0.1:1"), batch{}), <-done); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestAnIdleTunnelHoldsNoBuffer(t *testing.T) {
	client, server := linkPair(t, newBuffers())
	if err := client.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := server.next(); err != nil {
		t.Fatal(err)
	}
	server.release()
	if err := errors.Join(client.closeWrite(), server.closeWrite()); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*link{client, server} {
		if _, err := l.next(); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if !l.ready() || l.in != nil {
			t.Error("it is not ready, or holds a buffer")
		}
	}
}

package nodeproxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/tunnel"
)

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

func TestStreamsAllocateNothingForAnOperation(t *testing.T) {
	pool := newBuffers()
	client, server := linkPair(t, pool)
	piece := roomFor(text(1000))
	n := testing.AllocsPerRun(200, func() {
		if err := client.write(piece); err != nil {
			t.Fatal(err)
		}
		if _, err := server.next(); err != nil {
			t.Fatal(err)
		}
		server.release()
	})
	if n > 0 {
		t.Errorf("%v allocations", n)
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

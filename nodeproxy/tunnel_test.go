package nodeproxy

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

// countDials counts the connections that a mesh makes to mesh addresses.
func countDials(n *atomic.Int64) option {
	return func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
			n.Add(1)
			return dialTCP(ctx, to.String())
		}
	}
}

// exchange makes one connection to an echoing application.
func exchange(t testing.TB, m *mesh, at string) {
	t.Helper()
	conn := m.dial(at)
	say(t, conn, "ping")
	hear(t, conn, "ping")
	conn.CloseWrite()
	wantEOF(t, conn)
	conn.Close()
}

func TestConnectionsFollowOneAnotherThroughATunnel(t *testing.T) {
	var made atomic.Int64
	m := newMesh(t, tunnelled, countDials(&made))
	at := m.echo()
	const n = 200
	for range n {
		exchange(t, m, at)
	}
	if got := made.Load(); got > n/4 {
		t.Errorf("%d dials for %d connections", got, n)
	}
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		shaken := 0
		for _, e := range m.events.waitN(t, "close", n, is(admin.EventClose, direction)) {
			if e.Path != admin.PathTunnel || e.Sent != 4 || e.Received != 4 || e.Detail != "" || e.Destination.Instance != "api-1" ||
				e.Source.Identity != spiffe("web") || e.Sequence == 0 {
				t.Fatalf("%+v", e)
			}
			if e.Handshake > 0 {
				shaken++
			}
		}
		if shaken == 0 || shaken > int(made.Load()) {
			t.Errorf("%s: %d streams tell of a handshake, of which there were %d", direction, shaken, made.Load())
		}
	}
	eventually(t, "only idle tunnels are left, and status counts them", func() bool {
		s := m.proxy.Status().Connections
		return s.Active == 0 && s.Tunnels.Outbound > 0 && s.Tunnels.Outbound == s.Tunnels.Inbound
	})
	m.proxy.slots.mu.Lock()
	for key, taken := range m.proxy.slots.taken {
		if key.what != "idle tunnels" {
			t.Errorf("an idle tunnel takes %d of %s", taken, key)
		}
	}
	m.proxy.slots.mu.Unlock()
	m.shutdown()
	if s := m.proxy.Status().Connections; s.Tunnels != (admin.Tunnels{}) {
		t.Errorf("after Run there are %+v", s.Tunnels)
	}
}

// far is the other node of a tunnel, played by the test.
type far struct {
	*link
	t testing.TB
}

// tunnelTo makes a tunnel to a mesh address as a service of another node.
func (m *mesh) tunnelTo(at netip.AddrPort, source string) *far {
	m.t.Helper()
	conn := m.dial(at.String())
	w, err := newWire(conn, m.proxy.buffers)
	if err != nil {
		m.t.Fatal(err)
	}
	inst, _ := m.proxy.gate.current().snap.InstanceByMesh(at)
	secure, peer, err := m.proxy.gate.current().credentials.Connect(w, source, &catalog.Target{Service: inst.Service}, tunnel.ALPN)
	if err != nil {
		m.t.Fatal(err)
	}
	if secure.ConnectionState().NegotiatedProtocol != tunnel.ALPN {
		m.t.Fatal("no tunnel was negotiated")
	}
	return &far{newLink(secure, w, peer, false), m.t}
}

func newOpening(source string) (o tunnel.Opening) {
	rand.Read(o.ID[:])
	o.Source = netip.MustParseAddrPort(source)
	return o
}

// hears reads what comes over the stream.
func (f *far) hears(text string) {
	f.t.Helper()
	p, err := f.next()
	if err != nil || string(p[headroom:]) != text {
		f.t.Fatalf("%q, %v; want %q", p, err, text)
	}
	f.release()
}

func (f *far) finishes() {
	f.t.Helper()
	if err := f.closeWrite(); err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.next(); !errors.Is(err, io.EOF) {
		f.t.Fatalf("got %v, want the end", err)
	}
	if !f.ready() {
		f.t.Fatal("the tunnel is not ready for another stream")
	}
}

func wantRefusal(t testing.TB, err error, reason catalog.Reason) {
	t.Helper()
	if refusal, ok := errors.AsType[*farRefusal](err); !ok || refusal.reason != reason {
		t.Fatalf("got %v, want the refusal %s", err, reason)
	}
}

func TestFirstBytesComeWithTheOpening(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	for range 3 {
		if err := f.open(newOpening("10.0.0.1:1"), roomFor("request")); err != nil {
			t.Fatal(err)
		}
		server := a.accept()
		hear(t, server, "request")
		say(t, server, "answer")
		f.hears("answer")
		server.Close()
		f.finishes()
	}
}

func TestARefusedStreamLeavesTheTunnelForOthers(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	m.rule(policy.Deny)
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	for range 3 {
		wantRefusal(t, f.open(newOpening("10.0.0.1:1"), roomFor(text(60000))), catalog.ReasonIntention)
	}
	m.neverDelivered()
	other := m.tunnelTo(at, "api") // of another pair, which is allowed
	if err := other.open(newOpening("10.0.0.1:1"), nil); err != nil {
		t.Fatal(err)
	}
	a.accept()
	wantRefusal(t, f.open(newOpening("10.0.0.1:1"), nil), catalog.ReasonIntention)
	m.rule(policy.Allow)
	m.publish()
	if err := f.open(newOpening("10.0.0.1:1"), roomFor("now")); err != nil {
		t.Fatal(err)
	}
	hear(t, a.accept(), "now")
	if n := len(m.events.waitN(t, "denied", 4, is(admin.EventDenied, admin.Inbound))); n != 4 {
		t.Errorf("%d denied events", n)
	}
	m.rule(policy.Deny)
	m.publish()
	if _, err := f.next(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a denied stream ends with %v, want a reset", err)
	}
}

func TestAnIDOpensOneStream(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	first, second, stranger := m.tunnelTo(at, "web"), m.tunnelTo(at, "web"), m.tunnelTo(at, "api")
	o := newOpening("10.0.0.1:1")
	if err := first.open(o, roomFor("x")); err != nil {
		t.Fatal(err)
	}
	a.accept()
	if err := second.open(o, roomFor("x")); !errors.Is(err, errDuplicate) {
		t.Errorf("got %v, want DUPLICATE", err)
	}
	if err := stranger.open(o, roomFor("x")); err != nil {
		t.Errorf("an id of web is taken for one of api's: %v", err)
	}
	if n := m.kernel.deliveries(); n != 2 {
		t.Errorf("%d deliveries", n)
	}
}

func TestAnIDThatWasRefusedMayComeAgain(t *testing.T) {
	var fails atomic.Bool
	m := newMesh(t, tunnelled)
	a := m.app()
	m.kernel.deliver = func(ctx context.Context, _ *workload.Served, _ netip.AddrPort) (net.Conn, error) {
		if fails.Load() {
			return nil, errors.New("nobody listens")
		}
		return dialTCP(ctx, a.addr())
	}
	at := m.instance("api", "api-1", "").Mesh
	m.publish()
	f, o := m.tunnelTo(at, "web"), newOpening("10.0.0.1:1")
	fails.Store(true)
	wantRefusal(t, f.open(o, roomFor("x")), catalog.ReasonDeliveryFailed)
	fails.Store(false)
	if err := f.open(o, roomFor("x")); err != nil {
		t.Fatal(err)
	}
	hear(t, a.accept(), "x")
}

func TestWhatIsMalformedClosesTheTunnel(t *testing.T) {
	for name, frame := range map[string]tunnel.Header{
		"DATA between streams":      {Type: tunnel.Data, Length: 1, Stream: 0},
		"a stream that is not next": {Type: tunnel.Open, Length: tunnel.OpeningSize, Stream: 2},
		"no such type":              {Type: 77, Stream: 1},
		"a server's frame":          {Type: tunnel.Accepted, Stream: 1},
		"RESET between streams":     {Type: tunnel.Reset, Stream: 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, tunnelled)
			at := m.instance("api", "api-1", m.silent().String()).Mesh
			m.publish()
			f := m.tunnelTo(at, "web")
			b := make([]byte, tunnel.HeaderSize+64)
			frame.Put(b)
			f.tls.Write(b)
			if _, err := f.next(); err == nil {
				t.Error("it is answered")
			}
			m.neverDelivered()
			eventually(t, "the tunnel is gone", func() bool { return m.proxy.Status().Connections.Tunnels.Inbound == 0 })
		})
	}
}

func TestRESETAndTheEndOfTLSResetTheApplication(t *testing.T) {
	for name, end := range map[string]func(*far){
		"RESET":              func(f *far) { f.control(tunnel.Reset, nil) },
		"close_notify":       func(f *far) { f.tls.CloseWrite() },
		"FIN":                func(f *far) { f.wire.CloseWrite() },
		"RST":                func(f *far) { f.reset() },
		"RESET after END":    func(f *far) { f.closeWrite(); f.control(tunnel.Reset, nil) },
		"FIN after END":      func(f *far) { f.closeWrite(); f.wire.CloseWrite() },
		"DATA after END":     func(f *far) { f.closeWrite(); f.write(roomFor("x")) },
		"OPEN in the stream": func(f *far) { f.control(tunnel.Open, make([]byte, tunnel.OpeningSize)) },
		"a wrong stream":     func(f *far) { f.session.Send(tunnel.Open); f.write(roomFor("x")) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, tunnelled)
			a := m.app()
			at := m.instance("api", "api-1", a.addr()).Mesh
			m.publish()
			f := m.tunnelTo(at, "web")
			if err := f.open(newOpening("10.0.0.1:1"), roomFor("x")); err != nil {
				t.Fatal(err)
			}
			server := a.accept()
			hear(t, server, "x")
			end(f)
			m.events.wait(t, "close", func(c admin.Connection) bool { return c.Event == admin.EventClose && c.Detail != "" })
			if !strings.HasSuffix(name, "after END") {
				wantReset(t, server)
				return
			}
			io.Copy(io.Discard, server)
			eventually(t, "the application is reset", func() bool {
				_, err := server.Write([]byte("x"))
				return err != nil
			})
		})
	}
}

func TestPingIsAnswered(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	for range 3 {
		if err := f.Ping(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	if !f.Alive() {
		t.Error("it is not alive after a ping")
	}
	if err := f.open(newOpening("10.0.0.1:1"), nil); err != nil {
		t.Fatal(err)
	}
}

func TestTheSourceAddressIsShownOnlyIfItIsTheSources(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	inst := m.instance("api", "api-1", a.addr())
	m.add(&catalog.Instance{ID: "web-9", Service: "web", Node: "node-2", Healthy: true, Address: netip.MustParseAddrPort("10.0.0.77:80")})
	m.add(&catalog.Instance{ID: "api-9", Service: "api", Node: "node-2", Healthy: true, Address: netip.MustParseAddrPort("10.0.0.78:80")})
	m.add(&catalog.Instance{ID: "web-8", Service: "web", Node: "node-1", Local: true, Healthy: true, Address: netip.MustParseAddrPort("10.0.0.79:80")})
	m.add(&catalog.Instance{ID: "web-7", Service: "web", Node: "node-2", Healthy: true, Address: netip.MustParseAddrPort("10.0.0.80:80")})
	m.kernel.owns = func(ip netip.Addr) bool { return ip == netip.MustParseAddr("10.0.0.80") }
	m.publish()
	f := m.tunnelTo(inst.Mesh, "web")
	peer := f.wire.LocalAddr().String()
	rejected := uint64(0)
	for _, tc := range []struct {
		claim string
		shown bool
	}{
		{"10.0.0.77:4000", true},  // an instance of web
		{"10.0.0.78:4000", false}, // of another service
		{"10.0.0.79:4000", false}, // of web, on this node
		{"10.0.0.80:4000", false}, // an address of this node, whatever the catalog says
		{"10.0.0.99:4000", false}, // of nobody
		{"10.0.0.77:0", false},    // no port
		{"127.0.0.1:4000", false}, // loopback, although it is the tunnel's peer
		{"[::1]:4000", false},
		{"0.0.0.0:4000", false},
		{"[::]:4000", false},
		{"224.0.0.1:4000", false},
		{"169.254.0.1:4000", false},
		{"[fe80::1]:4000", false},
		{"255.255.255.255:4000", false},
	} {
		if err := f.open(newOpening(tc.claim), nil); err != nil {
			t.Fatal(err)
		}
		a.accept().Close()
		f.finishes()
		m.kernel.mu.Lock()
		got := m.kernel.clients[len(m.kernel.clients)-1].String()
		m.kernel.mu.Unlock()
		want := tc.claim
		if !tc.shown {
			want = peer
			rejected++
		}
		if got != want {
			t.Errorf("%s: the application sees %s, want %s", tc.claim, got, want)
		}
	}
	if got := m.proxy.Status().Connections.SourceAddressRejected; got != rejected {
		t.Errorf("%d are counted, want %d", got, rejected)
	}
}

func TestMaxInboundCountsStreams(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	svc := *m.next.Services["api"]
	svc.MaxInbound = 1
	m.next.Services = map[string]*catalog.Service{"api": &svc, "web": m.next.Services["web"]}
	m.publish()
	first, second := m.tunnelTo(at, "web"), m.tunnelTo(at, "web")
	if err := first.open(newOpening("10.0.0.1:1"), nil); err != nil {
		t.Fatal(err)
	}
	server := a.accept()
	wantRefusal(t, second.open(newOpening("10.0.0.1:1"), nil), catalog.ReasonCapacity)
	server.Close()
	first.finishes()
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	if err := second.open(newOpening("10.0.0.1:1"), nil); err != nil {
		t.Errorf("the place was not given back: %v", err)
	}
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
	begun.tls.Write(make([]byte, 1))
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

func TestAnInstanceThatMakesNoTunnelsIsServedPlainAndNotAskedForTenMinutes(t *testing.T) {
	for name, protos := range map[string][]string{"it knows no ALPN": nil, "it insists on another": {"h2"}} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, tunnelled)
			offers := make(chan []string, 100)
			config := &tls.Config{Certificates: []tls.Certificate{*m.leaf("api")}, ClientAuth: tls.RequireAnyClientCert, NextProtos: protos}
			config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
				offers <- hello.SupportedProtos
				return nil, nil
			}
			at := m.tlsEcho(config)
			m.remote("api-1", at)
			m.publish()
			to := m.origin(apiVIP())
			exchange(t, m, to)
			if got := <-offers; !slices.Equal(got, []string{tunnel.ALPN}) {
				t.Errorf("%q was offered first", got)
			}
			for len(offers) > 0 {
				<-offers
			}
			exchange(t, m, to)
			if got := <-offers; len(got) != 0 {
				t.Errorf("%q was offered again", got)
			}
			for _, e := range m.events.waitN(t, "close", 2, is(admin.EventClose, admin.Outbound)) {
				if e.Path != admin.PathMTLS || e.Detail != "" {
					t.Errorf("%+v", e)
				}
			}
			m.proxy.tunnels.mu.Lock()
			until := m.proxy.tunnels.plain[at]
			m.proxy.tunnels.plain[at] = time.Now()
			m.proxy.tunnels.mu.Unlock()
			if rest := time.Until(until); rest > 10*time.Minute || rest < 9*time.Minute {
				t.Errorf("it is plain for %s", rest)
			}
			exchange(t, m, to)
			if got := <-offers; !slices.Equal(got, []string{tunnel.ALPN}) {
				t.Errorf("%q was offered after ten minutes", got)
			}
		})
	}
}

// tlsEcho is a Connect server that is not ours.
func (m *mesh) tlsEcho(config *tls.Config) netip.AddrPort {
	ln := m.listen()
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer raw.Close()
				raw.SetDeadline(time.Now().Add(patience))
				conn := tls.Server(raw, config)
				io.Copy(conn, conn)
				conn.CloseWrite()
			})
		}
	})
	m.t.Cleanup(func() {
		ln.Close()
		conns.Wait()
	})
	return addrPort(ln.Addr())
}

func TestOnlyOurALPNAloneMakesATunnel(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.publish()
	for name, tc := range map[string]struct {
		config *tls.Config
		want   string
	}{
		"none":             {&tls.Config{}, ""},
		"h2":               {&tls.Config{NextProtos: []string{"h2"}}, ""},
		"ours and another": {&tls.Config{NextProtos: []string{tunnel.ALPN, "h2"}}, ""},
		"ours by TLS 1.2":  {&tls.Config{NextProtos: []string{tunnel.ALPN}, MaxVersion: tls.VersionTLS12}, ""},
		"ours":             {&tls.Config{NextProtos: []string{tunnel.ALPN}}, tunnel.ALPN},
	} {
		config := tc.config.Clone()
		config.InsecureSkipVerify, config.Certificates = true, []tls.Certificate{*m.leaf("web")}
		conn := tls.Client(m.dial(at.String()), config)
		if err := conn.Handshake(); err != nil || conn.ConnectionState().NegotiatedProtocol != tc.want {
			t.Errorf("%s: %q, %v", name, conn.ConnectionState().NegotiatedProtocol, err)
		}
	}
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

func TestARefusalOfOneInstanceLeadsToAnother(t *testing.T) {
	var asked atomic.Int64
	m := newMesh(t, tunnelled)
	a := m.app()
	m.kernel.deliver = func(ctx context.Context, s *workload.Served, _ netip.AddrPort) (net.Conn, error) {
		if s.Instance == "api-1" {
			asked.Add(1)
			return nil, errors.New("nobody listens")
		}
		return dialTCP(ctx, a.addr())
	}
	m.instance("api", "api-1", "")
	m.instance("api", "api-2", "")
	m.publish()
	at := m.origin(apiVIP())
	for asked.Load() == 0 { // until the one that refuses was drawn first
		client := m.dial(at)
		say(t, client, "request")
		server := a.accept()
		hear(t, server, "request")
		say(t, server, "answer")
		hear(t, client, "answer")
		client.Close()
	}
	if n := len(a.conns); n != 0 {
		t.Errorf("%d connections too many", n)
	}
}

func TestAnInstanceThatIsFullIsNotEjected(t *testing.T) {
	var asked atomic.Int64
	m := newMesh(t, tunnelled)
	a := m.app()
	m.kernel.deliver = func(ctx context.Context, s *workload.Served, _ netip.AddrPort) (net.Conn, error) {
		if s.Instance == "api-1" {
			asked.Add(1)
			return nil, refuse(catalog.ReasonCapacity, "it is full")
		}
		return dialTCP(ctx, a.addr())
	}
	full := m.instance("api", "api-1", "")
	m.instance("api", "api-2", "")
	m.publish()
	at := m.origin(apiVIP())
	for asked.Load() == 0 { // until the one that is full was drawn first
		client := m.dial(at)
		say(t, client, "request")
		hear(t, a.accept(), "request")
		client.Close()
	}
	if why := m.proxy.balancer.why(full); why != "" {
		t.Errorf("it is ejected: %s", why)
	}
}

func TestATunnelsIdentityIsTheTargets(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	api := m.instance("api", "api-1", a.addr())
	other := *api
	other.Datacenter = "dc2"
	right := m.alias(&catalog.Target{Service: "api", Instances: []*catalog.Instance{api}})
	m.publish()
	client := m.dial(right)
	say(t, client, "x")
	server := a.accept()
	hear(t, server, "x")
	client.Close()
	server.Close()
	e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	if e.Path != admin.PathTunnel || e.Destination.Identity != spiffe("api") || e.Destination.Service != "alias" {
		t.Errorf("%+v", e)
	}
	eventually(t, "a tunnel is ready", func() bool { return m.proxy.tunnels.pool.Idle() > 0 })
	m.next.Services["alias"] = &catalog.Service{Name: "alias", Virtual: m.next.Services["alias"].Virtual, Chain: &catalog.Route{
		Targets: []*catalog.Target{{Service: "api", Datacenter: "dc2", Instances: []*catalog.Instance{&other}}},
	}}
	m.publish()
	m.refused(right, admin.Outbound, catalog.ReasonHandshakeFailed) // by the SNI, and not let through the tunnel that is ready
}

// TestAnApplicationSeesEachRequestAtMostOnce cuts the tunnel at each point of the opening, whichever it is of those that are
// made. The records are counted from the beginning of TLS: the handshake has three of the client's that are encrypted, and
// five of the server's.
func TestAnApplicationSeesEachRequestAtMostOnce(t *testing.T) {
	type cut = func(fromClient bool, record int) bool
	beforeOpen := func(c bool, n int) bool { return c && n == 4 }
	beforeAnswer := func(c bool, n int) bool { return !c && n == 6 }
	for name, tc := range map[string]struct {
		early     bool // the request comes with OPEN
		instances int
		cut       cut
		answered  bool // or else the client is reset
		requests  int
	}{
		"before OPEN":                                                   {true, 1, beforeOpen, true, 1},
		"before OPEN, which carries nothing":                            {false, 1, beforeOpen, true, 1},
		"before ACCEPTED":                                               {true, 1, beforeAnswer, false, 1},
		"before ACCEPTED, with another instance":                        {true, 2, beforeAnswer, false, 1},
		"before ACCEPTED, when nothing was sent":                        {false, 1, beforeAnswer, false, 0},
		"before ACCEPTED, when nothing was sent, with another instance": {false, 2, beforeAnswer, true, 1},
		"after ACCEPTED, before the answer":                             {true, 2, func(c bool, n int) bool { return !c && n == 7 }, false, 1},
		"after ACCEPTED, before DATA":                                   {false, 2, func(c bool, n int) bool { return c && n == 5 }, false, 0},
		"never":                                                         {true, 2, func(bool, int) bool { return false }, true, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int64
			sent := make(chan struct{})
			var done atomic.Bool
			once := func(fromClient bool, record int) bool {
				return tc.cut(fromClient, record) && done.CompareAndSwap(false, true)
			}
			m := newMesh(t, tunnelled)
			m.kernel.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
				if tc.early {
					<-sent
				}
				return dialTCP(ctx, m.cutter(to, once))
			}
			for i := range tc.instances {
				m.instance("api", fmt.Sprint("api-", i), m.counter(&requests))
			}
			m.publish()
			client := m.dial(m.origin(apiVIP()))
			if !tc.early {
				m.events.wait(t, "open, or denied", func(c admin.Connection) bool { return c.Direction == admin.Outbound })
			}
			_, err := io.WriteString(client, "request")
			close(sent)
			got := make([]byte, 6)
			if err == nil {
				_, err = io.ReadFull(client, got)
			}
			switch {
			case tc.answered && (err != nil || string(got) != "answer"):
				t.Errorf("the client reads %q, %v", got, err)
			case !tc.answered && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE):
				t.Errorf("the client reads %q, %v; want a reset", got, err)
			}
			client.Close()
			m.shutdown() // nothing is under way any more
			if n := requests.Load(); n != int64(tc.requests) {
				t.Errorf("the application saw %d requests, want %d", n, tc.requests)
			}
		})
	}
}

// counter is an application that counts whole requests and answers them.
func (m *mesh) counter(requests *atomic.Int64) string {
	ln := m.listen()
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				if _, err := io.ReadFull(conn, make([]byte, len("request"))); err == nil {
					requests.Add(1)
					io.WriteString(conn, "answer")
				}
				io.Copy(io.Discard, conn)
			})
		}
	})
	m.t.Cleanup(func() {
		ln.Close()
		conns.Wait()
	})
	return ln.Addr().String()
}

// cutter passes TLS records on to an address, and resets both sides in the place of the first encrypted record that cut
// accepts.
func (m *mesh) cutter(to netip.AddrPort, cut func(fromClient bool, record int) bool) string {
	ln := m.listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		here, err := ln.AcceptTCP()
		if err != nil {
			return
		}
		there, err := net.DialTimeout("tcp", to.String(), patience)
		if err != nil {
			abort(here)
			return
		}
		pass := func(dst, src net.Conn, fromClient bool) {
			defer abort(dst)
			defer abort(src)
			header := make([]byte, 5)
			for n := 0; ; {
				if _, err := io.ReadFull(src, header); err != nil {
					return
				}
				body := make([]byte, binary.BigEndian.Uint16(header[3:]))
				if _, err := io.ReadFull(src, body); err != nil {
					return
				}
				const applicationData = 23
				if header[0] == applicationData {
					n++
				}
				if cut(fromClient, n) {
					return
				}
				if _, err := dst.Write(append(header, body...)); err != nil {
					return
				}
				header = header[:5]
			}
		}
		var both sync.WaitGroup
		both.Go(func() { pass(there, here, true) })
		both.Go(func() { pass(here, there, false) })
		both.Wait()
	}()
	m.t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return ln.Addr().String()
}

func TestATunnelThatTheOtherSideClosedIsReplacedUnnoticed(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.echo()
	for range 20 {
		exchange(t, m, at)
		m.proxy.tunnels.retireEnds(func(*tunnelEnd) bool { return true })
	}
}

func TestOpeningsRacedAgainstIntentions(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.echo()
	var callers sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if conn, err := net.DialTimeout("tcp", at, patience); err == nil {
					conn.SetDeadline(time.Now().Add(patience))
					io.WriteString(conn, "x")
					conn.Read(make([]byte, 1))
					conn.Close()
				}
			}
		})
	}
	for i := range 40 {
		m.rule(policy.Action(i % 2))
		m.publish()
	}
	m.rule(policy.Deny)
	last := m.publish()
	close(stop)
	callers.Wait()
	eventually(t, "every connection has ended", func() bool { return m.proxy.live.len() == 0 })
	m.shutdown()
	events, _ := m.events.all()
	var points []verdict
	for _, e := range events {
		if e.Sequence != 0 {
			points = append(points, verdict{policy.Verdict{Generation: e.Generation}, e.Sequence})
		}
		if e.Event == admin.EventOpen && e.Generation == last {
			t.Errorf("a denied pair was let in: %+v", e)
		}
	}
	wantOrder(t, points)
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
	if n > 3 { // those of crypto/tls, which a plain leg has too
		t.Errorf("%v allocations", n)
	}
}

// linkPair is both ends of a tunnel with a stream.
func linkPair(t testing.TB, pool *buffers) (client, server *link) {
	c, s := securePair(t, pool)
	client, server = &link{tls: c.tls, wire: c.wire, session: tunnel.NewSession(false)}, &link{tls: s.tls, wire: s.wire, session: tunnel.NewSession(true)}
	done := make(chan error, 1)
	go func() {
		_, err := server.awaitOpening(time.Now().Add(patience), patience)
		done <- errors.Join(err, server.control(tunnel.Accepted, nil))
	}()
	if err := errors.Join(client.open(newOpening("10.0.0.1:1"), nil), <-done); err != nil {
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
		if !l.ready() || l.held != nil || l.wire.in != nil || l.wire.out != nil {
			t.Errorf("%+v", l)
		}
	}
}

// Many small writes arrive as they were, whatever the frames and records that they come in.
func TestFramesMayBeginAnywhereInARecord(t *testing.T) {
	client, server := linkPair(t, newBuffers())
	var want []byte
	for n := 1; n < 70000; n = n*3 + 1 {
		want = append(want, text(min(n, plainChunk))...)
	}
	sent := make(chan error, 1)
	go func() {
		client.wire.cork() // so that frames meet in one read
		for n := 1; n < 70000; n = n*3 + 1 {
			if err := client.write(roomFor(text(min(n, plainChunk)))); err != nil {
				sent <- err
				return
			}
		}
		sent <- errors.Join(client.closeWrite(), client.wire.uncork())
	}()
	var got []byte
	for {
		p, err := server.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p[headroom:]...)
		server.release()
	}
	if err := <-sent; err != nil || !slices.Equal(got, want) {
		t.Errorf("%d of %d bytes arrived as they were, %v", len(got), len(want), err)
	}
}

func TestExplainSaysWhereTunnelsAreUsed(t *testing.T) {
	m := newMesh(t, tunnelled)
	m.kernel.notDirect = "the test's instances are of another node"
	at := m.echo()
	if e, err := m.proxy.Explain("web", "api"); err != nil || e.Path != admin.PathTunnel {
		t.Errorf("%+v, %v", e, err)
	}
	exchange(t, m, at)
	m.remote("api-2", m.silent()).Tunnels = false
	m.publish()
	if e, err := m.proxy.Explain("web", "api"); err != nil || e.Path != admin.PathMTLS {
		t.Errorf("with an instance that makes no tunnels: %+v, %v", e, err)
	}
}

// TestStreamsOfManyConnectionsArriveWholeBothWays carries data both ways at once over connections that follow each other through tunnels.
func TestStreamsOfManyConnectionsArriveWholeBothWays(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	data := make([]byte, 400<<10+17)
	rand.Read(data)
	for range 3 {
		var all sync.WaitGroup
		for range 8 {
			client := m.dial(at)
			say(t, client, "x")
			server := a.accept()
			hear(t, server, "x")
			for _, conn := range []*net.TCPConn{client, server} {
				all.Go(func() {
					conn.Write(data)
					conn.CloseWrite()
				})
				all.Go(func() {
					if got, err := io.ReadAll(conn); err != nil || !slices.Equal(got, data) {
						t.Errorf("%d of %d bytes arrived as they were, %v", len(got), len(data), err)
					}
				})
			}
		}
		all.Wait()
	}
}

// The release after this one may speak another protocol in tunnels, by another name: neither side loses a connection.
func TestAReleaseWhoseTunnelsAreOthersIsServedPlainBothWays(t *testing.T) {
	const next = "nodeproxy/2"
	m := newMesh(t, tunnelled)
	remote := m.listen()
	m.t.Cleanup(func() { remote.Close() })
	go func() {
		for {
			raw, err := remote.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				raw.SetDeadline(time.Now().Add(patience))
				conn, _, err := m.proxy.gate.current().credentials.Accept(raw, "api", next, func() error { return nil })
				if err != nil {
					t.Errorf("the next release's side: %v", err)
					return
				}
				io.Copy(conn, conn)
				conn.CloseWrite()
			}()
		}
	}()
	m.remote("api-1", addrPort(remote.Addr()))
	m.publish()
	to := m.origin(apiVIP())
	const calls = 20
	for range calls {
		exchange(t, m, to)
	}
	local := m.instance("web", "web-1", m.echoing())
	m.publish()
	for range calls {
		raw := m.dial(local.Mesh.String())
		conn, _, err := m.proxy.gate.current().credentials.Connect(raw, "api", &catalog.Target{Service: "web"}, next)
		if err != nil || conn.ConnectionState().NegotiatedProtocol != "" {
			t.Fatalf("the next release's caller: %q, %v", conn.ConnectionState().NegotiatedProtocol, err)
		}
		say(t, conn, "ping")
		hear(t, conn, "ping")
		conn.CloseWrite()
		wantEOF(t, conn)
	}
	for _, way := range []admin.Direction{admin.Outbound, admin.Inbound} {
		for _, e := range m.events.waitN(t, "close", calls, is(admin.EventClose, way)) {
			if e.Path != admin.PathMTLS || e.Detail != "" {
				t.Errorf("%s: %+v", way, e)
			}
		}
	}
	events, _ := m.events.all()
	for _, e := range slices.DeleteFunc(events, func(e admin.Connection) bool { return e.Verdict == admin.Allowed }) {
		t.Errorf("denied: %+v", e)
	}
}

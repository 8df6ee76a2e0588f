package nodeproxy

import (
	"context"
	"crypto/rand"
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
	"nodeproxy.io/nodeproxy/mtls/record"
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
	peer, err := m.proxy.gate.current().credentials.Connect(w, source, &catalog.Target{Service: inst.Service}, tunnel.ALPN)
	if err != nil {
		m.t.Fatal(err)
	}
	if peer.Protocol != tunnel.ALPN {
		m.t.Fatal("no tunnel was negotiated")
	}
	return &far{newLink(w, peer, false), m.t}
}

func newOpening(source string) (o tunnel.Opening) {
	rand.Read(o.ID[:])
	o.Source = netip.MustParseAddrPort(source)
	return o
}

// hears reads what comes over the stream.
func (f *far) hears(text string) {
	f.t.Helper()
	b, err := f.next()
	if err != nil || b.text() != text {
		f.t.Fatalf("%q, %v; want %q", b.text(), err, text)
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
	if err := other.open(newOpening("10.0.0.1:1"), batch{}); err != nil {
		t.Fatal(err)
	}
	a.accept()
	wantRefusal(t, f.open(newOpening("10.0.0.1:1"), batch{}), catalog.ReasonIntention)
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
			b := make([]byte, tunnel.HeaderSize+64, tunnel.HeaderSize+65)
			frame.Put(b)
			f.seal(b)
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
		"close_notify":       func(f *far) { f.channel.closeWrite() },
		"FIN":                func(f *far) { f.conn.CloseWrite() },
		"RST":                func(f *far) { f.reset() },
		"RESET after END":    func(f *far) { f.closeWrite(); f.control(tunnel.Reset, nil) },
		"FIN after END":      func(f *far) { f.closeWrite(); f.conn.CloseWrite() },
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
	if err := f.open(newOpening("10.0.0.1:1"), batch{}); err != nil {
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
	never := []string{"127.0.0.9", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.0.1", "fe80::1", "255.255.255.255"}
	for i, ip := range never { // of web in the catalog, and never to be shown all the same
		m.add(&catalog.Instance{ID: fmt.Sprint("web-never-", i), Service: "web", Node: "node-2", Healthy: true, Address: netip.AddrPortFrom(netip.MustParseAddr(ip), 80)})
	}
	m.next.Leaves["other web"] = m.root.Leaf(t, strings.Replace(spiffe("web"), "dc1", "dc2", 1))
	m.kernel.owns = func(ip netip.Addr) bool { return ip == netip.MustParseAddr("10.0.0.80") }
	m.publish()
	web := m.tunnelTo(inst.Mesh, "web")
	rejected := uint64(0)
	type claim struct {
		by    *far
		claim string
		shown bool
	}
	claims := []claim{
		{m.tunnelTo(inst.Mesh, "other web"), "10.0.0.77:4000", false}, // that is of another datacenter
		{web, "10.0.0.77:4000", true},                                 // an instance of web
		{web, "10.0.0.78:4000", false},                                // of another service
		{web, "10.0.0.79:4000", false},                                // of web, on this node
		{web, "10.0.0.80:4000", false},                                // an address of this node, whatever the catalog says
		{web, "10.0.0.99:4000", false},                                // of nobody
		{web, "10.0.0.77:0", false},                                   // no port
		{web, "127.0.0.1:4000", false},                                // loopback, although it is the tunnel's peer
	}
	for _, ip := range never {
		claims = append(claims, claim{web, netip.AddrPortFrom(netip.MustParseAddr(ip), 4000).String(), false})
	}
	for _, tc := range claims {
		if err := tc.by.open(newOpening(tc.claim), batch{}); err != nil {
			t.Fatal(err)
		}
		a.accept().Close()
		tc.by.finishes()
		m.kernel.mu.Lock()
		got := m.kernel.clients[len(m.kernel.clients)-1].String()
		m.kernel.mu.Unlock()
		want := tc.claim
		if !tc.shown {
			want = tc.by.conn.LocalAddr().String()
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

// Many small writes arrive as they were, whatever the frames and records that they come in.
func TestFramesMayBeginAnywhereInARecord(t *testing.T) {
	client, server := linkPair(t, newBuffers())
	var want []byte
	for n := 1; n < 70000; n = n*3 + 1 {
		want = append(want, text(min(n, plainChunk))...)
	}
	sent := make(chan error, 1)
	go func() {
		var frames []byte // that meet in records
		for n := 1; n < 70000; n = n*3 + 1 {
			b := roomFor(text(min(n, plainChunk)))
			s := b.spans[0]
			frame := b.buf.bytes[s.from-tunnel.HeaderSize : s.to]
			tunnel.Header{Type: tunnel.Data, Length: b.size(), Stream: client.session.Send(tunnel.Data)}.Put(frame)
			frames = append(frames, frame...)
		}
		for size := 1; len(frames) > 0; size = size%(2*record.MaxData) + 7 {
			n := min(size, len(frames))
			if err := client.seal(append(make([]byte, 0, n+1), frames[:n]...)); err != nil {
				sent <- err
				return
			}
			frames = frames[n:]
		}
		sent <- client.closeWrite()
	}()
	var got []byte
	for {
		b, err := server.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b.text()...)
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

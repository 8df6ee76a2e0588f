package nodeproxy

import (
	"context"
	"crypto/tls"
	"encoding/binary"
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
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

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
				w, err := newWire(raw, m.proxy.buffers)
				if err != nil {
					t.Error(err)
					return
				}
				peer, err := m.proxy.gate.current().credentials.Accept(w, "api", next, func() error { return nil })
				if err != nil {
					t.Errorf("the next release's side: %v", err)
					return
				}
				conn := w.leg(peer)
				for b, err := conn.next(); err == nil; b, err = conn.next() {
					conn.write(b)
					conn.release()
				}
				conn.closeWrite()
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
		w, err := newWire(raw, m.proxy.buffers)
		if err != nil {
			t.Fatal(err)
		}
		peer, err := m.proxy.gate.current().credentials.Connect(w, "api", &catalog.Target{Service: "web"}, next)
		if err != nil || peer.Protocol != "" {
			t.Fatalf("the next release's caller: %+v, %v", peer, err)
		}
		conn := w.leg(peer)
		if err := conn.write(roomFor("ping")); err != nil {
			t.Fatal(err)
		}
		if b, err := conn.next(); err != nil || b.text() != "ping" {
			t.Fatalf("%q, %v", b.text(), err)
		}
		conn.release()
		conn.closeWrite()
		if _, err := conn.next(); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
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

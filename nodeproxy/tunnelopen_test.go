package nodeproxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/nodeproxy/workload"
)

// TestAStreamDoesNotWaitBehindAnotherThatIsNotRead ends a stream in order on this side while the application that it leads
// to leaves it unread, so that the tunnel holds bytes before which nothing else can come.
func TestAStreamDoesNotWaitBehindAnotherThatIsNotRead(t *testing.T) {
	ln, err := (&net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accept := func() *net.TCPConn {
		ln.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.TCPConn)
	}
	m := newMesh(t, tunnelled)
	m.kernel.deliver = func(ctx context.Context, _ *workload.Served, _ netip.AddrPort) (net.Conn, error) {
		conn, err := dialTCP(ctx, ln.Addr().String())
		if err == nil {
			err = conn.SetWriteBuffer(4096)
		}
		return conn, err
	}
	m.instance("api", "api-1", "")
	m.publish()
	at := m.origin(apiVIP())

	client := m.dial(at)
	sent := text(120_000) // more than the destination's node takes in, less than fits the tunnel's sockets as well
	say(t, client, sent)
	server := accept()
	server.CloseWrite()
	wantEOF(t, client)
	client.CloseWrite()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))

	next := m.dial(at)
	say(t, next, "request")
	hear(t, accept(), "request")

	if got, err := io.ReadAll(server); err != nil || string(got) != sent {
		t.Errorf("%d of %d bytes of the first arrived, %v", len(got), len(sent), err)
	}
}

// TestAPeerThatDoesNotAnswerAnOpeningIsNotAskedAgain has the other node hang when it has read an OPEN.
func TestAPeerThatDoesNotAnswerAnOpeningIsNotAskedAgain(t *testing.T) {
	m := newMesh(t, tunnelled, func(c *Config, _ *fakeKernel) {
		c.Limits.Handshake, c.Limits.Connect = 500*time.Millisecond, time.Second
	})
	remote := m.listen()
	var peers sync.WaitGroup
	var openings atomic.Int64
	peers.Go(func() {
		for {
			raw, err := remote.AcceptTCP()
			if err != nil {
				return
			}
			peers.Go(func() {
				defer raw.Close()
				w, err := newWire(raw, m.proxy.buffers)
				if err != nil {
					t.Error(err)
					return
				}
				peer, err := m.proxy.gate.current().credentials.Accept(w, "api", tunnel.ALPN, func() error { return nil })
				if err != nil {
					return // it was made ahead, and is not needed any more
				}
				l := newLink(w, peer, true)
				if _, err := l.awaitOpening(time.Now().Add(patience), patience); err == nil {
					openings.Add(1)
					_ = l.more()
				}
			})
		}
	})
	t.Cleanup(func() {
		remote.Close()
		m.shutdown()
		peers.Wait()
	})
	m.remote("api-1", addrPort(remote.Addr()))
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	say(t, client, "request")
	began := time.Now()
	wantReset(t, client)
	if took := time.Since(began); took > patience/2 {
		t.Errorf("it ends after %v", took)
	}
	if n := openings.Load(); n != 1 {
		t.Errorf("the stream was asked for %d times", n)
	}
}

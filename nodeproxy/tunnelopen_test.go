package nodeproxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
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

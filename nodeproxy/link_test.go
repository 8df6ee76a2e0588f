package nodeproxy

import (
	"errors"
	"os"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/tunnel"
)

// stuckLink is a tunnel between streams to a peer that reads nothing: not a byte more can be written to it.
func stuckLink(t testing.TB) (l *link, peer *secureLeg) {
	t.Helper()
	client, server := securePair(t, newBuffers())
	for _, size := range []int{chunk, 16} { // there is room for less when there is none for more
		for piece, err := make([]byte, size), error(nil); !errors.Is(err, os.ErrDeadlineExceeded); {
			if err = client.wire.TCPConn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err = client.wire.TCPConn.Write(piece); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
	}
	if err := client.wire.TCPConn.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	return newLink(client.tls, client.wire, mtls.Peer{}, false), server
}

// within fails the test unless what is done in time. l is reset then, so that it ends.
func within(t testing.TB, l *link, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Errorf("%s waits for a peer that reads nothing", what)
		l.reset()
		<-done
	}
}

func TestRetiringATunnelDoesNotWaitForItsPeer(t *testing.T) {
	l, _ := stuckLink(t)
	pool := tunnel.NewPool[int, *link](1)
	pool.Take(t.Context(), 1, nil)
	pool.Put(1, l)
	within(t, l, "Retire", func() { pool.Retire(func(int) bool { return false }) })
	if _, err := l.wire.TCPConn.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
}

func TestLookingAtATunnelDoesNotWaitForItsPeer(t *testing.T) {
	l, peer := stuckLink(t)
	// What is no record is answered by an alert.
	if _, err := peer.wire.TCPConn.Write(make([]byte, chunk)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has arrived", func() bool { return !l.wire.socket.quiet() })
	l.drained = false
	if err := l.wire.fill(); err != nil {
		t.Fatal(err)
	}
	within(t, l, "Alive", func() {
		if l.Alive() {
			t.Error("it is alive")
		}
	})
}

// A tunnel that was just made is alive, and looking at it leaves it fit for a stream.
func TestLookingAtATunnelLeavesItFitForUse(t *testing.T) {
	client, server := securePair(t, newBuffers())
	l := newLink(client.tls, client.wire, mtls.Peer{}, false)
	if !l.look() || !l.drained {
		t.Fatal("it is not alive")
	}
	if err := l.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := server.next(); err != nil {
		t.Error(err)
	}
}

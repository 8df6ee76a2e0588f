package nodeproxy

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

func TestHalfCloseOfTheClientLeavesTheAnswerOpen(t *testing.T) {
	onEveryPath(t, testHalfCloseOfTheClientLeavesTheAnswerOpen)
}

func testHalfCloseOfTheClientLeavesTheAnswerOpen(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	say(t, client, "request")
	client.CloseWrite()
	got, err := io.ReadAll(server)
	if err != nil || string(got) != "request" {
		t.Fatalf("read %q, %v", got, err)
	}
	say(t, server, "the answer comes after the end of the request")
	server.Close()
	got, err = io.ReadAll(client)
	if err != nil || string(got) != "the answer comes after the end of the request" {
		t.Fatalf("read %q, %v", got, err)
	}
	if e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound)); e.Detail != "" {
		t.Errorf("%+v", e)
	}
}

func TestHalfCloseOfTheServerLeavesTheRequestOpen(t *testing.T) {
	onEveryPath(t, testHalfCloseOfTheServerLeavesTheRequestOpen)
}

func testHalfCloseOfTheServerLeavesTheRequestOpen(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	say(t, server, "all I have to say")
	server.CloseWrite()
	got, err := io.ReadAll(client)
	if err != nil || string(got) != "all I have to say" {
		t.Fatalf("read %q, %v", got, err)
	}
	say(t, client, "still sending")
	hear(t, server, "still sending")
	client.CloseWrite()
	wantEOF(t, server)
}

func TestServerSpeaksFirst(t *testing.T) { onEveryPath(t, testServerSpeaksFirst) }

func testServerSpeaksFirst(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	say(t, server, "220 ready")
	hear(t, client, "220 ready")
}

func TestResetStaysReset(t *testing.T) { onEveryPath(t, testResetStaysReset) }

func testResetStaysReset(t *testing.T, path option) {
	for name, fromServer := range map[string]bool{"of the client": false, "of the server": true} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, path)
			client, server := m.pair()
			say(t, client, "x")
			hear(t, server, "x")
			from, to := client, server
			if fromServer {
				from, to = server, client
			}
			from.SetLinger(0)
			from.Close()
			wantReset(t, to)
			m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
			if e := m.events.wait(t, "close", is(admin.EventClose, admin.Inbound)); e.Detail == "" || e.Verdict != admin.Allowed {
				t.Errorf("%+v", e)
			}
		})
	}
}

func TestResetAfterHalfCloseIsPassedOnAtOnce(t *testing.T) {
	onEveryPath(t, testResetAfterHalfCloseIsPassedOnAtOnce)
}

func testResetAfterHalfCloseIsPassedOnAtOnce(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	client.CloseWrite()
	wantEOF(t, server)
	client.SetLinger(0)
	client.Close()
	// The server writes nothing: it must not take a write to notice.
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	if _, err := server.Write([]byte("x")); err == nil {
		_, err = io.Copy(io.Discard, server)
		if err == nil {
			t.Fatal("the server does not see that its client was reset")
		}
	}
}

func TestTruncationIsAReset(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	peer := m.peer(at, m.leaf("web"))
	say(t, peer, "half of it")
	server := a.accept()
	hear(t, server, "half of it")
	peer.NetConn().(*net.TCPConn).CloseWrite() // no close_notify
	wantReset(t, server)
}

func TestCloseNotifyAloneIsAHalfClose(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	peer := m.peer(at, m.leaf("web"))
	say(t, peer, "all of it")
	if err := peer.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	server := a.accept()
	got, err := io.ReadAll(server)
	if err != nil || string(got) != "all of it" {
		t.Fatalf("read %q, %v", got, err)
	}
	say(t, server, "answer")
	server.Close()
	if got, err := io.ReadAll(peer); err != nil || string(got) != "answer" {
		t.Fatalf("read %q, %v", got, err)
	}
}

func TestLargeTransfersArriveWhole(t *testing.T) { onEveryPath(t, testLargeTransfersArriveWhole) }

func testLargeTransfersArriveWhole(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	data := make([]byte, 24<<20+13)
	rand.Read(data)
	sent := make(chan error, 2)
	for _, conn := range []*net.TCPConn{client, server} {
		conn.SetDeadline(time.Now().Add(2 * time.Minute)) // a busy machine with the race detector needs it
		go func() {
			_, err := conn.Write(data)
			conn.CloseWrite()
			sent <- err
		}()
	}
	received := make(chan [32]byte, 2)
	for _, conn := range []*net.TCPConn{client, server} {
		go func() {
			h := sha256.New()
			if _, err := io.Copy(h, conn); err != nil {
				t.Error(err)
			}
			received <- [32]byte(h.Sum(nil))
		}()
	}
	for range 2 {
		if err := <-sent; err != nil {
			t.Error(err)
		}
		if <-received != sha256.Sum256(data) {
			t.Error("what arrived is not what was sent")
		}
	}
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		if e := m.events.wait(t, "close", is(admin.EventClose, direction)); e.Sent != uint64(len(data)) || e.Received != uint64(len(data)) {
			t.Errorf("counted %d and %d bytes of %d", e.Sent, e.Received, len(data))
		}
	}
}

func TestBackpressureReachesTheSender(t *testing.T) { onEveryPath(t, testBackpressureReachesTheSender) }

func testBackpressureReachesTheSender(t *testing.T, path option) {
	m := newMesh(t, path)
	client, _ := m.pair() // the server reads nothing
	client.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := io.Copy(client, neverEnding{})
	if err == nil || n > 64<<20 {
		t.Fatalf("%d bytes were taken for a sleeping reader, %v", n, err)
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestASlowReaderLosesNothingAfterAHalfClose(t *testing.T) {
	onEveryPath(t, testASlowReaderLosesNothingAfterAHalfClose)
}

func testASlowReaderLosesNothingAfterAHalfClose(t *testing.T, path option) {
	m := newMesh(t, path)
	release := make(chan struct{})
	total := make(chan int64, 1)
	config := &tls.Config{Certificates: []tls.Certificate{*m.leaf("api")}, ClientAuth: tls.RequireAnyClientCert}
	ln := m.listen()
	go func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { // one may be dialled ahead, to become a tunnel, and carries nothing
				peer := tls.Server(raw, config)
				defer peer.Close()
				peer.Handshake()
				<-release
				if n, _ := io.Copy(io.Discard, peer); n > 0 {
					total <- n
				}
			}()
		}
	}()
	t.Cleanup(func() { ln.Close() })
	m.remote("api-1", addrPort(ln.Addr()))
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	// As much as the client can get rid of while nobody reads: every socket on the way is full then.
	client.SetWriteDeadline(time.Now().Add(time.Second))
	sent, _ := io.Copy(client, neverEnding{})
	client.CloseWrite()
	close(release)
	select {
	case got := <-total:
		if got != sent {
			t.Fatalf("%d of %d bytes arrived", got, sent)
		}
	case <-time.After(patience):
		t.Fatal("the transfer does not end")
	}
}

func TestDeliversToAUnixSocket(t *testing.T) { onEveryPath(t, testDeliversToAUnixSocket) }

func testDeliversToAUnixSocket(t *testing.T, path option) {
	at := t.TempDir() + "/app.sock"
	ln, err := net.Listen("unix", at)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	m := newMesh(t, path, func(_ *Config, k *fakeKernel) {
		k.deliver = func(context.Context, *workload.Served, netip.AddrPort) (net.Conn, error) {
			return net.Dial("unix", at)
		}
	})
	m.instance("api", "api-1", "")
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	say(t, client, "request")
	client.CloseWrite()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); err != nil || string(got) != "request" {
		t.Fatalf("read %q, %v", got, err)
	}
	say(t, server, "answer")
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Fatalf("read %q, %v", got, err)
	}
}

func TestIdleLimit(t *testing.T) { onEveryPath(t, testIdleLimit) }

func testIdleLimit(t *testing.T, path option) {
	m := newMesh(t, path, func(c *Config, _ *fakeKernel) { c.Limits.Idle = 400 * time.Millisecond })
	client, server := m.pair()
	begin := time.Now()
	for time.Since(begin) < time.Second { // busy for longer than the limit
		say(t, client, "x")
		hear(t, server, "x")
		<-time.After(20 * time.Millisecond)
	}
	if events, _ := m.events.all(); len(events) != 2 {
		t.Fatalf("a busy connection was ended: %+v", events)
	}
	wantReset(t, client)
	wantReset(t, server)
	e := m.events.wait(t, "idle", func(c admin.Connection) bool { return c.Reason == catalog.ReasonIdle })
	if e.Event != admin.EventClose || e.Verdict != admin.Denied {
		t.Errorf("%+v", e)
	}
}

// tcpPair is two ends of a loopback connection.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	here, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	there, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		here.Close()
		there.Close()
	})
	return here.(*net.TCPConn), there.(*net.TCPConn)
}

func TestPlainLegsAreSplicedWithHalfClose(t *testing.T) {
	pool := newBuffers()
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	legA, _ := newPlainLeg(a, pool)
	legB, _ := newPlainLeg(b, pool)
	var fromA, fromB atomic.Uint64
	done := make(chan error, 1)
	var group sync.WaitGroup
	r := newRelay(legA, legB, &fromA, &fromB, func(run func() error) error { return run() }, nil)
	group.Go(func() { r.start(&group, func(err error) { done <- err }) })
	t.Cleanup(group.Wait)
	request, before := text(1<<20), written(t)
	go io.WriteString(client, request)
	hear(t, server, request)
	if n := written(t) - before; n >= 2*len(request) {
		t.Errorf("%d bytes were written, of which the client has %d: it is not the kernel that copies", n, len(request))
	}
	client.CloseWrite()
	wantEOF(t, server)
	say(t, server, "answer")
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Fatalf("read %q, %v", got, err)
	}
	if err := <-done; err != nil || fromA.Load() != uint64(len(request)) || fromB.Load() != 6 {
		t.Fatalf("%v, counted %d and %d", err, fromA.Load(), fromB.Load())
	}
}

// written is how many bytes this process has given to write(2) and the like; splice(2) is not among them (proc_pid_io(5), wchar).
func written(t *testing.T) (n int) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/io")
	if err == nil {
		_, after, _ := strings.Cut(string(text), "wchar:")
		_, err = fmt.Sscan(after, &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLargeWritesOfSmallPiecesKeepTheirOrder(t *testing.T) {
	onEveryPath(t, testLargeWritesOfSmallPiecesKeepTheirOrder)
}

func testLargeWritesOfSmallPiecesKeepTheirOrder(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	var want bytes.Buffer
	for i := range 3000 {
		piece := text(1 + i%97)
		want.WriteString(piece)
		say(t, client, piece)
	}
	client.CloseWrite()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Fatalf("%d of %d bytes, %v", len(got), want.Len(), err)
	}
}

// The end of the application is on this kernel. Of a listener that another daemon has handed over, package net sets options on
// what it accepts.
func TestEveryLegNoticesAPeerThatHasVanished(t *testing.T) {
	for name, option := range map[string]option{"listeners of its own": func(*Config, *fakeKernel) {}, "handed over": func(_ *Config, k *fakeKernel) { k.fromFiles = true }} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, option)
			client, server := m.pair()
			say(t, client, "x")
			hear(t, server, "x")
			legs := 0
			for _, c := range m.proxy.live.all() {
				c.mu.Lock()
				for _, conn := range c.sockets {
					if conn.RemoteAddr().String() == server.LocalAddr().String() {
						continue
					}
					if idle := keptIdle(conn.(*net.TCPConn)); idle != 30*time.Second {
						t.Errorf("%s %s: keepalive after %s", c.about.Direction, conn.RemoteAddr(), idle)
					}
					legs++
				}
				c.mu.Unlock()
			}
			if legs != 3 {
				t.Errorf("%d legs, want 3", legs)
			}
		})
	}
}

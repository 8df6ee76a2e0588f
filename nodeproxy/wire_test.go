package nodeproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls/mtlstest"
)

// securePair is both ends of a TLS connection as legs.
func securePair(t testing.TB, pool *buffers) (client, server *secureLeg) {
	t.Helper()
	root := mtlstest.NewRoot(t)
	a, b := tcpPair(t)
	for _, conn := range []*net.TCPConn{a, b} {
		conn.SetReadBuffer(4 << 20)
		conn.SetWriteBuffer(4 << 20)
	}
	here, err := newWire(a, pool)
	if err != nil {
		t.Fatal(err)
	}
	there, err := newWire(b, pool)
	if err != nil {
		t.Fatal(err)
	}
	leaf := root.Leaf(t, spiffe("api"))
	secure := tls.Server(there, &tls.Config{Certificates: []tls.Certificate{*leaf}, SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true})
	shaken := make(chan error, 1)
	go func() { shaken <- secure.Handshake() }()
	mine := tls.Client(here, &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	if err := errors.Join(mine.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	return newSecureLeg(mine, here), newSecureLeg(secure, there)
}

// syscalls counts what this process has read and written so far.
func syscalls(t testing.TB) (reads, writes int) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip("the kernel does not count system calls: ", err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, _ := strconv.Atoi(value)
		switch name {
		case "syscr":
			reads = n
		case "syscw":
			writes = n
		}
	}
	return reads, writes
}

func TestTensOfKilobytesPerSystemCall(t *testing.T) {
	client, server := securePair(t, newBuffers())
	const chunks = 16
	chunkOf := make([]byte, headroom+plainChunk)
	readsBefore, writesBefore := syscalls(t)
	total, pieces := 0, 0
	for n := 1; n <= chunks; n++ { // each is read before the next, because socket buffers may hold no more
		if err := client.write(chunkOf); err != nil {
			t.Fatal(err)
		}
		for total < n*plainChunk {
			p, err := server.next()
			if err != nil {
				t.Fatal(err)
			}
			total += len(p) - headroom
			pieces++
			server.release()
		}
	}
	reads, writes := syscalls(t)
	reads, writes = reads-readsBefore, writes-writesBefore
	if writes == 0 {
		t.Skip("the kernel does not count system calls on sockets")
	}
	if writes > chunks+2 { // a few are the runtime's own
		t.Errorf("%d writes for %d chunks of %d KiB", writes, chunks, plainChunk>>10)
	}
	if perRead := total / reads; perRead < 32<<10 {
		t.Errorf("%d KiB per read", perRead>>10)
	}
	if perWrite := total / pieces; perWrite < 32<<10 {
		t.Errorf("%d KiB per write to the application", perWrite>>10)
	}
}

// roomFor is text as next would return it.
func roomFor(text string) []byte { return append(make([]byte, headroom), text...) }

func TestAnIdleLegHoldsNoBuffer(t *testing.T) {
	pool := newBuffers()
	client, server := securePair(t, pool)
	if err := client.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	p, err := server.next()
	if err != nil || string(p[headroom:]) != "x" {
		t.Fatalf("%q, %v", p, err)
	}
	server.release()
	waiting := make(chan error, 1)
	go func() {
		_, err := server.next()
		waiting <- err
	}()
	for _, w := range []*wire{client.wire, server.wire} {
		w.mu.Lock()
		if w.out != nil {
			t.Error("a buffer is held for writing")
		}
		w.mu.Unlock()
	}
	if client.wire.in != nil || client.held != nil {
		t.Error("a buffer is held for reading")
	}
	client.reset()
	if err := <-waiting; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	if server.wire.in != nil || server.held != nil {
		t.Error("a buffer is held for reading")
	}
}

func TestPartOfARecordIsNoEnd(t *testing.T) {
	client, server := securePair(t, newBuffers())
	raw := client.wire.TCPConn
	// Seal one record, and send it byte by byte.
	client.wire.cork()
	if _, err := client.tls.Write([]byte("slowly")); err != nil {
		t.Fatal(err)
	}
	client.wire.mu.Lock()
	sealed := append([]byte{}, client.wire.out[:client.wire.queued]...)
	client.wire.mu.Unlock()
	go func() {
		for _, b := range sealed {
			raw.Write([]byte{b})
		}
	}()
	p, err := server.next()
	if err != nil || string(p[headroom:]) != "slowly" {
		t.Fatalf("%q, %v", p, err)
	}
}

// crypto/tls gives a close_notify five seconds to get into the socket, which a slow reader may exceed.
func TestWriteDeadlinesOfTLSAreIgnored(t *testing.T) {
	client, server := securePair(t, newBuffers())
	client.tls.SetWriteDeadline(time.Now().Add(-time.Second))
	if err := client.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if p, err := server.next(); err != nil || string(p[headroom:]) != "x" {
		t.Fatalf("%q, %v", p, err)
	}
}

// tired is a listener of a process without file descriptors.
type tired struct {
	failures int
	calls    int
	conn     *net.TCPConn
}

func (l *tired) Addr() net.Addr { return &net.TCPAddr{} }

func (l *tired) AcceptTCP() (*net.TCPConn, error) {
	l.calls++
	switch {
	case l.calls <= l.failures:
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	case l.calls == l.failures+1:
		return l.conn, nil
	}
	return nil, net.ErrClosed
}

func TestAcceptBacksOffWithoutFileDescriptors(t *testing.T) {
	p := &Proxy{cfg: Config{Log: slog.New(slog.DiscardHandler)}}
	ln := &tired{failures: 6, conn: &net.TCPConn{}}
	served := 0
	begin := time.Now()
	acceptAll(p, ln.Addr(), ln.AcceptTCP, func(conn *net.TCPConn) { served++ })
	if served != 1 || ln.calls != 8 {
		t.Errorf("served %d after %d calls", served, ln.calls)
	}
	if took, least := time.Since(begin), 63*minAcceptBackoff; took < least {
		t.Errorf("six failures took %s, want at least %s: it spins", took, least)
	}
}

// BenchmarkCopy carries bytes through both sides of a mesh connection (application, TLS, application), through a spliced
// hop, and without anything between.
func BenchmarkCopy(b *testing.B) {
	b.Run("plain TCP", func(b *testing.B) {
		client, server := tcpPair(b)
		benchmarkCopy(b, client, server)
	})
	b.Run("spliced", func(b *testing.B) {
		pool := newBuffers()
		client, a := tcpPair(b)
		c, server := tcpPair(b)
		legA, _ := newPlainLeg(a, pool)
		legC, _ := newPlainLeg(c, pool)
		startRelay(b, legA, legC)
		benchmarkCopy(b, client, server)
	})
	b.Run("mTLS", func(b *testing.B) {
		pool := newBuffers()
		client, a := tcpPair(b)
		c, server := tcpPair(b)
		legA, _ := newPlainLeg(a, pool)
		legC, _ := newPlainLeg(c, pool)
		out, in := securePair(b, pool)
		startRelay(b, legA, out)
		startRelay(b, legC, in)
		benchmarkCopy(b, client, server)
	})
}

func startRelay(b *testing.B, x, y leg) {
	var up, down atomic.Uint64
	r := relay{a: x, b: y, fromA: &up, fromB: &down, protect: func(run func() error) error { return run() }}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.run()
	}()
	b.Cleanup(func() {
		r.finish(context.Canceled)
		<-done
	})
}

func benchmarkCopy(b *testing.B, client, server net.Conn) {
	piece := make([]byte, 256<<10)
	b.SetBytes(int64(len(piece)))
	received := make(chan int64, 1)
	go func() {
		buf := make([]byte, 256<<10)
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{server}, buf)
		received <- n
	}()
	for b.Loop() {
		if _, err := client.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	client.(*net.TCPConn).CloseWrite()
	<-received
}

package nodeproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/mtls/record"
	"nodeproxy.io/policy"
)

// securePair is both ends of a TLS 1.3 connection as legs.
func securePair(t testing.TB, pool *buffers) (client, server *secureLeg) {
	t.Helper()
	c, s := handshakePair(t, pool, tls.VersionTLS13)
	return c.(*secureLeg), s.(*secureLeg)
}

// handshakePair is both ends of a TLS connection as legs.
func handshakePair(t testing.TB, pool *buffers, version uint16) (client, server leg) {
	t.Helper()
	root := mtlstest.NewRoot(t)
	a, b := tcpPair(t)
	for _, conn := range []*net.TCPConn{a, b} {
		conn.SetReadBuffer(4 << 20)
		conn.SetWriteBuffer(4 << 20)
	}
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: trustDomain}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	limits := catalog.TLSLimits{Max: version}
	leaves := map[string]*tls.Certificate{"web": root.Leaf(t, spiffe("web")), "api": root.Leaf(t, spiffe("api"))}
	snap, err := catalog.New(catalog.Snapshot{
		TrustDomain: trustDomain, Datacenter: "dc1", Policy: p, Roots: []*x509.Certificate{root.Cert}, Leaves: leaves,
		Services: map[string]*catalog.Service{"api": {Name: "api"}}, TLS: catalog.TLS{Incoming: limits, Outgoing: limits},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := mtls.New(snap, leaves)
	here, err := newWire(a, pool)
	if err != nil {
		t.Fatal(err)
	}
	there, err := newWire(b, pool)
	if err != nil {
		t.Fatal(err)
	}
	shaken := make(chan error, 1)
	var theirs *mtls.Secured
	go func() {
		var err error
		theirs, err = m.Accept(there, "api", "", func() error { return nil })
		shaken <- err
	}()
	ours, err := m.Connect(here, "web", &catalog.Target{Service: "api"}, "")
	if err := errors.Join(err, <-shaken); err != nil {
		t.Fatal(err)
	}
	return here.leg(ours), there.leg(theirs)
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
	overBothVersions(t, testTensOfKilobytesPerSystemCall)
}

func overBothVersions(t *testing.T, test func(*testing.T, uint16)) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) { test(t, version) })
	}
}

func testTensOfKilobytesPerSystemCall(t *testing.T, version uint16) {
	client, server := handshakePair(t, newBuffers(), version)
	const chunks = 16
	readsBefore, writesBefore := syscalls(t)
	total, pieces := 0, 0
	for n := 1; n <= chunks; n++ { // each is read before the next, because socket buffers may hold no more
		if err := client.write(roomFor(text(plainChunk))); err != nil {
			t.Fatal(err)
		}
		for total < n*plainChunk {
			b, err := server.next()
			if err != nil {
				t.Fatal(err)
			}
			total += b.size()
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
func roomFor(text string) batch {
	buf := new(buffer)
	buf.spans[0] = span{headroom, headroom + copy(buf.bytes[headroom:], text)}
	return batch{buf, buf.spans[:1]}
}

func (b batch) text() string {
	var all []byte
	for _, s := range b.spans {
		all = append(all, b.buf.bytes[s.from:s.to]...)
	}
	return string(all)
}

func TestAnIdleLegHoldsNoBuffer(t *testing.T) {
	client, server := securePair(t, newBuffers())
	if err := client.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if b, err := server.next(); err != nil || b.text() != "x" {
		t.Fatalf("%q, %v", b.text(), err)
	}
	server.release()
	waiting := make(chan error, 1)
	go func() {
		_, err := server.next()
		waiting <- err
	}()
	if client.in != nil {
		t.Error("a buffer is held for reading")
	}
	client.reset()
	if err := <-waiting; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	if server.in != nil {
		t.Error("a buffer is held for reading")
	}
}

func TestAnIdleLegOfAnApplicationHoldsNoBuffer(t *testing.T) {
	application, here := tcpPair(t)
	leg, err := newPlainLeg(here, newBuffers())
	if err != nil {
		t.Fatal(err)
	}
	say(t, application, "x")
	if b, err := leg.next(); err != nil || b.text() != "x" {
		t.Fatalf("%q, %v", b.text(), err)
	}
	leg.release()
	if leg.held != nil {
		t.Error("a buffer is held when its bytes are passed on")
	}
	abort(application)
	if _, err := leg.next(); !errors.Is(err, syscall.ECONNRESET) || leg.held != nil || leg.socket.reading.buf != nil {
		t.Errorf("got %v, want a reset; or a buffer is held after a wait for nothing", err)
	}
}

// A leg that is half-closed may live on for long.
func TestAHalfClosedLegHoldsNoBuffer(t *testing.T) {
	client, server := securePair(t, newBuffers())
	if err := errors.Join(client.write(roomFor("x")), client.closeWrite()); err != nil {
		t.Fatal(err)
	}
	if _, err := server.next(); err != nil {
		t.Fatal(err)
	}
	server.release()
	for range 2 {
		if _, err := server.next(); !errors.Is(err, io.EOF) || server.in != nil {
			t.Errorf("%v; a buffer is held: %v", err, server.in != nil)
		}
	}
}

func TestPartOfARecordIsNoEnd(t *testing.T) {
	client, server := securePair(t, newBuffers())
	b := roomFor("slowly")
	sealed := make([]byte, record.SealedSize(b.size()))
	n, err := client.records.Seal(sealed, b.buf.bytes[b.spans[0].from:b.spans[0].to])
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for _, b := range sealed[:n] {
			client.conn.Write([]byte{b})
		}
	}()
	if b, err := server.next(); err != nil || b.text() != "slowly" {
		t.Fatalf("%q, %v", b.text(), err)
	}
}

// Records of all sizes arrive as they were, however they meet in what is read.
func TestRecordsOfAllSizesArriveInOrder(t *testing.T) {
	client, server := securePair(t, newBuffers())
	var want strings.Builder
	sent := make(chan error, 1)
	pieces := make([]string, 3000)
	for i := range pieces {
		pieces[i] = text(1 + i*i*7919%(1+i%40*1000))
		want.WriteString(pieces[i])
	}
	go func() {
		for _, piece := range pieces {
			if err := client.write(roomFor(piece)); err != nil {
				sent <- err
				return
			}
		}
		sent <- client.closeWrite()
	}()
	var got strings.Builder
	for {
		b, err := server.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got.WriteString(b.text())
		server.release()
	}
	if err := <-sent; err != nil || got.String() != want.String() {
		t.Errorf("%d of %d bytes arrived as they were, %v", got.Len(), want.Len(), err)
	}
}

// A peer is told why it is cut off, and one that reads nothing is not waited for.
func TestAViolationIsAnsweredByAnAlertWithoutWaiting(t *testing.T) {
	client, server := securePair(t, newBuffers())
	if _, err := client.conn.Write([]byte{22, 3, 3, 0, 1, 0}); err != nil {
		t.Fatal(err)
	}
	violation, err := server.next()
	if _, ok := errors.AsType[*record.Violation](err); !ok {
		t.Fatalf("%q, %v", violation.text(), err)
	}
	_, err = client.next()
	if remote, ok := errors.AsType[*net.OpError](err); !ok || remote.Op != "remote error" {
		t.Errorf("got %v, want an alert", err)
	}
}

// crypto/tls gives a close_notify five seconds to get into the socket, which a slow reader may exceed.
func TestWriteDeadlinesOfTLSAreIgnored(t *testing.T) {
	c, server := handshakePair(t, newBuffers(), tls.VersionTLS12)
	client := c.(*olderLeg)
	client.tls.SetWriteDeadline(time.Now().Add(-time.Second))
	if err := client.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if b, err := server.next(); err != nil || b.text() != "x" {
		t.Fatalf("%q, %v", b.text(), err)
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
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		b.Run(tls.VersionName(version), func(b *testing.B) {
			pool := newBuffers()
			client, a := tcpPair(b)
			c, server := tcpPair(b)
			legA, _ := newPlainLeg(a, pool)
			legC, _ := newPlainLeg(c, pool)
			out, in := handshakePair(b, pool, version)
			startRelay(b, legA, out)
			startRelay(b, legC, in)
			defer reportCPU(b)()
			benchmarkCopy(b, client, server)
		})
	}
}

func startRelay(b *testing.B, x, y leg) {
	var up, down atomic.Uint64
	r := newRelay(x, y, &up, &down, func(run func() error) error { return run() }, nil)
	var group sync.WaitGroup
	group.Go(func() { r.start(&group, func(error) {}) })
	b.Cleanup(func() {
		r.finish(context.Canceled)
		group.Wait()
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

package nodeproxy

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

// TestAFloodOfWholeHellosHarmsNoNeighbour lets 200 addresses begin handshakes with api, each of which costs a signature, as fast as
// they are answered, while web is called by others.
func TestAFloodOfWholeHellosHarmsNoNeighbour(t *testing.T) {
	const addresses, hellos, calls = 200, 4000, 40
	m := newMesh(t, func(c *Config, _ *fakeKernel) {
		c.Limits.Connections, c.Limits.Handshakes, c.Limits.Handshake = 10000, 1000, 5*time.Second
	})
	a := m.app()
	flooded, spared := m.instance("api", "api-1", a.addr()).Mesh, m.instance("web", "web-1", a.addr()).Mesh
	m.publish()
	leaf := m.leaf("web")
	call := func() time.Duration {
		begin := time.Now()
		client := m.peer(spared, leaf)
		say(t, client, "x")
		server := a.accept()
		hear(t, server, "x")
		took := time.Since(begin)
		client.Close()
		server.Close()
		return took
	}
	alone := make([]time.Duration, calls)
	for i := range alone {
		alone[i] = call()
	}
	hello := wholeHello(t)
	var said, answered atomic.Int64
	var flood sync.WaitGroup
	for i := range addresses {
		from := &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i/200), byte(1+i%200))}
		flood.Go(func() {
			for said.Add(1) <= hellos {
				if sayHello(from, flooded, hello) {
					answered.Add(1)
				}
			}
		})
	}
	eventually(t, "the flood is answered", func() bool { return answered.Load() > addresses })
	var during []time.Duration
	for range calls {
		took := call()
		if said.Load() < hellos {
			during = append(during, took)
		}
	}
	flood.Wait()
	slices.Sort(alone)
	slices.Sort(during)
	if len(during) > 0 {
		t.Logf("%d hellos were answered; a call took %s alone (worst %s), and %s during the flood (worst %s of %d)",
			answered.Load(), alone[len(alone)/2], alone[len(alone)-1], during[len(during)/2], during[len(during)-1], len(during))
	}
}

// sayHello begins a handshake and leaves when it is answered. It says whether it was.
func sayHello(from *net.TCPAddr, to netip.AddrPort, hello []byte) bool {
	d := net.Dialer{LocalAddr: from, Timeout: patience}
	conn, err := d.Dial("tcp4", to.String())
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(hello); err != nil {
		return false
	}
	n, _ := conn.Read(make([]byte, 1<<10))
	return n > 0
}

// A hello without a key share costs an answer and the next one another, of which only the first has a turn.
func TestAHelloWithoutAKeyShareIsNotAskedForAnother(t *testing.T) {
	m := newMesh(t)
	at := m.instance("api", "api-1", m.app().addr()).Mesh
	m.publish()
	hello := wholeHello(t)
	from := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	if !sayHello(from, at, hello) {
		t.Error("a hello with key shares is not answered")
	}
	if sayHello(from, at, withoutKeyShares(t, hello)) {
		t.Error("a hello without a key share is answered")
	}
	m.events.wait(t, "refusal of a hello without a key share", func(c admin.Connection) bool {
		return c.Reason == catalog.ReasonHandshakeFailed && strings.Contains(c.Detail, "no key share")
	})
}

// withoutKeyShares is a hello in one record with an empty extension key_share (RFC 8446, 4.2.8).
func withoutKeyShares(t *testing.T, hello []byte) []byte {
	t.Helper()
	const headers, extension = 5 + 4, 51
	at := headers + 2 + 32
	at += 1 + int(hello[at])                           // session id
	at += 2 + int(binary.BigEndian.Uint16(hello[at:])) // cipher suites
	at += 1 + int(hello[at])                           // compression
	lengths, end := at, at+2+int(binary.BigEndian.Uint16(hello[at:]))
	for at += 2; at < end; {
		kind, size := binary.BigEndian.Uint16(hello[at:]), int(binary.BigEndian.Uint16(hello[at+2:]))
		if kind != extension {
			at += 4 + size
			continue
		}
		cut := size - 2
		short := slices.Concat(hello[:at+2], []byte{0, 2, 0, 0}, hello[at+4+size:])
		binary.BigEndian.PutUint16(short[3:], binary.BigEndian.Uint16(short[3:])-uint16(cut))
		binary.BigEndian.PutUint16(short[7:], binary.BigEndian.Uint16(short[7:])-uint16(cut))
		binary.BigEndian.PutUint16(short[lengths:], binary.BigEndian.Uint16(short[lengths:])-uint16(cut))
		return short
	}
	t.Fatal("the hello has no key_share")
	return nil
}

// wholeHello is what a TLS client sends first.
func wholeHello(t *testing.T) []byte {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(near, &tls.Config{InsecureSkipVerify: true}).Handshake() // it fails when far is closed
	}()
	defer func() { near.Close(); far.Close(); <-done }()
	first := make([]byte, 1<<14)
	n, err := far.Read(first)
	if err != nil {
		t.Fatal(err)
	}
	return first[:n]
}

package nodeproxy

import (
	"crypto/tls"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
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

package nodeproxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

func TestPerWorkloadCapSparesTheNeighbour(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.PerWorkload = 3 })
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.next.Leaves["batch"] = m.leaf("batch")
	m.publish()
	at := m.originOf(7, apiVIP())
	var held []*net.TCPConn
	for range 3 {
		client := m.dial(at)
		say(t, client, "x")
		server := a.accept()
		hear(t, server, "x")
		held = append(held, client)
	}
	e := m.refused(at, admin.Outbound, catalog.ReasonCapacity)
	if e.Source.Workload != "/cg/web" {
		t.Errorf("%+v", e)
	}
	// A neighbour reaches the same instance, through this node and from elsewhere.
	neighbour := m.peer(m.next.Services["api"].Instances[0].Mesh, m.leaf("batch"))
	say(t, neighbour, "y")
	hear(t, a.accept(), "y")
	// The destination protects itself as well: it counts what one source has.
	greedy := m.peer(m.next.Services["api"].Instances[0].Mesh, m.leaf("web"))
	greedy.Handshake()
	wantReset(t, greedy)
	if e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound)); e.Reason != catalog.ReasonCapacity {
		t.Errorf("%+v", e)
	}
	// A place is free again when a connection ends.
	held[0].SetLinger(0)
	held[0].Close()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	client := m.dial(at)
	say(t, client, "z")
	hear(t, a.accept(), "z")
}

func TestGlobalCap(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Connections = 2 }) // one connection here is two
	client, server := m.pair()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonCapacity)
	client.Close()
	server.Close()
	m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	m.dial(m.origin(apiVIP()))
	m.events.waitN(t, "open", 2, is(admin.EventOpen, admin.Outbound))
}

func TestMaxInboundConnections(t *testing.T) {
	m := newMesh(t)
	m.next.Services["api"].MaxInbound = 1
	client, server := m.pair()
	say(t, client, "x")
	hear(t, server, "x")
	delivered := m.kernel.deliveries()
	m.wantRefused(m.origin(apiVIP()))
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
	if e.Reason != catalog.ReasonCapacity || m.kernel.deliveries() != delivered {
		t.Errorf("%+v after %d deliveries", e, m.kernel.deliveries())
	}
}

func TestSlowHandshakesMeetTheirCapAndSpareOthers(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Handshakes = 8 })
	a := m.app()
	flooded := m.instance("api", "api-1", m.silent().String()).Mesh
	m.instance("web", "web-1", a.addr())
	m.publish()
	for range 50 { // connected, and silent
		conn, err := net.DialTimeout("tcp", flooded.String(), patience)
		if err == nil {
			m.owned(conn)
		}
	}
	// One address may have half of the eight.
	denied := m.events.waitN(t, "capacity", 46, is(admin.EventDenied, admin.Inbound))
	for _, e := range denied {
		if e.Reason != catalog.ReasonCapacity || e.Destination.Instance != "api-1" {
			t.Fatalf("%+v", e)
		}
	}
	eventually(t, "four handshakes in progress", func() bool { return m.proxy.live.len() == 4 })
	for range 10 {
		client := m.dial(m.origin(netip.AddrPortFrom(vip["web"], 80)))
		say(t, client, "x")
		hear(t, a.accept(), "x")
	}
}

func TestASlowHandshakeEndsAtItsDeadline(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Handshake = 100 * time.Millisecond })
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.publish()
	conn := m.dial(at.String())
	say(t, conn, "\x16\x03\x01") // the beginning of a record
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
	if e.Reason != catalog.ReasonHandshakeFailed {
		t.Errorf("%+v", e)
	}
	m.neverDelivered()
}

func TestConnectTimeoutIsTheServices(t *testing.T) {
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, _ netip.AddrPort) (*net.TCPConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	for i := range 5 {
		m.remote(fmt.Sprintf("api-%d", i), m.silent())
	}
	svc := *m.next.Services["api"]
	svc.ConnectTimeout = 100 * time.Millisecond
	m.next.Services["api"] = &svc
	m.publish()
	begin := time.Now()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonConnectFailed)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("gave up after %s, want about two timeouts of 100 ms", took)
	}
}

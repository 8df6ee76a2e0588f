package nodeproxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

func TestPerWorkloadCapSparesTheNeighbour(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.PerWorkload = 3 })
	a := m.app()
	m.instance("api", "api-1", a.addr())
	b := m.app()
	m.instance("web", "web-1", b.addr())
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
	other := m.dial(m.originOf(8, netip.AddrPortFrom(vip["web"], 80))) // of another workload
	say(t, other, "w")
	hear(t, b.accept(), "w")
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

func TestSilentHandshakesGiveWayToOthersOfTheirAddress(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Handshakes = 8 })
	a := m.app()
	flooded := m.instance("api", "api-1", a.addr()).Mesh
	m.publish()
	for range 50 { // connected, and silent
		m.dial(flooded.String())
	}
	// One address may have half of the eight.
	denied := m.events.waitN(t, "capacity", 46, is(admin.EventDenied, admin.Inbound))
	for _, e := range denied {
		if e.Reason != catalog.ReasonCapacity || e.Destination.Instance != "api-1" {
			t.Fatalf("%+v", e)
		}
	}
	eventually(t, "four handshakes in progress", func() bool { return m.proxy.live.len() == 4 })
	for range 10 { // from the same address, as the places stay taken
		client := m.peer(flooded, m.leaf("web"))
		say(t, client, "x")
		hear(t, a.accept(), "x")
		m.dial(flooded.String())
	}
}

func TestOfHandshakesInProgressOnlyThosePeersGiveWayThatTakeTheirTime(t *testing.T) {
	h := handshakes{scopes: make(map[slotKey]*scope)}
	l := Limits{Connections: 100, Handshakes: 4}
	begin := func(client string) (*handshake, error) {
		near, far := tcpPair(t)
		t.Cleanup(func() { far.Close() })
		return h.begin(newConnection(1, admin.Inbound), near, l.handshakeSlots("api-1", netip.MustParseAddr(client)))
	}
	must := func(hs *handshake, err error) *handshake {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return hs
	}
	inProgress := func(hs *handshake) bool { return hs.c.ctx.Err() == nil }
	first, second := must(begin("10.0.0.1")), must(begin("10.0.0.1"))
	first.reach(heard)
	second.reach(heard)
	second.reach(answered)
	if _, err := begin("10.0.0.1"); catalog.ReasonOf(err, "") != catalog.ReasonCapacity || !inProgress(first) || !inProgress(second) {
		t.Errorf("got %v for a third of one address, while two have said hello", err)
	}
	second.since = second.since.Add(-2 * slowHandshake)
	third := must(begin("10.0.0.1"))
	if !inProgress(first) || inProgress(second) {
		t.Error("the one whose peer takes its time should have given way")
	}
	must(begin("10.0.0.2"))
	must(begin("10.0.0.2")) // the instance is full
	must(begin("10.0.0.3"))
	if !inProgress(first) || inProgress(third) {
		t.Error("the oldest silent one of the instance should have given way")
	}
	for _, hs := range []*handshake{second, third} {
		hs.end() // a second time
		hs.reach(heard)
	}
	if n := h.scopes[l.handshakeSlots("api-1", netip.Addr{})[1].key].len(); n != 4 {
		t.Errorf("%d handshakes are counted, want 4", n)
	}
}

func TestAnUnreadHelloDoesNotGiveWay(t *testing.T) {
	h := handshakes{scopes: make(map[slotKey]*scope)}
	l := Limits{Connections: 100, Handshakes: 2}
	near, far := tcpPair(t)
	defer far.Close()
	begin := func() error {
		_, err := h.begin(newConnection(1, admin.Inbound), near, l.handshakeSlots("api-1", netip.MustParseAddr("10.0.0.1")))
		return err
	}
	say(t, far, "hello")
	eventually(t, "the hello is here", func() bool { return (&handshake{conn: near}).unread() })
	if err := begin(); err != nil {
		t.Fatal(err)
	}
	if err := begin(); catalog.ReasonOf(err, "") != catalog.ReasonCapacity {
		t.Errorf("got %v while the only other one waits for us", err)
	}
}

func TestAWorkloadsHandshakesWaitForEachOtherAndNotForTheNeighbours(t *testing.T) {
	open := make(chan struct{})
	var dialing atomic.Int32
	m := newMesh(t, func(c *Config, k *fakeKernel) {
		c.Limits.Handshakes, c.Limits.Connect = 32, 500*time.Millisecond // two at once for each workload
		k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
			dialing.Add(1)
			select {
			case <-open:
			case <-t.Context().Done():
			}
			return dialTCP(t.Context(), to.String())
		}
	})
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.next.Leaves["batch"] = m.leaf("batch")
	m.publish()
	hog := m.originOf(7, apiVIP())
	for range 5 {
		m.dial(hog)
	}
	for _, e := range m.events.waitN(t, "refused", 3, is(admin.EventDenied, admin.Outbound)) {
		if e.Reason != catalog.ReasonCapacity || !strings.Contains(e.Detail, "turn") {
			t.Errorf("%+v", e)
		}
	}
	if n := dialing.Load(); n != 2 {
		t.Errorf("%d connections of one workload are dialled at once, want 2", n)
	}
	neighbour := m.dial(m.originOf(8, apiVIP()))
	eventually(t, "the neighbour is dialled for", func() bool { return dialing.Load() == 3 })
	close(open)
	say(t, neighbour, "x")
	m.events.waitN(t, "open", 3, is(admin.EventOpen, admin.Outbound))
	eventually(t, "nothing is held", func() bool {
		m.proxy.turns.mu.Lock()
		defer m.proxy.turns.mu.Unlock()
		return len(m.proxy.turns.lines) == 0
	})
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

func TestIdleTunnelsAreBoundedBySourceAndInstance(t *testing.T) {
	l := Limits{Connections: 1 << 20}
	s := slots{taken: make(map[slotKey]int)}
	room := func(instance, source string) (n int) {
		for ; ; n++ {
			if _, err := s.take(l.tunnelSlots(instance, source)...); err != nil {
				return n
			}
		}
	}
	for i := range 5 {
		want := 256
		if i == 4 { // 1024 of one source are taken
			want = 0
		}
		if n := room(fmt.Sprint("api-", i), "web"); n != want {
			t.Errorf("%d of instance %d, want %d", n, i, want)
		}
	}
	if n := room("api-0", "batch"); n != 256 {
		t.Errorf("%d of another source", n)
	}
}

func TestMaxInboundCountsStreams(t *testing.T) {
	m := newMesh(t, tunnelled)
	a := m.app()
	at := m.instance("api", "api-1", a.addr()).Mesh
	svc := *m.next.Services["api"]
	svc.MaxInbound = 1
	m.next.Services = map[string]*catalog.Service{"api": &svc, "web": m.next.Services["web"]}
	m.publish()
	first, second := m.tunnelTo(at, "web"), m.tunnelTo(at, "web")
	if err := first.open(newOpening("10.0.0.1:1"), batch{}); err != nil {
		t.Fatal(err)
	}
	server := a.accept()
	eventually(t, "the stream is a connection of the node's, and the other tunnel none", func() bool {
		m.proxy.slots.mu.Lock()
		defer m.proxy.slots.mu.Unlock()
		return m.proxy.slots.taken[everyConnection] == 1
	})
	wantRefusal(t, second.open(newOpening("10.0.0.1:1"), batch{}), catalog.ReasonCapacity)
	server.Close()
	first.finishes()
	m.events.wait(t, "close", is(admin.EventClose, admin.Inbound))
	if err := second.open(newOpening("10.0.0.1:1"), batch{}); err != nil {
		t.Errorf("the place was not given back: %v", err)
	}
}

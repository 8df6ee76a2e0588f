package nodeproxy

import (
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/tunnel"
)

// Two instances of another node, over tunnels that rest and one in use.
func TestCallersOfAnInstanceThatEndsGoToAnotherAtOnceIfThereIsOne(t *testing.T) {
	far := newMesh(t, tunnelled)
	one, two := far.instance("api", "api-1", far.echoing()), far.instance("api", "api-2", far.echoing())
	far.publish()
	near := newMesh(t, tunnelled)
	near.trust(far.root)
	near.remote("api-1", one.Mesh)
	near.remote("api-2", two.Mesh)
	near.publish()
	to := near.origin(apiVIP())
	closed := func(instance string) int {
		events, _ := near.events.all()
		n := 0
		for _, e := range events {
			if e.Event == admin.EventClose && e.Detail == "" && e.Destination.Instance == instance {
				n++
			}
		}
		return n
	}
	live := near.dial(to)
	say(t, live, "ping")
	hear(t, live, "ping")
	busy := near.events.wait(t, "open", is(admin.EventOpen, admin.Outbound)).Destination.Instance
	other := near.dial(to) // goes to the less busy one: both are as busy from now on
	say(t, other, "ping")
	hear(t, other, "ping")
	calls := 0
	told := func() {
		t.Helper()
		eventually(t, "all connections are told of", func() bool { return closed("api-1")+closed("api-2") == calls })
	}
	for closed("api-1") < 5 || closed("api-2") < 5 {
		exchange(t, near, to)
		calls++
	}
	told()
	far.proxy.Ending([]string{busy})
	eventually(t, "the tunnels to it that rest are closed", func() bool {
		far.proxy.tunnels.mu.Lock()
		defer far.proxy.tunnels.mu.Unlock()
		for e := range far.proxy.tunnels.ends {
			if e.served.Instance == busy && e.resting() {
				return false
			}
		}
		return true
	})
	before := closed(busy)
	const n = 50
	for range n {
		exchange(t, near, to)
		calls++
	}
	told()
	if now := closed(busy); now != before {
		t.Errorf("%d of %d connections went to the instance that ends", now-before, n)
	}
	say(t, live, "more")
	hear(t, live, "more")
	far.proxy.Ending([]string{"api-1", "api-2"})
	for range n {
		exchange(t, near, to)
	}
	events, _ := near.events.all()
	for _, e := range events {
		if e.Event == admin.EventDenied || e.Event == admin.EventClose && e.Detail != "" {
			t.Errorf("%+v", e)
		}
	}
}

// What an older peer sees is a tunnel that closes between streams.
func TestTheLastWordOfATunnelComesBetweenStreams(t *testing.T) {
	m := newMesh(t, tunnelled)
	at := m.instance("api", "api-1", m.echoing()).Mesh
	m.publish()
	f := m.tunnelTo(at, "web")
	if err := f.open(newOpening("10.0.0.7:4711"), roomFor("ping")); err != nil {
		t.Fatal(err)
	}
	m.proxy.Ending([]string{"api-1"})
	f.hears("ping")
	f.finishes()
	if err := f.need(tunnel.HeaderSize); err != nil {
		t.Fatal(err)
	}
	if h, err := tunnel.ParseHeader(f.take(tunnel.HeaderSize)); err != nil || h.Type != tunnel.Ending {
		t.Errorf("after the stream came %+v, %v", h, err)
	}
	if f.need(1) == nil {
		t.Error("and then more")
	}
}

package redirect_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"nodeproxy.io/redirect"
)

// TestAPortIsNeverGuardedAloneWhileItIsTakenOverOrGivenBack takes a port over from who listens there, as an Envoy does, and gives it
// back, in a namespace that is guarded only meanwhile. Whoever connects is answered by the one or the other, each time.
func TestAPortIsNeverGuardedAloneWhileItIsTakenOverOrGivenBack(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	if err := n.hub.Address("pod1", netip.MustParsePrefix("10.9.1.1/24")); err != nil {
		t.Fatal(err)
	}
	const port = 20000
	at := netip.AddrPortFrom(p.v4, port)
	envoy, err := p.netns.Listen("tcp4", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { envoy.Close() })
	answer := func(ln net.Listener) {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}
	go answer(envoy)
	for _, ln := range p.ns.Inbound {
		go answer(ln)
	}
	rules := []redirect.Rule{
		{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id},
		{Namespace: p.ns.Cookie, Port: port, Action: redirect.Strict, Workload: p.id},
		{Namespace: p.ns.Cookie, Addr: p.v4, Port: port, Action: redirect.Steer, Workload: p.id},
	}
	const connections = 200 // of some tens of which one is refused if the rules change in another order
	ended := make(chan error, 1)
	go func() {
		for i := range connections {
			dialling, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			conn, err := n.hub.Dial(dialling, "tcp4", at.String())
			cancel()
			if err != nil {
				ended <- fmt.Errorf("connection %d: %w", i, err)
				return
			}
			conn.Close()
		}
		ended <- nil
	}()
	for move := 0; ; move++ {
		given := rules
		if move%2 == 1 {
			given = nil
		}
		if err := n.r.SetRules(given); err != nil {
			t.Error(err)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			t.Logf("%d moves", move)
			return
		default:
		}
	}
}

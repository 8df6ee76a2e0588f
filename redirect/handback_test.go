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
	ctx, stop := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	dialled := 0
	go func() {
		defer close(failed)
		for ; ctx.Err() == nil; dialled++ {
			dialling, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			conn, err := n.hub.Dial(dialling, "tcp4", at.String())
			cancel()
			if err != nil {
				failed <- fmt.Errorf("connection %d: %w", dialled, err)
				return
			}
			conn.Close()
		}
	}()
	const moves = 20_000
	for move := range moves {
		given := rules
		if move%2 == 1 {
			given = nil
		}
		if err := n.r.SetRules(given); err != nil {
			t.Fatal(err)
		}
		if len(failed) > 0 {
			break
		}
	}
	stop()
	if err := <-failed; err != nil {
		t.Error(err)
	}
	<-failed
	t.Logf("%d connections in %d moves", dialled, moves)
}

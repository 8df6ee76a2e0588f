package redirect_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/redirect"
)

// TestAnAddressIsRefusedToOneWorkloadOnly also while the daemon is away: the refusal needs nobody.
func TestAnAddressIsRefusedToOneWorkloadOnly(t *testing.T) {
	n := newNode(t)
	one, other := n.pod(), n.pod()
	other.serve()
	events := make(chan redirect.Event, 10)
	go n.r.Events(func(e redirect.Event) { events <- e }, func(redirect.GrantEvent) {})
	agent := netip.MustParseAddrPort("10.9.0.1:8500")
	err := errors.Join(
		n.r.SetDestinations([]redirect.Destination{{Addr: agent.Addr(), Port: agent.Port()}}, nil), // so that the other gets an answer
		n.r.SetOwn([]redirect.Destination{
			{Addr: agent.Addr(), Port: agent.Port(), Workload: one.id, Refuse: true},
			{Addr: netip.MustParseAddr("127.0.0.1"), Port: 8500, Workload: one.id, Refuse: true},
		}, false),
	)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(network, addr string) {
		t.Helper()
		if out := one.dial(network, addr); !strings.Contains(out, "connection refused") {
			t.Errorf("to %s: %s", addr, out)
		}
		if e := <-events; e.Verdict != redirect.ConsulAccess || e.Workload != one.id || e.Allowed {
			t.Errorf("to %s: event %+v", addr, e)
		}
	}
	refused("tcp4", "10.9.0.1:8500")
	refused("mapped", "[::ffff:10.9.0.1]:8500")
	refused("tcp4", "127.0.0.1:8500")
	if out := other.dial("tcp4", "10.9.0.1:8500"); !strings.Contains(out, "10.9.0.1:8500 for workload") {
		t.Errorf("the other workload: %s", out)
	}
	n.rest(true)
	refused("tcp4", "10.9.0.1:8500")
	if err := n.r.SetOwn(nil, false); err != nil {
		t.Fatal(err)
	}
	if out := one.dial("tcp4", "127.0.0.1:8500"); len(events) > 0 {
		t.Errorf("it is refused still: %s", out)
	}
}

package redirect_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

func TestAnUpstreamIsRedirectedForItsWorkloadOnly(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	other, err := p.cgroup.Child("other") // a workload in the same network namespace
	if err != nil {
		t.Fatal(err)
	}
	outer, err := redirect.CgroupID(p.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	id, err := n.r.NewWorkload(2)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.r.SetNesting(outer, redirect.Nesting{Inner: true}); err != nil {
		t.Fatal(err)
	}
	if err := n.r.Enroll(other.Path(), id, redirect.Nesting{Outer: true}); err != nil {
		t.Fatal(err)
	}
	holder := p.app(nil, "NP_APP=listen", "NP_ADDR=127.0.0.1:9191") // a sidecar, say
	waitFor(t, holder, "listening")
	own := []redirect.Destination{{Addr: netip.MustParseAddr("127.0.0.1"), Port: 9191, Workload: p.id}}
	if err := n.r.SetOwn(own, false); err != nil {
		t.Fatal(err)
	}
	expect := func(what string, cgroup *netlab.Cgroup, addr, want string) {
		t.Helper()
		if got := p.dialFrom(cgroup, "tcp4", addr); !strings.Contains(got, want) {
			t.Errorf("%s: got %s, want %s", what, got, want)
		}
	}
	mine := fmt.Sprintf("127.0.0.1:9191 for workload %d", p.id)
	expect("the workload", p.cgroup, "127.0.0.1:9191", mine)
	expect("another workload of the namespace", other, "127.0.0.1:9191", `got "hello"`)
	expect("no workload", nil, "127.0.0.1:9191", `got "hello"`)
	n.destinations("240.0.0.1", "240.0.0.2") // leaves the workloads' own alone
	expect("the workload, after another sync", p.cgroup, "127.0.0.1:9191", mine)
	expect("a virtual IP", p.cgroup, "240.0.0.2:80", "240.0.0.2:80 for workload")
	if err := n.r.SetOwn(nil, false); err != nil {
		t.Fatal(err)
	}
	expect("the workload, without the upstream", p.cgroup, "127.0.0.1:9191", `got "hello"`)
	if err := n.r.SetDestinations([]redirect.Destination{{Addr: netip.MustParseAddr("127.0.0.1"), Port: 9191}}, nil); err == nil {
		t.Error("loopback is redirected for every workload")
	}
}

func TestOnlyTheMeshIsOpen(t *testing.T) {
	n := newNode(t)
	p, outside := n.pod(), n.pod()
	p.serve()
	waitFor(t, p.app(nil, "NP_APP=listen", "NP_ADDR=:7000"), "listening")
	n.destinations("240.0.0.1")
	far, far6 := netip.AddrPortFrom(outside.v4, 7000), netip.AddrPortFrom(outside.v6, 7000)
	set := func(meshOnly bool) {
		t.Helper()
		own := []redirect.Destination{{Addr: p.v4, Workload: p.id, Pass: true}}
		if err := n.r.SetOwn(own, meshOnly); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(network, addr, want string) {
		t.Helper()
		if got := p.dial(network, addr); !strings.Contains(got, want) {
			t.Errorf("%s: got %s, want %s", addr, got, want)
		}
	}
	const open, refused, passed = `got "hello"`, "connection refused", "unreachable" // for there is no route
	set(true)
	expect("tcp4", far.String(), refused)
	expect("mapped", far.String(), refused)
	expect("tcp6", far6.String(), refused)
	expect("tcp4", "127.0.0.1:7000", open)
	expect("tcp4", "0.0.0.0:7000", open)
	expect("tcp6", "[::1]:7000", open)
	expect("tcp4", netip.AddrPortFrom(p.v4, 7000).String(), open)
	expect("tcp4", netip.AddrPortFrom(outside.v4, 53).String(), passed)
	expect("tcp4", "240.0.0.1:80", "240.0.0.1:80 for workload")
	expect("tcp4", "240.0.0.9:80", refused)
	if got := p.dialFrom(nil, "tcp4", far.String()); !strings.Contains(got, passed) {
		t.Errorf("a process that is no workload's: %s", got)
	}
	set(false)
	expect("tcp4", far.String(), passed)
}

// Entries are written many at a time: those that there is room for must be there, the others named, and written once there is room.
func TestAFullMapHoldsWhatItCanAndTheRestOnceThereIsRoom(t *testing.T) {
	const room, more = 262144, 100
	n := newNode(t)
	p := n.pod()
	p.serve()
	own := make([]redirect.Destination, room+more)
	address := netip.MustParseAddr("10.100.0.0")
	for i := range own {
		address = address.Next()
		own[i] = redirect.Destination{Addr: address, Port: 8500, Workload: p.id, Refuse: true}
	}
	err := n.r.SetOwn(own, false)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d of %d entries in use", room, room)) || !strings.Contains(err.Error(), fmt.Sprintf("and %d more", more-3)) {
		t.Fatalf("%d addresses too many: %v", more, err)
	}
	if err := n.r.SetOwn(own[more:], false); err != nil {
		t.Fatalf("as many as there is room for: %v", err)
	}
	last := own[len(own)-1]
	if got := p.dial("tcp4", netip.AddrPortFrom(last.Addr, last.Port).String()); !strings.Contains(got, "refused") && !strings.Contains(got, "not permitted") {
		t.Errorf("the last address: %s", got)
	}
}

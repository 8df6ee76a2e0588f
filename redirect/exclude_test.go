package redirect_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/redirect"
)

// treat makes the pod a new workload with that treatment.
func (p *pod) treat(t redirect.Treatment) {
	p.n.t.Helper()
	var err error
	if p.id, err = p.n.r.NewWorkload(1); err != nil {
		p.n.t.Fatal(err)
	}
	if err := p.n.r.Treat(p.id, t); err != nil {
		p.n.t.Fatal(err)
	}
	if err := p.n.r.Enroll(p.cgroup.Path(), p.id, redirect.Nesting{}); err != nil {
		p.n.t.Fatal(err)
	}
}

func TestExcludedDestinationsAreDialledAsIfNotEnrolled(t *testing.T) {
	n := newNode(t)
	p, other := n.pod(), n.pod()
	p.serve()
	other.serve()
	n.destinations("10.9.1.2:7001", "10.9.1.2:7002", "fd09:1::2", "10.9.2.2:7001")
	listener := p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7001")
	waitFor(t, listener, "listening")
	const redirected, direct = "for workload", `got "hello"`
	expect := func(from *pod, network, addr, want string) {
		t.Helper()
		if out := from.dial(network, addr); !strings.Contains(out, want) {
			t.Errorf("%s: got %s, want %s", addr, out, want)
		}
	}
	for _, to := range [][2]string{{"tcp4", "10.9.1.2:7001"}, {"tcp6", "[fd09:1::2]:7001"}, {"mapped", "10.9.1.2:7001"}} {
		expect(p, to[0], to[1], redirected)
	}

	p.treat(redirect.Treatment{Ports: []uint16{7001}})
	for _, to := range [][2]string{{"tcp4", "10.9.1.2:7001"}, {"tcp6", "[fd09:1::2]:7001"}, {"mapped", "10.9.1.2:7001"}} {
		expect(p, to[0], to[1], direct)
	}
	expect(p, "tcp4", "10.9.1.2:7002", redirected)
	expect(other, "tcp4", "10.9.2.2:7001", redirected) // excluded for one workload, not for another

	p.treat(redirect.Treatment{Networks: []netip.Prefix{netip.MustParsePrefix("10.9.1.0/30")}})
	expect(p, "tcp4", "10.9.1.2:7001", direct)
	expect(p, "mapped", "10.9.1.2:7001", direct)
	expect(p, "tcp6", "[fd09:1::2]:7001", redirected)

	p.treat(redirect.Treatment{Networks: []netip.Prefix{netip.MustParsePrefix("fd09:1::/64")}})
	expect(p, "tcp4", "10.9.1.2:7001", redirected)
	expect(p, "tcp6", "[fd09:1::2]:7001", direct)

	if fill := exclusions(t, n); fill != 1 {
		t.Errorf("%d entries remain of workloads that are gone", fill)
	}
	n.r.Close() // a new daemon finds what an earlier one excluded, and forgets it with the workload
	n.open()
	for range 2 {
		if err := n.r.Unenroll(cgroupID(t, p.cgroup.Path())); err != nil {
			t.Error(err)
		}
	}
	if fill := exclusions(t, n); fill != 0 {
		t.Errorf("%d entries remain after un-enrolment", fill)
	}
}

func TestACgroupTakenOutOfAnEnrolledOneIsLeftAlone(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("10.9.1.2:7001")
	waitFor(t, p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7001"), "listening")
	child, err := p.cgroup.Child("out")
	if err != nil {
		t.Fatal(err)
	}
	if out := p.dialFrom(child, "tcp4", "10.9.1.2:7001"); !strings.Contains(out, "for workload") {
		t.Fatalf("before: %s", out)
	}
	id, err := n.r.NewWorkload(9)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.r.Treat(id, redirect.Untreated()); err != nil {
		t.Fatal(err)
	}
	if err := n.r.Enroll(child.Path(), id, redirect.Nesting{Outer: true}); err != nil {
		t.Fatal(err)
	}
	if err := n.r.SetNesting(cgroupID(t, p.cgroup.Path()), redirect.Nesting{Inner: true}); err != nil {
		t.Fatal(err)
	}
	if out := p.dialFrom(child, "tcp4", "10.9.1.2:7001"); !strings.Contains(out, `got "hello"`) {
		t.Errorf("the cgroup taken out: %s", out)
	}
	if out := p.dial("tcp4", "10.9.1.2:7001"); !strings.Contains(out, "for workload") {
		t.Errorf("the cgroup around it: %s", out)
	}
}

func TestAnObservedWorkloadIsReportedAndLeftAlone(t *testing.T) {
	n := newNode(t)
	events := make(chan redirect.Event, 64)
	done := make(chan error, 1)
	go func() { done <- n.r.Events(func(e redirect.Event) { events <- e }, func(redirect.GrantEvent) {}) }()
	t.Cleanup(func() {
		n.r.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	p := n.pod()
	p.treat(redirect.Treatment{Observe: true})
	n.destinations("10.9.1.2:7001")
	if err := n.r.SetRules([]redirect.Rule{{Namespace: p.ns.Cookie, Action: redirect.Observe, Workload: p.id}}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7001"), "listening")
	next := func(what string, verdict redirect.Verdict, inbound bool) {
		t.Helper()
		select {
		case e := <-events:
			if !e.Observed || e.Verdict != verdict || e.Inbound != inbound || e.Workload != p.id {
				t.Errorf("%s: got %+v", what, e)
			}
		case <-time.After(deadline):
			t.Errorf("%s was not reported", what)
		}
	}
	if out := p.dial("tcp4", "10.9.1.2:7001"); !strings.Contains(out, `got "hello"`) {
		t.Errorf("redirected: %s", out)
	}
	next("what would be redirected", 0, false)
	if out := p.dial("tcp4", "240.1.1.1:80"); strings.Contains(out, "refused") {
		t.Errorf("refused by us: %s", out)
	}
	next("what would be refused", redirect.UnknownService, false)
	if out := p.dialFrom(nil, "tcp4", "10.9.1.2:7001"); !strings.Contains(out, `got "hello"`) {
		t.Errorf("a stranger's plaintext: %s", out)
	}
	next("plaintext that would be refused", redirect.Plaintext, true)
}

func cgroupID(t *testing.T, path string) uint64 {
	t.Helper()
	id, err := redirect.CgroupID(path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// exclusions is how many entries the kernel has of what workloads exclude.
func exclusions(t *testing.T, n *node) int {
	t.Helper()
	fills, err := n.r.Fills()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fills {
		if f.Name == "exclusions" {
			return f.Entries
		}
	}
	t.Fatal("no such map")
	return 0
}

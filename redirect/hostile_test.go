package redirect_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// hostPod is a workload of a group in the daemon's own network namespace.
func (n *node) hostPod(name string, group uint32, ns *redirect.Namespace) *pod {
	n.t.Helper()
	p := &pod{n: n, ns: ns}
	var err error
	if p.cgroup, err = n.lab.Cgroup().Child(name); err != nil {
		n.t.Fatal(err)
	}
	p.id = n.enrollAs(p.cgroup, group, redirect.Nesting{})
	return p
}

func (n *node) enrollAs(cgroup *netlab.Cgroup, group uint32, nesting redirect.Nesting) uint32 {
	n.t.Helper()
	id, err := n.r.NewWorkload(group)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.r.Enroll(cgroup.Path(), id, nesting); err != nil {
		n.t.Fatal(err)
	}
	return id
}

// host opens the daemon's own network namespace.
func (n *node) host() *redirect.Namespace {
	n.t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		n.t.Fatal(err)
	}
	ns, err := n.r.OpenNamespace(f)
	if err != nil {
		n.t.Fatal(err)
	}
	if !ns.Host {
		n.t.Fatal("the test's network namespace is not taken for the daemon's own")
	}
	return ns
}

// freeAddress is an address on loopback on which nobody listens.
func freeAddress(t *testing.T) (address string, port uint16) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String(), ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

// nest enrolls a workload of group below p's cgroup.
func (p *pod) nest(group uint32) (*netlab.Cgroup, uint32) {
	p.n.t.Helper()
	cgroup, err := p.cgroup.Child("inner")
	if err != nil {
		p.n.t.Fatal(err)
	}
	outer, err := redirect.CgroupID(p.cgroup.Path())
	if err != nil {
		p.n.t.Fatal(err)
	}
	if err := p.n.r.SetNesting(outer, redirect.Nesting{Inner: true}); err != nil {
		p.n.t.Fatal(err)
	}
	return cgroup, p.n.enrollAs(cgroup, group, redirect.Nesting{Outer: true})
}

func (n *node) rules(rules ...redirect.Rule) {
	n.t.Helper()
	if err := n.r.SetRules(rules); err != nil {
		n.t.Fatal(err)
	}
}

// settled waits until no connection is in the maps, and asserts that none is on a workload's account.
func (n *node) settled(workloads ...uint32) {
	n.t.Helper()
	n.drained()
	for _, id := range workloads {
		pending, errPending := n.r.Account(id)
		announced, errAnnounced := n.r.Announced(id)
		if errPending != nil || errAnnounced != nil || pending != 0 || announced != 0 {
			n.t.Errorf("with no connection left workload %d has %d pending (%v) and %d announced ones (%v)", id, pending, errPending, announced, errAnnounced)
		}
	}
}

func answered(answer string) bool { return strings.Contains(answer, `got "hello"`) }
func refused(answer string) bool  { return strings.Contains(answer, "connection refused") }

func TestANestedWorkloadCallsItsOwnStrictPortAndItsAccountReturnsToZero(t *testing.T) {
	n := newNode(t)
	outer := n.pod()
	cgroup, inner := outer.nest(2)
	n.rules(redirect.Rule{Namespace: outer.ns.Cookie, Action: redirect.Strict, Workload: outer.id, Group: 1})
	app := outer.app(cgroup, "NP_APP=listen", "NP_ADDR=:8080")
	waitFor(t, app, "listening")
	for range 5 {
		for _, own := range []string{outer.v4.String() + ":8080", "[" + outer.v6.String() + "]:8080"} {
			if got := outer.dialFrom(cgroup, "tcp", own); !answered(got) {
				t.Errorf("the inner workload at %s: %s", own, got)
			}
			if got := outer.dial("tcp", own); !answered(got) {
				t.Errorf("the outer workload at %s: %s", own, got)
			}
		}
	}
	if got := outer.dialFrom(nil, "tcp4", outer.v4.String()+":8080"); !refused(got) {
		t.Errorf("a stranger at the strict port: %s", got)
	}
	n.settled(outer.id, inner)
}

func TestANestedWorkloadOfTheNodesNamespaceCallsItsOwnStrictPortAndTheOuterMayNot(t *testing.T) {
	n := newNode(t)
	outer := n.hostPod("outer", 1, n.host())
	cgroup, inner := outer.nest(2)
	address, port := freeAddress(t)
	n.rules(redirect.Rule{Namespace: outer.ns.Cookie, Port: port, Action: redirect.Strict, Workload: inner, Group: 2})
	app := outer.app(cgroup, "NP_APP=listen", "NP_ADDR="+address)
	waitFor(t, app, "listening")
	for range 5 {
		if got := outer.dialFrom(cgroup, "tcp4", address); !answered(got) {
			t.Errorf("the inner workload at its own port: %s", got)
		}
	}
	if got := outer.dial("tcp4", address); !refused(got) {
		t.Errorf("the outer workload, of another service, at the inner's port: %s", got)
	}
	n.settled(outer.id, inner)
}

func TestInTheNodesNamespaceAStrictPortIsOpenToTheWorkloadsOfItsGroupAlone(t *testing.T) {
	n := newNode(t)
	host := n.host()
	first, second, other := n.hostPod("first", 1, host), n.hostPod("second", 1, host), n.hostPod("other", 2, host)
	address, port := freeAddress(t)
	n.rules(redirect.Rule{Namespace: host.Cookie, Port: port, Action: redirect.Strict, Workload: first.id, Group: 1})
	app := first.app(first.cgroup, "NP_APP=listen", "NP_ADDR="+address)
	waitFor(t, app, "listening")
	for _, c := range []struct {
		who    string
		cgroup *netlab.Cgroup
		passes bool
	}{
		{"the workload itself", first.cgroup, true},
		{"another workload of its group", second.cgroup, true},
		{"a workload of another group", other.cgroup, false},
		{"a stranger", nil, false},
	} {
		got := first.dialFrom(c.cgroup, "tcp4", address)
		if c.passes && !answered(got) || !c.passes && !refused(got) {
			t.Errorf("%s: %s", c.who, got)
		}
	}
	n.settled(first.id, second.id, other.id)
}

func TestOpeningANamespaceTwiceIsRefusedAndDisturbsNothing(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	n.rules(redirect.Rule{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id, Group: 1})
	app := p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:8080")
	waitFor(t, app, "listening")
	f, err := os.Open(p.netns.Path())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.r.OpenNamespace(f); err == nil || !strings.Contains(err.Error(), "open already") {
		t.Errorf("the second open: %v", err)
	}
	if got, want := p.dial("tcp4", "240.0.0.1:80"), fmt.Sprintf("240.0.0.1:80 for workload %d", p.id); !strings.Contains(got, want) {
		t.Errorf("redirected after the second open: %s, want %s", got, want)
	}
	if got := p.dialFrom(nil, "tcp4", p.v4.String()+":8080"); !refused(got) {
		t.Errorf("a stranger at the strict port after the second open: %s", got)
	}
}

func TestIDsOfWorkloadsWhoseCgroupWentWhileNoDaemonRanAreForgotten(t *testing.T) {
	n := newNode(t)
	for range 3 {
		cgroup, err := n.lab.Cgroup().Child("short")
		if err != nil {
			t.Fatal(err)
		}
		n.enrollAs(cgroup, 1, redirect.Nesting{})
		if err := n.r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := cgroup.Remove(); err != nil {
			t.Fatal(err)
		}
		n.open()
		for end := time.Now().Add(deadline); n.entries("workloads") != 0 || len(n.r.Enrolled()) != 0; {
			if time.Now().After(end) {
				t.Fatalf("%d ids of workloads remain, and %v is enrolled", n.entries("workloads"), n.r.Enrolled())
			}
			time.Sleep(20 * time.Millisecond) // the kernel lets go of a removed cgroup when it finds the time
			if err := n.r.Close(); err != nil {
				t.Fatal(err)
			}
			n.open()
		}
	}
}

// entries is how many entries a map has.
func (n *node) entries(name string) int {
	n.t.Helper()
	fills, err := n.r.Fills()
	if err != nil {
		n.t.Fatal(err)
	}
	i := slices.IndexFunc(fills, func(f redirect.Fill) bool { return f.Name == name })
	if i < 0 {
		n.t.Fatalf("there is no map %s", name)
	}
	return fills[i].Entries
}

func TestCleanupOfADirectorySharedWithOtherSoftwareLeavesForeignLinksAttached(t *testing.T) {
	n := newNode(t)
	cgroup, err := n.lab.Cgroup().Child("foreign")
	if err != nil {
		t.Fatal(err)
	}
	want, err := redirect.CgroupID(cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	foreign := make(map[string]link.Link)
	for _, dir := range []string{"cilium/socketlb/links", "other/v1"} { // below Pins, and beside it
		for _, root := range []string{n.cfg.Pins, filepath.Dir(n.cfg.Pins)} {
			pin := filepath.Join(root, dir, "connect4")
			foreign[pin] = pinForeign(t, cgroup, pin)
		}
	}
	if err := n.r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{filepath.Dir(n.cfg.Pins), n.cfg.Pins} {
		if _, err := redirect.Cleanup(root, ""); err != nil {
			t.Errorf("clean up %s: %v", root, err)
		}
	}
	if _, err := os.Stat(filepath.Join(n.cfg.Pins, n.cfg.Node)); !os.IsNotExist(err) {
		t.Errorf("what is ours is still pinned: %v", err)
	}
	for pin, l := range foreign {
		if _, err := os.Stat(pin); err != nil {
			t.Errorf("a foreign pin is gone: %v", err)
		}
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Cgroup(); got == nil || got.CgroupId != want {
			t.Errorf("the foreign link of %s is not attached to its cgroup any more: %+v", pin, got)
		}
	}
}

// pinForeign attaches a program that is not ours to a cgroup and pins the link.
func pinForeign(t *testing.T, cgroup *netlab.Cgroup, pin string) link.Link {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup.Path(), Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.MkdirAll(filepath.Dir(pin), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Pin(pin); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestAnApplicationOnAnotherLoopbackAddressWithTheNumberOfOurOutboundPortIsNotHijacked(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	_, port, err := net.SplitHostPort(p.ns.Outbound[0].Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.2", port)
	app := p.app(nil, "NP_APP=listen", "NP_ADDR="+address)
	waitFor(t, app, "listening")
	for who, cgroup := range map[string]*netlab.Cgroup{"a stranger": nil, "the workload": p.cgroup} {
		if got := p.dialFrom(cgroup, "tcp4", address); !answered(got) {
			t.Errorf("%s at %s: %s", who, address, got)
		}
	}
}

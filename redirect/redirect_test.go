package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

func TestProbe(t *testing.T) {
	netlab.Require(t)
	for _, f := range redirect.Probe() {
		if f.Err != nil { // also what is optional: the kernels that are tested have all
			t.Errorf("%s: %+v", f.Name, f.Err)
		}
	}
}

func TestMeshDestinationsAreRedirectedWithTheirOrigin(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1", "10.9.200.1:8080", "fd77::1")
	for _, c := range []struct {
		name, network, addr, origin string
		env                         []string
	}{
		{"virtual IP, any port", "tcp4", "240.0.0.1:1234", "240.0.0.1:1234", nil},
		{"instance", "tcp4", "10.9.200.1:8080", "10.9.200.1:8080", nil},
		{"IPv6", "tcp6", "[fd77::1]:443", "[fd77::1]:443", nil},
		{"v4-mapped", "mapped", "240.0.0.1:80", "240.0.0.1:80", nil},
		{"multipath TCP", "tcp4", "240.0.0.1:99", "240.0.0.1:99", []string{"NP_MPTCP=1"}},
		{"bound source", "tcp4", "240.0.0.1:98", "240.0.0.1:98", []string{"NP_BIND=" + p.v4.String() + ":0"}},
		{"bound to lo", "tcp4", "240.0.0.1:97", "240.0.0.1:97", []string{"NP_DEVICE=lo"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := p.dial(c.network, c.addr, c.env...)
			want := fmt.Sprintf("%s for workload %d by redirect", c.origin, p.id)
			if !strings.Contains(got, want) {
				t.Errorf("got %s, want %s", got, want)
			}
			if c.name == "multipath TCP" {
				return // getpeername asks the multipath socket, which no hook of the kernel's sees
			}
			if !strings.Contains(got, "peer "+c.origin) {
				t.Errorf("getpeername: got %s, want %s", got, c.origin)
			}
		})
	}
}

func TestOtherDestinationsAreLeftAlone(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1", "10.9.200.1:8080")
	app := p.app(nil, "NP_APP=listen", "NP_ADDR=:7000")
	waitFor(t, app, "listening")
	if got := p.dial("tcp4", "127.0.0.1:7000"); !strings.Contains(got, `peer 127.0.0.1:7000 got "hello"`) {
		t.Errorf("loopback: %s", got)
	}
	if got := p.dial("tcp4", p.v4.String()+":7000"); !strings.Contains(got, `got "hello"`) {
		t.Errorf("own address: %s", got)
	}
}

func TestRefusalsOfTheConnectHook(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	refused := func(what, got string) {
		t.Helper()
		if !strings.Contains(got, "connection refused") {
			t.Errorf("%s: got %s, want a refusal", what, got)
		}
	}
	refused("virtual IP of no service", p.dial("tcp4", "240.0.0.2:80"))
	refused("bound to a device", p.dial("tcp4", "240.0.0.1:80", "NP_DEVICE=eth0"))
	n.rest(true)
	refused("daemon stopped", p.dial("tcp4", "240.0.0.1:80"))
	n.rest(false)
	if got := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(got, "240.0.0.1:80 for workload") {
		t.Errorf("daemon back: %s", got)
	}
	if err := p.ns.Close(); err != nil {
		t.Fatal(err)
	}
	refused("no listener in the namespace", p.dial("tcp4", "240.0.0.1:80"))
}

func TestStrictPortsAdmitOnlyWhatIsAnnounced(t *testing.T) {
	n := newNode(t)
	server, stranger := n.pod(), n.pod()
	app := server.app(server.cgroup, "NP_APP=listen", "NP_ADDR=:8080")
	waitFor(t, app, "listening")
	rule := redirect.Rule{Namespace: server.ns.Cookie, Action: redirect.Strict, Workload: server.id}
	if err := n.r.SetRules([]redirect.Rule{rule}); err != nil {
		t.Fatal(err)
	}
	outsider := server.dialFrom(nil, "tcp4", server.v4.String()+":8080")
	if !strings.Contains(outsider, "connection refused") {
		t.Errorf("a stranger at the strict port: %s", outsider)
	}
	if got := server.dial("tcp4", server.v4.String()+":8080"); !strings.Contains(got, `got "hello"`) {
		t.Errorf("the workload at its own address: %s", got)
	}
	if got := server.dialFrom(nil, "tcp4", "127.0.0.1:8080"); !strings.Contains(got, `got "hello"`) {
		t.Errorf("loopback of a private namespace: %s", got)
	}
	for _, target := range []netip.Addr{server.v4, server.v6} {
		client := netip.AddrPortFrom(stranger.v4, 4444)
		if target.Is6() {
			client = netip.AddrPortFrom(stranger.v6, 4444)
		}
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		c, err := server.ns.Dial(ctx, netip.Addr{}, netip.AddrPortFrom(target, 8080), redirect.Announcement{Kind: redirect.Delivery, Workload: server.id, Client: client})
		if err != nil {
			t.Fatalf("delivery: %v", err)
		}
		io.ReadAll(c)
		c.Close()
		waitFor(t, app, "accepted "+client.String())
	}
	rule.Action = redirect.Permissive
	if err := n.r.SetRules([]redirect.Rule{rule}); err != nil {
		t.Fatal(err)
	}
	if got := server.dialFrom(nil, "tcp4", server.v4.String()+":8080"); !strings.Contains(got, `got "hello"`) {
		t.Errorf("a stranger at the permissive port: %s", got)
	}
	rule.Action = redirect.Strict
	if err := errors.Join(n.r.SetRules([]redirect.Rule{rule}), n.r.SetPlaintextFrom([]netip.Prefix{netip.PrefixFrom(server.v4, 24)})); err != nil {
		t.Fatal(err)
	}
	if got := server.dialFrom(nil, "tcp4", server.v4.String()+":8080"); !strings.Contains(got, `got "hello"`) {
		t.Errorf("a network that may speak plaintext: %s", got)
	}
	if got := server.dialFrom(nil, "tcp6", "["+server.v6.String()+"]:8080"); !strings.Contains(got, "connection refused") {
		t.Errorf("a network that may not: %s", got)
	}
	counts, err := n.r.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if counts["plaintext_refused"] != 2 || counts["plaintext_allowed"] != 2 {
		t.Errorf("counted %v", counts)
	}
	n.drained()
}

func TestAMeshPortIsSteeredToTheInboundListener(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	if err := n.r.SetRules([]redirect.Rule{
		{Namespace: p.ns.Cookie, Addr: p.v4, Port: 21500, Action: redirect.Steer, Workload: p.id},
		{Namespace: p.ns.Cookie, Addr: p.v6, Port: 21500, Action: redirect.Steer, Workload: p.id},
		{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id},
	}); err != nil {
		t.Fatal(err)
	}
	for _, ln := range p.ns.Inbound {
		go func() {
			for {
				c, err := ln.AcceptTCP()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "to %s", c.LocalAddr())
				c.Close()
			}
		}()
	}
	for _, ip := range []netip.Addr{p.v4, p.v6} {
		at := netip.AddrPortFrom(ip, 21500).String()
		if got := p.dialFrom(nil, "tcp", at); !strings.Contains(got, fmt.Sprintf("got %q", "to "+at)) {
			t.Errorf("steered: %s", got)
		}
	}
	for _, ln := range p.ns.Inbound {
		ln.Close()
	}
	if got := p.dialFrom(nil, "tcp", netip.AddrPortFrom(p.v4, 21500).String()); !strings.Contains(got, "connection refused") {
		t.Errorf("no listener: %s", got)
	}
}

func TestASquatterOnTheOutboundPortGetsNothing(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.destinations("240.0.0.1")
	ports := map[string]string{}
	for _, ln := range p.ns.Outbound {
		host, port, _ := net.SplitHostPort(ln.Addr().String())
		ports[host] = port
		ln.Close()
	}
	squatter := p.app(nil, "NP_APP=listen", "NP_ADDR=:"+ports["127.0.0.1"])
	waitFor(t, squatter, "listening")
	if got := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(got, "connection refused") {
		t.Errorf("redirected: %s", got)
	}
	if got := p.dialFrom(nil, "tcp4", "127.0.0.1:"+ports["127.0.0.1"]); !strings.Contains(got, "connection refused") {
		t.Errorf("dialled directly: %s", got)
	}
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("squatter: %s", squatter.Output())
	}
}

func TestNestedWorkloads(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	child, err := p.cgroup.Child("inner")
	if err != nil {
		t.Fatal(err)
	}
	outerID, err := redirect.CgroupID(p.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	if got := p.dialFrom(child, "tcp4", "240.0.0.1:80"); !strings.Contains(got, fmt.Sprintf("for workload %d", p.id)) {
		t.Fatalf("below an enrolled cgroup: %s", got)
	}
	inner, err := n.r.NewWorkload(2)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.r.SetNesting(outerID, redirect.Nesting{Inner: true}); err != nil {
		t.Fatal(err)
	}
	if err := n.r.Enroll(child.Path(), inner, redirect.Nesting{Outer: true}); err != nil {
		t.Fatal(err)
	}
	if got := p.dialFrom(child, "tcp4", "240.0.0.1:80"); !strings.Contains(got, fmt.Sprintf("for workload %d", inner)) {
		t.Errorf("inner workload: %s", got)
	}
	if got := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(got, fmt.Sprintf("for workload %d", p.id)) {
		t.Errorf("outer workload: %s", got)
	}
	childID, err := redirect.CgroupID(child.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.r.Unenroll(childID); err != nil {
		t.Fatal(err)
	}
	if got := p.dialFrom(child, "tcp4", "240.0.0.1:80"); !strings.Contains(got, fmt.Sprintf("for workload %d", p.id)) {
		t.Errorf("inner workload un-enrolled: %s", got)
	}
}

func TestPinsOutliveTheDaemonAndAreTakenOver(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.destinations("240.0.0.1")
	if _, err := redirect.Open(n.cfg); !errors.Is(err, redirect.ErrInUse) {
		t.Errorf("second daemon: %v", err)
	}
	if _, err := redirect.Cleanup(n.cfg.Pins, n.cfg.Node); !errors.Is(err, redirect.ErrInUse) {
		t.Errorf("cleanup under a running daemon: %v", err)
	}
	if err := n.r.Close(); err != nil {
		t.Fatal(err)
	}
	if got := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(got, "connection refused") {
		t.Errorf("no daemon: %s", got)
	}
	n.open()
	if list := n.r.Enrolled(); len(list) != 1 || list[0].Workload != p.id {
		t.Fatalf("taken over: %+v", list)
	}
	p.listen()
	p.serve()
	if got := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(got, fmt.Sprintf("240.0.0.1:80 for workload %d", p.id)) {
		t.Errorf("after the take-over: %s", got)
	}
	if id, err := n.r.NewWorkload(1); err != nil || id <= p.id {
		t.Errorf("workload id %d, %v: want one above %d", id, err, p.id)
	}
}

func TestPruneRemovesWhatNobodyClaims(t *testing.T) {
	n := newNode(t)
	gone, kept := n.pod(), n.pod()
	keptID, err := redirect.CgroupID(kept.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.r.Close(); err != nil {
		t.Fatal(err)
	}
	n.open()
	kept.listen()
	if err := n.r.Prune(func(id uint64) bool { return id == keptID }); err != nil {
		t.Fatal(err)
	}
	if got := gone.dial("tcp4", "127.0.0.1:1"); !strings.Contains(got, "refused") {
		t.Errorf("pruned workload: %s", got)
	}
	pins, _ := os.ReadDir(filepath.Join(n.cfg.Pins, n.cfg.Node, fmt.Sprintf("v%d", redirect.MapABI), "namespaces"))
	if len(pins) != 1 || len(n.r.Enrolled()) != 1 {
		t.Errorf("namespaces pinned: %v, enrolled: %v; want one of each", pins, n.r.Enrolled())
	}
}

func TestCleanupLeavesNothing(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.destinations("240.0.0.1")
	if err := n.r.Close(); err != nil {
		t.Fatal(err)
	}
	removed, err := redirect.Cleanup(n.cfg.Pins, n.cfg.Node)
	if err != nil {
		t.Fatal(err)
	}
	if len(removed) == 0 {
		t.Error("cleanup says it removed nothing")
	}
	if _, err := os.Stat(filepath.Join(n.cfg.Pins, n.cfg.Node)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still pinned: %v", err)
	}
	app := p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7000")
	waitFor(t, app, "listening")
	if got := p.dial("tcp4", p.v4.String()+":7000"); !strings.Contains(got, "hello") {
		t.Errorf("after cleanup: %s", got)
	}
	if again, err := redirect.Cleanup(n.cfg.Pins, n.cfg.Node); err != nil || len(again) > 0 {
		t.Errorf("second cleanup: %v, %v", again, err)
	}
}

func TestEnrollOfACgroupThatIsNoneChangesNothing(t *testing.T) {
	n := newNode(t)
	if err := n.r.Enroll(t.TempDir(), 77, redirect.Nesting{}); err == nil || !strings.Contains(err.Error(), "not on cgroup2") {
		t.Errorf("got %v", err)
	}
	if err := n.r.Enroll(filepath.Join(n.lab.Cgroup().Path(), "absent"), 78, redirect.Nesting{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	fills, err := n.r.Fills()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fills {
		if f.Name == "workloads" && f.Entries != 0 {
			t.Errorf("workloads left: %+v", f)
		}
	}
}

func TestListenersAndAcceptedSocketsNameTheirCgroup(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	app := p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=0.0.0.0:9000")
	waitFor(t, app, "listening")
	want, err := redirect.CgroupID(p.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	found, err := p.ns.Listeners(9000)
	if err != nil || len(found) != 1 || found[0].Cgroup != want || !found[0].Local.Addr().IsUnspecified() {
		t.Fatalf("listeners: %+v, %v; want one of cgroup %d", found, err, want)
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	server := netip.MustParseAddrPort("127.0.0.1:9000")
	c, err := p.ns.Dial(ctx, netip.Addr{}, server, redirect.Announcement{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.ReadAll(c)
	s, err := p.ns.Accepted(netip.MustParseAddrPort(c.LocalAddr().String()), server)
	if err != nil || s.Listening {
		t.Fatalf("accepted: %+v, %v", s, err)
	}
	if _, err := p.ns.Accepted(netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a connection that is not there: %v", err)
	}
}

func TestASecondTryDoesNotLeaveTheNamespace(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	outside, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	at := outside.Addr().(*net.TCPAddr).AddrPort()
	// The only port that the namespace gives away is the one that is dialled: the socket meets itself, and package net tries again.
	if err := p.netns.Sysctl("net/ipv4/ip_local_port_range", fmt.Sprintf("%d %d", at.Port(), at.Port())); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	c, err := p.ns.Dial(ctx, netip.Addr{}, at, redirect.Announcement{})
	if c != nil {
		c.Close()
	}
	if !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("dialled %s, at which nobody in the namespace listens: %v, %v", at, c, err)
	}
}

func TestReapRemovesWhatNoConnectionWill(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	const made = time.Hour
	if err := n.r.LeaveBehind(p.id, made); err != nil {
		t.Fatal(err)
	}
	if err := n.r.ReapAt(made + redirect.HandshakeTime); err != nil {
		t.Fatal(err)
	}
	if left, err := n.r.Account(p.id); err != nil || left != 1 {
		t.Errorf("the account of a workload whose handshake may still go on: %d, %v", left, err)
	}
	if err := n.r.ReapAt(made + redirect.HandshakeTime + time.Second); err != nil {
		t.Fatal(err)
	}
	n.drained()
	if left, err := n.r.Account(p.id); err != nil || left != 0 {
		t.Errorf("the workload's account: %d, %v", left, err)
	}
}

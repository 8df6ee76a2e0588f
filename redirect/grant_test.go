package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// appHold connects to NP_ADDR, says so, and reads until the end, which it prints.
func appHold() {
	var d net.Dialer
	d.SetMultipathTCP(false)
	d.Control = func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}
	if bind := os.Getenv("NP_BIND"); bind != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(bind))
	}
	fmt.Println("dialling")
	c, err := d.Dial("tcp", os.Getenv("NP_ADDR"))
	if err != nil {
		fmt.Println("error", err)
		return
	}
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM)
	fmt.Println("connected", c.LocalAddr())
	go func() {
		<-terminate
		if os.Getenv("NP_RESET") != "" {
			c.(*net.TCPConn).SetLinger(0)
		}
		c.Close()
	}()
	_, err = io.Copy(io.Discard, c)
	fmt.Println("end", err)
}

// appReuse connects one socket to each address of NP_ADDR in turn, sends with the SYN where an address ends in "+", and
// prints what it was told.
func appReuse() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	for _, text := range strings.Fields(os.Getenv("NP_ADDR")) {
		addr, fast := strings.CutSuffix(text, "+")
		to := netip.MustParseAddrPort(addr)
		sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
		if fast {
			err = errors.Join(err, unix.Sendto(fd, []byte("early"), unix.MSG_FASTOPEN, sa))
		} else {
			err = errors.Join(err, unix.Connect(fd, sa))
		}
		buf := make([]byte, 500)
		n, errRead := unix.Read(fd, buf)
		var disconnect unix.RawSockaddr // AF_UNSPEC
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafePointer(&disconnect)), unix.SizeofSockaddrInet4)
		fmt.Printf("%s: %q %v %v\n", addr, buf[:max(n, 0)], errors.Join(err, errRead), errno)
		err = nil
	}
}

// appBacklog listens on NP_ADDR with room for one connection, accepts nothing until it gets SIGUSR1, and greets who
// says something.
func appBacklog() {
	at := netip.MustParseAddrPort(os.Getenv("NP_ADDR"))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	err = errors.Join(err, unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}), unix.Listen(fd, 1))
	if err != nil {
		fmt.Println("error", err)
		return
	}
	begin := make(chan os.Signal, 1)
	signal.Notify(begin, unix.SIGUSR1)
	fmt.Println("listening")
	<-begin
	for {
		c, from, err := unix.Accept(fd)
		if err != nil {
			continue
		}
		fmt.Println("accepted", from.(*unix.SockaddrInet4).Port)
		go func() {
			if n, _ := unix.Read(c, make([]byte, 100)); n > 0 {
				unix.Write(c, []byte("hello"))
			}
			unix.Close(c)
		}()
	}
}

// routed lets the pods reach one another.
func (n *node) routed(pods ...*pod) {
	n.t.Helper()
	if err := n.hub.Forward(); err != nil {
		n.t.Fatal(err)
	}
	for _, p := range pods {
		a4, a6 := p.v4.As4(), p.v6.As16()
		gateway4 := netip.AddrFrom4([4]byte{a4[0], a4[1], a4[2], 1})
		a6[15] = 1
		gateway6 := netip.AddrFrom16(a6)
		link := fmt.Sprintf("pod%d", a4[2])
		if err := errors.Join(
			n.hub.Address(link, netip.PrefixFrom(gateway4, 24)), n.hub.Address(link, netip.PrefixFrom(gateway6, 64)),
			p.netns.Route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway4),
			p.netns.Route(netip.PrefixFrom(netip.IPv6Unspecified(), 0), gateway6),
		); err != nil {
			n.t.Fatal(err)
		}
	}
}

const (
	virtual4    = "240.0.0.1"
	virtual6    = "fd77::1"
	virtualKept = "240.0.0.5" // of an application that accepts nothing before it is told to: port 8081
)

// granting is a client's pod and a server's, whose port 8080 is strict and granted to the client by two virtual IPs and
// its own addresses.
type granting struct {
	*node
	client, server *pod
	app, keeper    *netlab.Process

	mu     sync.Mutex
	events []redirect.GrantEvent
}

func newGranting(t *testing.T) *granting {
	t.Helper()
	n := newNode(t)
	g := &granting{node: n, client: n.pod(), server: n.pod()}
	n.routed(g.client, g.server)
	g.client.serve()
	g.strict(g.server)
	g.app = g.server.app(g.server.cgroup, "NP_APP=listen", "NP_ADDR=:8080")
	waitFor(t, g.app, "listening")
	g.keeper = g.server.app(g.server.cgroup, "NP_APP=backlog", "NP_ADDR="+g.server.v4.String()+":8081")
	waitFor(t, g.keeper, "listening")
	n.destinations(virtual4, virtual6, virtualKept, g.at4(), g.at6(), netip.AddrPortFrom(g.server.v4, 8081).String())
	g.grant(time.Now().Add(time.Hour))
	g.watch()
	return g
}

func (g *granting) at4() string { return netip.AddrPortFrom(g.server.v4, 8080).String() }
func (g *granting) at6() string { return netip.AddrPortFrom(g.server.v6, 8080).String() }

func (g *granting) strict(pods ...*pod) {
	g.t.Helper()
	var rules []redirect.Rule
	for _, p := range pods {
		rules = append(rules, redirect.Rule{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id, Group: 1})
	}
	g.rules(rules...)
}

func (g *granting) grant(until time.Time) {
	g.t.Helper()
	if err := g.r.SetGrants(g.grants(g.client, g.server, until)); err != nil {
		g.t.Fatal(err)
	}
}

// grants are what lets from reach to's port 8080.
func (n *node) grants(from, to *pod, until time.Time) (all []redirect.Grant) {
	n.t.Helper()
	closes, err := to.ns.Closes()
	if err != nil {
		n.t.Fatal(err)
	}
	for virtual, ip := range map[string]netip.Addr{virtual4: to.v4, virtual6: to.v6, virtualKept: to.v4} {
		at := netip.AddrPortFrom(ip, 8080)
		if virtual == virtualKept {
			at = netip.AddrPortFrom(ip, 8081)
		}
		source, err := from.ns.Probe(from.id, to.ns.Cookie, at)
		if err != nil {
			n.t.Fatalf("probe: %v", err)
		}
		for _, dialled := range []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(virtual), 0), at} {
			all = append(all, redirect.Grant{Workload: from.id, Namespace: from.ns.Cookie, Dialled: dialled, NotAfter: until,
				Targets: []redirect.Target{{Namespace: to.ns.Cookie, Address: at, Source: source, Closes: closes, Group: 1}}})
		}
	}
	return all
}

// watch collects what the kernel says of grants until the end of the test.
func (g *granting) watch() {
	var reading sync.WaitGroup
	r := g.r
	reading.Go(func() {
		_ = r.Events(func(redirect.Event) {}, func(e redirect.GrantEvent) {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.events = append(g.events, e)
		})
	})
	g.t.Cleanup(func() {
		r.Stop()
		reading.Wait()
	})
}

// event waits for one of a connection that was dialled at an address.
func (g *granting) event(stage redirect.GrantStage, dialled string) redirect.GrantEvent {
	g.t.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		g.mu.Lock()
		for i, e := range g.events {
			if e.Stage == stage && e.Dialled.String() == dialled {
				g.events = append(g.events[:i], g.events[i+1:]...)
				g.mu.Unlock()
				return e
			}
		}
		g.mu.Unlock()
		if time.Now().After(end) {
			g.t.Fatalf("no event %d of a connection to %s; there are %+v", stage, dialled, g.events)
		}
	}
}

// hold starts a client that keeps its connection.
func (p *pod) hold(cgroup *netlab.Cgroup, addr, says string, env ...string) *netlab.Process {
	p.n.t.Helper()
	proc := p.app(cgroup, append(env, "NP_APP=hold", "NP_ADDR="+addr)...)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := proc.WaitOutput(ctx, says); err != nil {
		p.n.t.Fatalf("waiting for %q: %v\n%s", says, err, proc.Output())
	}
	return proc
}

func (g *granting) finish(p *netlab.Process, how syscall.Signal) string {
	g.t.Helper()
	if err := p.Signal(how); err != nil {
		g.t.Fatal(err)
	}
	return g.ended(p)
}

func (g *granting) ended(p *netlab.Process) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	_ = p.Wait(ctx) // killed ones end badly
	return p.Output()
}

func TestAGrantedConnectionGoesStraightToTheInstance(t *testing.T) {
	g := newGranting(t)
	for _, c := range []struct {
		name, network, dialled string
		env                    []string
		mapped, proxied        bool
	}{
		{name: "virtual IP", network: "tcp4", dialled: virtual4 + ":1234"},
		{name: "the instance's own address", network: "tcp4", dialled: g.at4()},
		{name: "IPv6", network: "tcp6", dialled: "[" + virtual6 + "]:443"},
		{name: "the instance's own IPv6 address", network: "tcp6", dialled: g.at6()},
		{name: "v4-mapped", network: "mapped", dialled: virtual4 + ":80"},
		{name: "bound to a source port", network: "tcp4", dialled: virtual4 + ":81", env: []string{"NP_BIND=0.0.0.0:7101"}},
		{name: "bound to its address", network: "tcp4", dialled: virtual4 + ":82", env: []string{"NP_BIND=" + g.client.v4.String() + ":7102"}},
		{name: "bound to its device", network: "tcp4", dialled: virtual4 + ":83", env: []string{"NP_DEVICE=eth0"}},
		{name: "bound to loopback", network: "tcp4", dialled: virtual4 + ":84", env: []string{"NP_BIND=127.0.0.1:7103"}, proxied: true},
		{name: "bound to lo", network: "tcp4", dialled: virtual4 + ":85", env: []string{"NP_DEVICE=lo"}, proxied: true},
		{name: "multipath TCP", network: "tcp4", dialled: virtual4 + ":86", env: []string{"NP_MPTCP=1"}, proxied: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := g.client.dial(c.network, c.dialled, c.env...)
			if c.proxied {
				if want := fmt.Sprintf("%s for workload %d", c.dialled, g.client.id); !strings.Contains(got, want) {
					t.Errorf("it does not pass the proxy: %s", got)
				}
				return
			}
			if !answered(got) || !strings.Contains(got, "peer "+c.dialled) {
				t.Fatalf("got %s, and want a greeting of %s", got, c.dialled)
			}
			opened, closed := g.event(redirect.GrantOpened, c.dialled), g.event(redirect.GrantClosed, c.dialled)
			if opened.Cookie != closed.Cookie || opened.Workload != g.client.id || opened.Comm != "redirect.test" || opened.Opened.IsZero() {
				t.Errorf("opened %+v, closed %+v", opened, closed)
			}
			if closed.Sent != 0 || closed.Received != uint64(len("hello")) {
				t.Errorf("%d bytes sent and %d received, of 0 and %d", closed.Sent, closed.Received, len("hello"))
			}
			waitFor(t, g.app, "accepted "+opened.Client.String())
		})
	}
	g.settled(g.client.id, g.server.id)
}

func TestAGrantIsOfNoUseToAnybodyElse(t *testing.T) {
	g := newGranting(t)
	other := g.pod()
	g.routed(other)
	other.serve()
	held := g.client.hold(g.client.cgroup, virtualKept+":80", "connected", "NP_BIND="+g.client.v4.String()+":7200")
	kept := netip.AddrPortFrom(g.server.v4, 8081).String()
	for _, c := range []struct {
		who    string
		pod    *pod
		cgroup *netlab.Cgroup
		env    []string
	}{
		{"a process of no workload in the client's namespace", g.client, nil, nil},
		{"one with the source port of a granted connection", g.client, nil, []string{"NP_BIND=" + g.client.v4.String() + ":7200"}},
		{"one with the source port on every address", g.client, nil, []string{"NP_BIND=0.0.0.0:7200"}},
		{"a process of no workload in another namespace", other, nil, nil},
		{"a process of no workload in the server's namespace", g.server, nil, nil},
	} {
		for _, to := range []string{g.at4(), kept, g.at6()} {
			got := c.pod.dialFrom(c.cgroup, "tcp", to, c.env...)
			if answered(got) || !strings.Contains(got, "error") {
				t.Errorf("%s at %s: %s", c.who, to, got)
			}
		}
	}
	if got := other.dial("tcp", g.at4()); answered(got) {
		t.Errorf("another workload: %s", got)
	}
	elsewhere := other.dialFrom(g.client.cgroup, "tcp", virtual4+":80")
	if !strings.Contains(elsewhere, fmt.Sprintf("for workload %d", g.client.id)) {
		t.Errorf("the same workload in another of its namespaces: %s", elsewhere)
	}
	inner, id := g.client.nest(2)
	if got := g.client.dialFrom(inner, "tcp", virtual4+":80"); !strings.Contains(got, fmt.Sprintf("for workload %d", id)) {
		t.Errorf("a nested workload without a grant of its own: %s", got)
	}
	g.finish(held, unix.SIGTERM)
	g.settled(g.client.id, g.server.id)
}

func TestA4TupleReusedStraightAfterCloseIsRefused(t *testing.T) {
	g := newGranting(t)
	bind := "NP_BIND=" + g.client.v4.String() + ":7300"
	kept := netip.AddrPortFrom(g.server.v4, 8081).String()
	if err := g.keeper.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, to := range []string{virtualKept + ":80", kept} {
			held := g.client.hold(g.client.cgroup, to, "connected", bind, "NP_RESET=1") // which leaves no TIME_WAIT
			g.finish(held, unix.SIGTERM)
			if got := g.client.dialFrom(nil, "tcp4", kept, bind); !refused(got) {
				t.Errorf("a stranger after a connection to %s: %s", to, got)
			}
		}
	}
	g.settled(g.client.id, g.server.id)
}

func TestGrantsInNamespacesOfEqualAddressesAndPortsDoNotMeet(t *testing.T) {
	n := newNode(t)
	var pairs [2]struct{ client, server *pod }
	for i := range pairs {
		n.pods = 50
		pairs[i].client = n.twin(i, 0, nil)
		pairs[i].server = n.twin(i, 1, pairs[i].client)
	}
	g := &granting{node: n}
	g.strict(pairs[0].server, pairs[1].server)
	n.destinations(virtual4)
	var grants []redirect.Grant
	for _, p := range pairs {
		p.client.serve()
		waitFor(t, p.server.app(p.server.cgroup, "NP_APP=backlog", "NP_ADDR="+p.server.v4.String()+":8080"), "listening")
	}
	grants = append(grants, n.grants4(pairs[0].client, pairs[0].server)...)
	if err := n.r.SetGrants(grants); err != nil {
		t.Fatal(err)
	}
	bind := "NP_BIND=" + pairs[0].client.v4.String() + ":7400"
	held := pairs[0].client.hold(pairs[0].client.cgroup, virtual4+":80", "connected", bind)
	if got := pairs[1].client.dial("tcp4", virtual4+":80", bind); !strings.Contains(got, "error") && !strings.Contains(got, "for workload") {
		t.Errorf("the workload of the other pair: %s", got)
	}
	if got := pairs[1].client.dialFrom(nil, "tcp4", pairs[1].server.v4.String()+":8080", bind); !refused(got) {
		t.Errorf("a stranger of the other pair, with the same 4-tuple: %s", got)
	}
	if err := n.r.SetGrants(append(grants, n.grants4(pairs[1].client, pairs[1].server)...)); err != nil {
		t.Fatal(err)
	}
	both := pairs[1].client.hold(pairs[1].client.cgroup, virtual4+":80", "connected", bind)
	all, err := n.r.Granted()
	if err != nil || len(all) != 2 || all[0].Client != all[1].Client || all[0].Destination != all[1].Destination || all[0].From == all[1].From {
		t.Errorf("two granted connections of one 4-tuple are listed as %+v, %v", all, err)
	}
	for _, c := range all {
		if c.From == pairs[0].client.ns.Cookie {
			if err := n.r.Destroy(c); err != nil {
				t.Error(err)
			}
		}
	}
	if out := g.ended(held); !strings.Contains(out, "connection abort") {
		t.Errorf("the one that was reset: %s", out)
	}
	select {
	case <-both.Done():
		t.Errorf("the other one has ended too: %s", both.Output())
	default:
	}
	g.finish(both, unix.SIGKILL)
	n.settled(pairs[0].client.id, pairs[1].client.id)
}

// twin makes a pod whose addresses are those of its twin in the other pair, on a link of the pair's own.
func (n *node) twin(pair, side int, peer *pod) *pod {
	n.t.Helper()
	p := &pod{n: n, v4: netip.AddrFrom4([4]byte{10, 9, 200, byte(1 + side)})}
	var err error
	if p.netns, err = n.lab.Namespace(); err != nil {
		n.t.Fatal(err)
	}
	if peer != nil {
		if err := errors.Join(netlab.Join(peer.netns, "eth0", p.netns, "eth0"),
			peer.netns.Address("eth0", netip.PrefixFrom(peer.v4, 24)), p.netns.Address("eth0", netip.PrefixFrom(p.v4, 24)),
			peer.netns.Up("eth0"), p.netns.Up("eth0")); err != nil {
			n.t.Fatal(err)
		}
	}
	if p.cgroup, err = n.lab.Cgroup().Child(fmt.Sprintf("twin%d-%d", pair, side)); err != nil {
		n.t.Fatal(err)
	}
	p.listen()
	p.enroll(redirect.Nesting{})
	return p
}

func (n *node) grants4(from, to *pod) []redirect.Grant {
	n.t.Helper()
	closes, errCloses := to.ns.Closes()
	at := netip.AddrPortFrom(to.v4, 8080)
	source, err := from.ns.Probe(from.id, to.ns.Cookie, at)
	if err := errors.Join(err, errCloses); err != nil {
		n.t.Fatal(err)
	}
	return []redirect.Grant{{Workload: from.id, Namespace: from.ns.Cookie, Dialled: netip.AddrPortFrom(netip.MustParseAddr(virtual4), 0),
		NotAfter: time.Now().Add(time.Hour), Targets: []redirect.Target{{Namespace: to.ns.Cookie, Address: at, Source: source, Closes: closes, Group: 1}}}}
}

func TestGrantedConnectionsWithSYNCookies(t *testing.T) {
	g := newGranting(t)
	if err := g.server.netns.Sysctl("net/ipv4/tcp_syncookies", "2"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, to := range []string{virtual4 + ":80", "[" + virtual6 + "]:80", g.at4()} {
			if got := g.client.dial("tcp", to); !answered(got) {
				t.Errorf("granted, to %s: %s", to, got)
			}
		}
		if got := g.client.dialFrom(nil, "tcp4", g.at4()); !refused(got) {
			t.Errorf("a stranger: %s", got)
		}
	}
	g.settled(g.client.id, g.server.id)
}

func TestGrantedConnectionsThatOverflowTheAcceptQueueFailNeitherWayRound(t *testing.T) {
	g := newGranting(t)
	const clients = 6
	var dialling []*netlab.Process
	for range clients {
		dialling = append(dialling, g.client.app(g.client.cgroup, "NP_APP=dial", "NP_NETWORK=tcp4", "NP_ADDR="+virtualKept+":80", "NP_SAY=please"))
	}
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		all, err := g.r.Granted()
		if err == nil && len(all) == clients {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("connections under way: %+v, %v", all, err)
		}
	}
	if got := g.client.dialFrom(nil, "tcp4", g.server.v4.String()+":8081", "NP_SAY=please"); !refused(got) {
		t.Errorf("a stranger while the queue is full: %s", got)
	}
	if err := g.keeper.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for _, p := range dialling {
		if out := g.ended(p); !answered(out) {
			t.Errorf("a client that had to wait: %s", out)
		}
	}
	g.settled(g.client.id, g.server.id)
}

func TestGrantsRestWhileNoDaemonBeats(t *testing.T) {
	g := newGranting(t)
	held := g.client.hold(g.client.cgroup, virtualKept+":80", "connected")
	g.rest(true)
	for _, to := range []string{virtual4 + ":80", "[" + virtual6 + "]:80", g.at4()} {
		if got := g.client.dial("tcp", to); !refused(got) {
			t.Errorf("to %s without a daemon: %s", to, got)
		}
	}
	g.rest(false)
	if got := g.client.dial("tcp4", virtual4+":80"); !answered(got) {
		t.Errorf("with the daemon back: %s", got)
	}
	g.finish(held, unix.SIGTERM)
	g.settled(g.client.id, g.server.id)
}

func TestAGrantWhoseCertificateHasEndedLeadsToTheProxy(t *testing.T) {
	g := newGranting(t)
	g.grant(time.Now().Add(-time.Second))
	if got := g.client.dial("tcp4", virtual4+":80"); !strings.Contains(got, "for workload") {
		t.Errorf("got %s", got)
	}
	g.grant(time.Now().Add(time.Minute))
	if got := g.client.dial("tcp4", virtual4+":80"); !answered(got) {
		t.Errorf("with a new certificate: %s", got)
	}
}

func TestARevokedGrantIsCutInEveryState(t *testing.T) {
	g := newGranting(t)
	var held []*netlab.Process
	for range 6 { // the queue of accepted ones has room for two: others wait for an answer to their SYN
		held = append(held, g.client.hold(g.client.cgroup, virtualKept+":80", "dialling"))
	}
	g.awaitGranted(len(held))
	if err := g.r.SetGrants(nil); err != nil {
		t.Fatal(err)
	}
	all, err := g.r.Granted()
	if err != nil {
		t.Fatal(err)
	}
	unopened := 0
	for _, c := range all {
		if c.Opened.IsZero() {
			unopened++
		}
		if err := g.r.Destroy(c); err != nil {
			t.Errorf("destroy %+v: %v", c, err)
		}
	}
	if unopened == 0 {
		t.Error("none of the connections was under way")
	}
	if left, err := g.r.Granted(); err != nil || len(left) > 0 {
		t.Errorf("a second pass finds %+v, %v", left, err)
	}
	for _, p := range held {
		// One whose SYN is sent again between the two steps is refused by the first.
		if out := g.ended(p); !strings.Contains(out, "connection abort") && !strings.Contains(out, "connection refused") {
			t.Errorf("a client of a revoked grant: %s", out)
		}
	}
}

func TestASYNThatArrivesAfterItsGrantHasEndedIsRefused(t *testing.T) {
	g := newGranting(t)
	var held []*netlab.Process
	for range 6 { // some of their SYNs find the queue full, and are sent again a second later
		held = append(held, g.client.hold(g.client.cgroup, virtualKept+":80", "dialling"))
	}
	g.awaitGranted(len(held))
	if err := g.r.SetGrants(nil); err != nil {
		t.Fatal(err)
	}
	if err := g.keeper.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if e := g.event(redirect.GrantFailed, virtualKept+":80"); !e.Refused || e.Admitted {
		t.Errorf("it failed as %+v", e)
	}
	for _, p := range held {
		p.Kill()
		g.ended(p)
	}
	g.settled(g.client.id, g.server.id)
}

func (g *granting) awaitGranted(n int) {
	g.t.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		all, err := g.r.Granted()
		if err == nil && len(all) == n {
			return
		}
		if time.Now().After(end) {
			g.t.Fatalf("connections on grants: %+v, %v; want %d", all, err, n)
		}
	}
}

func TestAfterItsApplicationStopsAPortIsGrantedToNobodyWhoTakesIt(t *testing.T) {
	g := newGranting(t)
	if got := g.client.dial("tcp4", virtual4+":80"); !answered(got) {
		t.Fatalf("before: %s", got)
	}
	g.finish(g.app, unix.SIGKILL)
	squatter := g.server.app(nil, "NP_APP=listen", "NP_ADDR=:8080")
	waitFor(t, squatter, "listening")
	if got := g.client.dial("tcp4", virtual4+":80"); !strings.Contains(got, "for workload") {
		t.Errorf("to a port that a stranger has taken: %s", got)
	}
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("the stranger: %s", squatter.Output())
	}
}

func TestWhatAnotherWorkloadAcceptsCarriesNothing(t *testing.T) {
	g := newGranting(t)
	inner, _ := g.server.nest(2)
	other := g.server.app(inner, "NP_APP=backlog", "NP_ADDR="+g.server.v4.String()+":8099")
	waitFor(t, other, "listening")
	g.leadTo(8099)
	client := g.tells(other)
	e := g.event(redirect.GrantImpostor, virtual4+":80")
	if live, err := g.r.Granted(); err != nil || len(live) != 1 || !live[0].Muzzled || !e.Muzzled {
		t.Errorf("it is listed as %+v, %v, and told as %+v; want it muzzled", live, err, e)
	}
	if err := g.r.Destroy(e.Granted); err != nil {
		t.Error(err)
	}
	if out := g.ended(client); answered(out) { // whether it reads an error or the end depends on whether it wrote before
		t.Errorf("the client: %s", out)
	}
	if failed := g.event(redirect.GrantFailed, virtual4+":80"); !failed.Impostor {
		t.Errorf("it failed as %+v", failed)
	}
	if strings.Contains(other.Output(), "accepted") {
		t.Errorf("the other workload has the connection: %s", other.Output())
	}
	g.settled(g.client.id, g.server.id)
}

func TestWhatAStrangerAcceptsIsTold(t *testing.T) {
	g := newGranting(t)
	stranger := g.server.app(nil, "NP_APP=backlog", "NP_ADDR="+g.server.v4.String()+":8099")
	waitFor(t, stranger, "listening")
	g.leadTo(8099)
	client := g.client.hold(g.client.cgroup, virtual4+":80", "connected")
	e := g.event(redirect.GrantOpened, virtual4+":80")
	if !e.Impostor {
		t.Errorf("a stranger's connection is opened as %+v", e)
	}
	if live, err := g.r.Granted(); err != nil || len(live) != 1 || live[0].Accepted || live[0].Muzzled {
		t.Errorf("it is listed as %+v, %v; want it accepted by no workload", live, err)
	}
	if err := g.r.Destroy(e.Granted); err != nil {
		t.Error(err)
	}
	g.ended(client)
	if got := g.client.dial("tcp4", g.at4()); !answered(got) {
		t.Fatal(got)
	}
	if e := g.event(redirect.GrantOpened, g.at4()); e.Impostor {
		t.Errorf("the workload's own connection is opened as %+v", e)
	}
}

// leadTo makes the client's virtual IP lead to a port of the server's, as if a workload had been seen to listen there.
func (g *granting) leadTo(port uint16) {
	g.t.Helper()
	grants := g.grants(g.client, g.server, time.Now().Add(time.Hour))
	for i := range grants {
		if grants[i].Dialled.Addr().String() == virtual4 {
			grants[i].Targets[0].Address = netip.AddrPortFrom(g.server.v4, port)
		}
	}
	if err := g.r.SetGrants(grants); err != nil {
		g.t.Fatal(err)
	}
}

// tells starts a client that has something to tell, and lets p accept.
func (g *granting) tells(p *netlab.Process) *netlab.Process {
	g.t.Helper()
	if err := p.Signal(unix.SIGUSR1); err != nil {
		g.t.Fatal(err)
	}
	return g.client.app(g.client.cgroup, "NP_APP=dial", "NP_NETWORK=tcp4", "NP_ADDR="+virtual4+":80", "NP_SAY=secret")
}

func TestAProbeFindsTheWayAndNoApplicationNotices(t *testing.T) {
	g := newGranting(t)
	source, err := g.client.ns.Probe(g.client.id, g.server.ns.Cookie, netip.MustParseAddrPort(g.at4()))
	if err != nil || source != g.client.v4 {
		t.Errorf("probe: from %s, %v; want %s", source, err, g.client.v4)
	}
	own, err := g.server.ns.Probe(g.server.id, g.server.ns.Cookie, netip.MustParseAddrPort(g.at4()))
	if err != nil || own != g.server.v4 {
		t.Errorf("probe of its own address: from %s, %v", own, err)
	}
	island := g.pod() // without a route
	for what, probe := range map[string]func() (netip.Addr, error){
		"without a route": func() (netip.Addr, error) {
			return island.ns.Probe(island.id, g.server.ns.Cookie, netip.MustParseAddrPort(g.at4()))
		},
		"of an address that is in another namespace": func() (netip.Addr, error) {
			return g.client.ns.Probe(g.client.id, island.ns.Cookie, netip.MustParseAddrPort(g.at4()))
		},
	} {
		if _, err := probe(); !errors.Is(err, redirect.ErrNoWay) {
			t.Errorf("a probe %s: %v", what, err)
		}
	}
	if strings.Contains(g.app.Output(), "accepted") {
		t.Errorf("the application has seen a probe: %s", g.app.Output())
	}
	g.settled(g.client.id, g.server.id)
}

func TestASocketUsedAgainAndEarlyDataTakeTheWayOfEachConnection(t *testing.T) {
	g := newGranting(t)
	g.destinations(virtual4, "240.0.0.9")
	to := fmt.Sprintf("%s:80 240.0.0.9:80 %s:81+ 240.0.0.9:81+ %s:82", virtual4, virtual4, virtual4)
	out := g.ended(g.client.app(g.client.cgroup, "NP_APP=reuse", "NP_ADDR="+to))
	for _, want := range []string{
		`240.0.0.1:80: "hello"`, fmt.Sprintf(`240.0.0.9:80: "240.0.0.9:80 for workload %d`, g.client.id), `240.0.0.1:81: "hello"`,
		fmt.Sprintf(`240.0.0.9:81: "240.0.0.9:81 for workload %d`, g.client.id), `240.0.0.1:82: "hello"`,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s in:\n%s", want, out)
		}
	}
	if e := g.event(redirect.GrantClosed, virtual4+":81"); e.Sent != uint64(len("early")) {
		t.Errorf("%d bytes sent with the SYN, of %d", e.Sent, len("early"))
	}
	g.settled(g.client.id, g.server.id)
}

func TestAWorkloadIsGrantedItsOwnService(t *testing.T) {
	g := newGranting(t)
	if err := g.r.SetGrants(g.grants(g.server, g.server, time.Now().Add(time.Hour))); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{virtual4 + ":80", "[" + virtual6 + "]:80", g.at4(), g.at6()} {
		if got := g.server.dial("tcp", to); !answered(got) {
			t.Errorf("its own service at %s: %s", to, got)
		}
	}
	g.settled(g.server.id)
}

func TestAFailedGrantedConnectionSaysWhetherItArrived(t *testing.T) {
	g := newGranting(t)
	grants := g.grants4(g.client, g.server)
	grants[0].Targets[0].Address = netip.AddrPortFrom(g.server.v4, 8099)
	if err := g.r.SetGrants(grants); err != nil {
		t.Fatal(err)
	}
	if got := g.client.dial("tcp4", virtual4+":80"); !refused(got) {
		t.Errorf("nobody listens: %s", got)
	}
	if e := g.event(redirect.GrantFailed, virtual4+":80"); !e.Admitted || e.Refused {
		t.Errorf("of a connection that arrived where nobody listens: %+v", e)
	}
	grants[0].Targets[0].Namespace = g.client.ns.Cookie // as if what arrives had other addresses
	closes, err := g.client.ns.Closes()
	if err != nil {
		t.Fatal(err)
	}
	grants[0].Targets[0].Closes = closes
	grants[0].Targets[0].Address = netip.AddrPortFrom(g.server.v4, 8080)
	if err := g.r.SetGrants(grants); err != nil {
		t.Fatal(err)
	}
	if got := g.client.dial("tcp4", virtual4+":81"); !refused(got) {
		t.Errorf("published for another namespace: %s", got)
	}
	if e := g.event(redirect.GrantFailed, virtual4+":81"); e.Admitted || e.Refused {
		t.Errorf("of a connection that did not arrive as it left: %+v", e)
	}
	g.settled(g.client.id, g.server.id)
}

func TestGrantsEndWithTheDaemonThatMadeThemAndLiveConnectionsPassToTheNext(t *testing.T) {
	g := newGranting(t)
	held := g.client.hold(g.client.cgroup, virtualKept+":80", "connected")
	if err := g.r.Close(); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.client.listen()
	g.client.serve()
	g.server.listen()
	if got := g.client.dial("tcp4", virtual4+":80"); !strings.Contains(got, "for workload") {
		t.Errorf("under a new daemon that has granted nothing: %s", got)
	}
	live, err := g.r.Granted()
	if err != nil || len(live) != 1 || live[0].Workload != g.client.id || live[0].Dialled.String() != virtualKept+":80" || live[0].Opened.IsZero() || !live[0].Accepted || live[0].Muzzled {
		t.Fatalf("the connection that the earlier daemon granted is listed as %+v, %v", live, err)
	}
	if err := g.r.Destroy(live[0]); err != nil {
		t.Error(err)
	}
	if out := g.ended(held); !strings.Contains(out, "connection abort") {
		t.Errorf("its client: %s", out)
	}
	g.settled(g.client.id, g.server.id)
}

func TestConnectionsWhoseCloseNobodySawAreFound(t *testing.T) {
	g := newGranting(t)
	held := g.client.hold(g.client.cgroup, virtualKept+":80", "connected", "NP_RESET=1")
	if ended, err := g.r.Ended(); err != nil || len(ended) > 0 {
		t.Errorf("while it lives: %+v, %v", ended, err)
	}
	id, err := redirect.CgroupID(g.client.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := g.r.Unenroll(id); err != nil {
		t.Fatal(err)
	}
	g.finish(held, unix.SIGTERM)
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		ended, err := g.r.Ended()
		if err == nil && len(ended) == 1 && ended[0].Dialled.String() == virtualKept+":80" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the connection whose workload was un-enrolled: %+v, %v", ended, err)
		}
	}
	g.settled()
}

func TestAConnectionIsKeptInSightFromItsOtherEndOnceItsClientsNamespaceIsClosed(t *testing.T) {
	g := newGranting(t)
	kept := g.client.hold(g.client.cgroup, virtualKept+":80", "connected")
	left := g.client.hold(g.client.cgroup, virtualKept+":81", "connected", "NP_RESET=1")
	id, err := redirect.CgroupID(g.client.cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.r.Unenroll(id), g.client.ns.Close()); err != nil {
		t.Fatal(err)
	}
	if ended, err := g.r.Ended(); err != nil || len(ended) > 0 {
		t.Errorf("while both live: %+v, %v", ended, err)
	}
	g.finish(left, unix.SIGTERM)
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		ended, err := g.r.Ended()
		if err == nil && len(ended) == 1 && ended[0].Dialled.String() == virtualKept+":81" {
			break
		}
		if err != nil || len(ended) > 0 || time.Now().After(end) {
			t.Fatalf("of two connections, one of which its client has left: %+v, %v", ended, err)
		}
	}
	live, err := g.r.Granted()
	if err != nil || len(live) != 1 || live[0].Dialled.String() != virtualKept+":80" {
		t.Fatalf("the one that lives on is listed as %+v, %v", live, err)
	}
	if err := g.r.Destroy(live[0]); err != nil {
		t.Error(err)
	}
	if out := g.ended(kept); !strings.Contains(out, "reset by peer") {
		t.Errorf("the client of the one that was destroyed: %s", out)
	}
	g.settled()
}

func TestAConnectionBetweenNamespacesThatAreBothClosedIsForgotten(t *testing.T) {
	g := newGranting(t)
	held := g.client.hold(g.client.cgroup, virtualKept+":80", "connected")
	if err := errors.Join(g.client.ns.Close(), g.server.ns.Close()); err != nil {
		t.Fatal(err)
	}
	if ended, err := g.r.Ended(); err != nil || len(ended) != 1 {
		t.Errorf("forgotten: %+v, %v", ended, err)
	}
	g.finish(held, unix.SIGKILL)
}

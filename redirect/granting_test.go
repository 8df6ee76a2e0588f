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

// appHold connects to NP_ADDR, says so, and prints what it reads, and the end.
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
	_, err = io.Copy(os.Stdout, c)
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

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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

const deadline = 15 * time.Second

// TestMain lets the test binary be the application, too: started with NP_APP it dials or listens inside a workload.
func TestMain(m *testing.M) {
	switch os.Getenv("NP_APP") {
	case "dial":
		appDial()
	case "listen":
		appListen()
	case "ask":
		appAsk()
	case "resolve":
		appResolve()
	case "hold":
		appHold()
	case "reuse":
		appReuse()
	case "backlog":
		appBacklog()
	case "own":
		appOwn()
	case "join":
		appJoin()
	default:
		os.Exit(m.Run())
	}
}

// dialMapped connects an IPv6 socket to a v4-mapped address, which package net would turn into an IPv4 one.
func dialMapped(to netip.AddrPort) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mapped")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// appDial connects to NP_ADDR and prints its peer and the first line it receives, or the error.
func appDial() {
	var d net.Dialer
	d.SetMultipathTCP(os.Getenv("NP_MPTCP") == "1")
	if dev := os.Getenv("NP_DEVICE"); dev != "" {
		d.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, dev) })
		}
	}
	if bind := os.Getenv("NP_BIND"); bind != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(bind))
	}
	d.Timeout = deadline
	dial := func() (net.Conn, error) { return d.Dial(os.Getenv("NP_NETWORK"), os.Getenv("NP_ADDR")) }
	if os.Getenv("NP_NETWORK") == "mapped" {
		dial = func() (net.Conn, error) { return dialMapped(netip.MustParseAddrPort(os.Getenv("NP_ADDR"))) }
	}
	c, err := dial()
	if err != nil {
		fmt.Println("error", err)
		return
	}
	c.SetDeadline(time.Now().Add(deadline))
	if say := os.Getenv("NP_SAY"); say != "" {
		io.WriteString(c, say)
	}
	line, err := io.ReadAll(c)
	fmt.Printf("peer %s got %q %v\n", c.RemoteAddr(), line, err)
}

// appListen accepts on NP_ADDR until it is killed, printing each peer as the application sees it and greeting it.
func appListen() {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", os.Getenv("NP_ADDR"))
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("listening")
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		fmt.Println("accepted", c.RemoteAddr())
		io.WriteString(c, "hello")
		c.Close()
	}
}

// node is a lab with a Redirect whose daemon is the test process.
type node struct {
	mu      sync.Mutex // guards r, when it is changed, and resting
	resting bool

	t    testing.TB
	lab  *netlab.Lab
	r    *redirect.Redirect
	cfg  redirect.Config
	hub  *netlab.Namespace // holds the other ends of the pods' links
	pods int
}

func newNode(t testing.TB) *node {
	t.Helper()
	return newNodeWith(t, func(*redirect.Config) {})
}

// newNodeWith is newNode with a changed configuration.
func newNodeWith(t testing.TB, change func(*redirect.Config)) *node {
	t.Helper()
	netlab.Require(t)
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
		if leaks := lab.Leaks(); len(leaks) > 0 {
			t.Errorf("left behind: %v", leaks)
		}
	})
	own, err := lab.Cgroup().Child("daemon")
	if err != nil {
		t.Fatal(err)
	}
	if err := own.Add(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leaveCgroup(t) })
	pins, err := lab.BPFFS()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, lab: lab, cfg: redirect.Config{Pins: filepath.Join(pins, "nodeproxy"), Node: "test", Cgroup: own.Path()}}
	change(&n.cfg)
	if n.hub, err = lab.Namespace(); err != nil {
		t.Fatal(err)
	}
	n.open()
	t.Cleanup(func() { n.r.Close() })
	n.keepBeating()
	return n
}

// keepBeating beats for the daemon until the end of the test, unless n.resting.
func (n *node) keepBeating() {
	done := make(chan struct{})
	var beating sync.WaitGroup
	beating.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			n.mu.Lock()
			if !n.resting {
				_ = n.r.Beat() // closed for a moment when a test changes daemons
			}
			n.mu.Unlock()
		}
	})
	n.t.Cleanup(func() {
		close(done)
		beating.Wait()
	})
}

func (n *node) rest(resting bool) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resting = resting
	change := n.r.Beat
	if resting {
		change = n.r.Rest
	}
	if err := change(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) open() {
	n.t.Helper()
	r, err := redirect.Open(n.cfg)
	if err != nil {
		n.t.Fatalf("%+v", err)
	}
	n.mu.Lock()
	n.r = r
	n.mu.Unlock()
	if err := r.Beat(); err != nil {
		n.t.Fatal(err)
	}
}

func leaveCgroup(t testing.TB) {
	root, err := redirect.CgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pod is a workload with a namespace of its own.
type pod struct {
	n      *node
	netns  *netlab.Namespace
	cgroup *netlab.Cgroup
	ns     *redirect.Namespace
	id     uint32
	v4, v6 netip.Addr
}

func (n *node) pod() *pod {
	n.t.Helper()
	n.pods++
	p := &pod{n: n, v4: netip.AddrFrom4([4]byte{10, 9, byte(n.pods), 2}), v6: netip.MustParseAddr(fmt.Sprintf("fd09:%d::2", n.pods))}
	var err error
	if p.netns, err = n.lab.Namespace(); err != nil {
		n.t.Fatal(err)
	}
	if err := errors.Join(netlab.Join(p.netns, "eth0", n.hub, fmt.Sprintf("pod%d", n.pods)), n.hub.Up(fmt.Sprintf("pod%d", n.pods)), p.netns.Address("eth0", netip.PrefixFrom(p.v4, 24)), p.netns.Address("eth0", netip.PrefixFrom(p.v6, 64)), p.netns.Up("eth0")); err != nil {
		n.t.Fatal(err)
	}
	if p.cgroup, err = n.lab.Cgroup().Child("pod" + strconv.Itoa(n.pods)); err != nil {
		n.t.Fatal(err)
	}
	p.listen()
	p.enroll(redirect.Nesting{})
	return p
}

func (p *pod) listen() {
	p.n.t.Helper()
	f, err := os.Open(p.netns.Path())
	if err != nil {
		p.n.t.Fatal(err)
	}
	if p.ns, err = p.n.r.OpenNamespace(f); err != nil {
		p.n.t.Fatalf("%+v", err)
	}
}

func (p *pod) enroll(nesting redirect.Nesting) {
	p.n.t.Helper()
	var err error
	if p.id, err = p.n.r.NewWorkload(1); err != nil {
		p.n.t.Fatal(err)
	}
	if err := p.n.r.Enroll(p.cgroup.Path(), p.id, nesting); err != nil {
		p.n.t.Fatal(err)
	}
}

// app runs the test binary inside the pod, in cgroup if it is given.
func (p *pod) app(cgroup *netlab.Cgroup, env ...string) *netlab.Process {
	p.n.t.Helper()
	self, err := os.Executable()
	if err != nil {
		p.n.t.Fatal(err)
	}
	proc, err := p.n.lab.Start(netlab.Command{Path: self, Env: append(env, "GORACE=atexit_sleep_ms=0"), Namespace: p.netns, Cgroup: cgroup})
	if err != nil {
		p.n.t.Fatal(err)
	}
	return proc
}

// dial runs a dialling application to its end and returns what it says.
func (p *pod) dial(network, addr string, env ...string) string {
	p.n.t.Helper()
	return p.dialFrom(p.cgroup, network, addr, env...)
}

func (p *pod) dialFrom(cgroup *netlab.Cgroup, network, addr string, env ...string) string {
	p.n.t.Helper()
	return p.runFrom(cgroup, append(env, "NP_APP=dial", "NP_NETWORK="+network, "NP_ADDR="+addr)...)
}

// runFrom runs the application to its end and returns what it says.
func (p *pod) runFrom(cgroup *netlab.Cgroup, env ...string) string {
	p.n.t.Helper()
	proc := p.app(cgroup, env...)
	ctx, cancel := context.WithTimeout(context.Background(), 2*deadline)
	defer cancel()
	if err := proc.Wait(ctx); err != nil {
		p.n.t.Fatalf("application: %v\n%s", err, proc.Output())
	}
	return strings.TrimSpace(proc.Output())
}

// serve answers every connection to the pod's outbound listeners with its origin.
func (p *pod) serve() {
	for _, ln := range p.ns.Outbound {
		go func() {
			for {
				c, err := ln.AcceptTCP()
				if err != nil {
					return
				}
				o, err := p.n.r.Origin(c)
				if err != nil {
					fmt.Fprint(c, err)
				} else {
					fmt.Fprintf(c, "%s for workload %d by %s", o.Destination, o.Workload, o.Comm)
				}
				c.Close()
			}
		}()
	}
}

func (n *node) destinations(addrs ...string) {
	n.t.Helper()
	var dests []redirect.Destination
	for _, a := range addrs {
		if ap, err := netip.ParseAddrPort(a); err == nil {
			dests = append(dests, redirect.Destination{Addr: ap.Addr(), Port: ap.Port(), Instance: true})
			continue
		}
		dests = append(dests, redirect.Destination{Addr: netip.MustParseAddr(a)})
	}
	if err := n.r.SetDestinations(dests, []netip.Prefix{netip.MustParsePrefix("240.0.0.0/8")}); err != nil {
		n.t.Fatal(err)
	}
}

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

// drained waits until no connection is in the maps any more.
func (n *node) drained() {
	n.t.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		fills, err := n.r.Fills()
		if err != nil {
			n.t.Fatal(err)
		}
		left := 0
		for _, f := range fills {
			if f.Name == "pending" || f.Name == "direct" || f.Name == "granted" {
				left += f.Entries
			}
		}
		if left == 0 {
			return
		}
		if time.Now().After(end) {
			n.t.Fatalf("connections left in the maps: %+v", fills)
		}
	}
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

func waitFor(t *testing.T, p *netlab.Process, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := p.WaitOutput(ctx, text); err != nil {
		t.Fatalf("waiting for %q: %v\n%s", text, err, p.Output())
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

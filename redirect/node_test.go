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
	lab := netlab.ForTest(t)
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

func waitFor(t *testing.T, p *netlab.Process, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := p.WaitOutput(ctx, text); err != nil {
		t.Fatalf("waiting for %q: %v\n%s", text, err, p.Output())
	}
}

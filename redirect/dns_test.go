package redirect_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// appAsk sends a datagram to each of NP_ADDR from one socket, then waits for as many answers, and prints each with its sender
// as the socket has it. NP_NETWORK is udp4, udp6, mapped, tcp4 or tcp6; NP_CONNECT connects the socket to the last address.
func appAsk() {
	var addrs []netip.AddrPort
	for _, text := range strings.Split(os.Getenv("NP_ADDR"), ",") {
		addrs = append(addrs, netip.MustParseAddrPort(text))
	}
	network := os.Getenv("NP_NETWORK")
	if strings.HasPrefix(network, "tcp") {
		askStream(network, addrs[0])
		return
	}
	family := unix.AF_INET6
	if network == "udp4" {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
	if dev := os.Getenv("NP_DEVICE"); err == nil && dev != "" {
		err = unix.BindToDevice(fd, dev)
	}
	if bind := os.Getenv("NP_BIND"); err == nil && bind != "" {
		err = unix.Bind(fd, sockaddrOf(netip.MustParseAddrPort(bind), family))
	}
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(deadline / time.Second)})
	for _, to := range addrs {
		if err == nil && os.Getenv("NP_CONNECT") == "1" {
			if err = unix.Connect(fd, sockaddrOf(to, family)); err == nil {
				peer, errPeer := unix.Getpeername(fd)
				fmt.Println("peer", addrPortOf(peer), errPeer)
				_, err = unix.Write(fd, []byte("query"))
			}
		} else if err == nil {
			err = unix.Sendto(fd, []byte("query"), 0, sockaddrOf(to, family))
		}
	}
	b := make([]byte, 500)
	for range addrs {
		var n int
		var from unix.Sockaddr
		if err == nil {
			n, from, err = unix.Recvfrom(fd, b, 0)
		}
		if err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Printf("from %s got %q\n", addrPortOf(from), b[:n])
	}
}

func askStream(network string, to netip.AddrPort) {
	var d net.Dialer
	d.SetMultipathTCP(os.Getenv("NP_MPTCP") == "1")
	d.Timeout = deadline
	c, err := d.Dial(network, to.String())
	if err != nil {
		fmt.Println("error", err)
		return
	}
	_ = c.SetDeadline(time.Now().Add(deadline))
	b, err := io.ReadAll(c)
	fmt.Printf("from %s got %q %v\n", c.RemoteAddr(), b, err)
}

func sockaddrOf(a netip.AddrPort, family int) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// appResolve answers datagrams and connections on each of NP_ADDR with "real" until it is killed.
func appResolve() {
	for _, addr := range strings.Split(os.Getenv("NP_ADDR"), ",") {
		network := "udp4"
		if netip.MustParseAddrPort(addr).Addr().Is6() {
			network = "udp6"
		}
		conn, err := net.ListenPacket(network, addr)
		if err != nil {
			fmt.Println("error", err)
			return
		}
		go func() {
			b := make([]byte, 500)
			for {
				n, from, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				fmt.Printf("heard %q from %s\n", b[:n], from)
				_, _ = conn.WriteTo([]byte("real"), from)
			}
		}()
	}
	fmt.Println("listening")
	select {}
}

// ask runs a process in the pod that sends queries, and returns what it says.
func (p *pod) ask(network, addrs string, env ...string) string {
	p.n.t.Helper()
	return p.askFrom(p.cgroup, network, addrs, env...)
}

func (p *pod) askFrom(cgroup *netlab.Cgroup, network, addrs string, env ...string) string {
	p.n.t.Helper()
	return p.runFrom(cgroup, append(env, "NP_APP=ask", "NP_NETWORK="+network, "NP_ADDR="+addrs)...)
}

// answer opens DNS in the pod's namespace, steers the pod's queries there, and answers each with the name server that was
// asked and the client.
func (p *pod) answer() *redirect.DNS {
	p.n.t.Helper()
	d, err := p.ns.OpenDNS()
	if err != nil {
		p.n.t.Fatal(err)
	}
	if err := p.n.r.SteerDNS(p.cgroup.Path()); err != nil {
		p.n.t.Fatal(err)
	}
	text := func(at netip.AddrPort, from string) []byte {
		asked, ok := d.Resolver(at)
		if !ok {
			return []byte("nobody was asked at " + at.String())
		}
		return []byte("asked " + asked.String() + " from " + from)
	}
	for _, packets := range d.Packets {
		go func() {
			b := make([]byte, 500)
			for {
				_, from, at, err := packets.Read(b)
				if err != nil {
					return
				}
				_ = packets.Write(text(at, from.Addr().String()), from, at)
			}
		}()
	}
	for _, ln := range d.Streams {
		go func() {
			for {
				c, err := ln.AcceptTCP()
				if err != nil {
					return
				}
				at := netip.MustParseAddrPort(c.LocalAddr().String())
				_, _ = c.Write(text(at, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().String()))
				c.Close()
			}
		}()
	}
	return d
}

func newDNSNode(t testing.TB) *node {
	return newNodeWith(t, func(cfg *redirect.Config) { cfg.DNS = true })
}

func TestQueriesAreSteeredAndAnsweredFromTheNameServerThatWasAsked(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	p.answer()
	v4, v6 := p.v4.String(), p.v6.String()
	for _, c := range []struct {
		name, network string
		addrs         []string // asked
		source        string   // the client's address, as the daemon sees it
		env           []string
	}{
		{"unconnected", "udp4", []string{"192.0.2.1:53"}, "127.0.0.1", nil},
		{"connected", "udp4", []string{"192.0.2.1:53"}, "127.0.0.1", []string{"NP_CONNECT=1"}},
		{"loopback", "udp4", []string{"127.0.0.53:53"}, "127.0.0.1", []string{"NP_CONNECT=1"}},
		{"any address", "udp4", []string{"127.0.0.1:53"}, "127.0.0.1", nil},
		{"interleaved", "udp4", []string{"192.0.2.1:53", "127.0.0.11:53", "192.0.2.2:53", "192.0.2.1:53"}, "127.0.0.1", nil},
		{"bound to the application's address", "udp4", []string{"192.0.2.1:53"}, v4, []string{"NP_BIND=" + v4 + ":0"}},
		{"bound and connected", "udp4", []string{"192.0.2.2:53"}, v4, []string{"NP_BIND=" + v4 + ":0", "NP_CONNECT=1"}},
		{"bound to lo", "udp4", []string{"192.0.2.2:53"}, "127.0.0.1", []string{"NP_DEVICE=lo"}},
		{"v4-mapped, unconnected", "mapped", []string{"192.0.2.1:53", "127.0.0.53:53"}, "127.0.0.1", nil},
		{"v4-mapped, connected", "mapped", []string{"192.0.2.1:53"}, "127.0.0.1", []string{"NP_CONNECT=1"}},
		{"IPv6, unconnected", "udp6", []string{"[2001:db8::1]:53"}, "::1", nil},
		{"IPv6, connected", "udp6", []string{"[2001:db8::1]:53"}, "::1", []string{"NP_CONNECT=1"}},
		{"IPv6, interleaved", "udp6", []string{"[2001:db8::1]:53", "[::1]:53", "[2001:db8::2]:53", "[2001:db8::1]:53"}, "::1", nil},
		{"IPv6, bound to the application's address", "udp6", []string{"[2001:db8::2]:53"}, v6, []string{"NP_BIND=[" + v6 + "]:0"}},
		{"both families on one socket", "mapped", []string{"192.0.2.1:53", "[2001:db8::2]:53"}, "", nil},
		{"TCP", "tcp4", []string{"192.0.2.1:53"}, "127.0.0.1", nil},
		{"TCP, IPv6", "tcp6", []string{"[2001:db8::2]:53"}, "::1", nil},
		{"multipath TCP", "tcp4", []string{"192.0.2.1:53"}, "127.0.0.1", []string{"NP_MPTCP=1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := p.ask(c.network, strings.Join(c.addrs, ","), c.env...)
			lines := strings.Split(got, "\n")
			for _, asked := range c.addrs {
				want := fmt.Sprintf("from %s got %q", asked, "asked "+asked+" from "+c.source)
				if c.source == "" {
					want = fmt.Sprintf("from %s got \"asked %s", asked, asked)
				}
				if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) }) {
					t.Errorf("got %s\nwant %s", got, want)
				}
				if slices.Contains(c.env, "NP_CONNECT=1") && !slices.Contains(lines, "peer "+asked+" <nil>") {
					t.Errorf("getpeername: got %s, want %s", got, asked)
				}
			}
		})
	}
}

func TestQueriesPassWhenTheDaemonCannotAnswer(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	d := p.answer()
	v4, v6 := netip.AddrPortFrom(p.v4, 53).String(), netip.AddrPortFrom(p.v6, 53).String()
	waitFor(t, p.app(nil, "NP_APP=resolve", "NP_ADDR=127.0.0.53:53,"+v4+","+v6), "listening")
	all := func(what, want string) {
		t.Helper()
		if t.Failed() {
			return // each miss takes its time
		}
		for _, q := range []struct{ network, addr, connect string }{
			{"udp4", "127.0.0.53:53", "NP_CONNECT=1"}, {"udp4", v4, "NP_CONNECT=0"}, {"udp6", v6, "NP_CONNECT=1"}, {"mapped", v4, "NP_CONNECT=0"},
		} {
			if got := p.ask(q.network, q.addr, q.connect); !strings.Contains(got, "from "+q.addr+" got \""+want) {
				t.Errorf("%s, %s %s %s: got %s, want %q", what, q.network, q.addr, q.connect, got, want)
			}
		}
	}
	all("at first", "asked")
	n.rest(true)
	all("daemon stopped or hung", "real")
	n.rest(false)
	all("daemon back", "asked")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	all("listener gone", "real")
	squatter := p.app(nil, "NP_APP=resolve", "NP_ADDR=0.0.0.0:15053,[::1]:15053,[::1]:15054,[::1]:15055")
	waitFor(t, squatter, "listening")
	all("a squatter has the ports", "real")
	if strings.Contains(squatter.Output(), "heard") {
		t.Errorf("the squatter got queries: %s", squatter.Output())
	}
	if _, err := p.ns.OpenDNS(); err == nil || !strings.Contains(err.Error(), "another process has it") {
		t.Errorf("listen beside a squatter: %v", err)
	}
	squatter.Kill()
	p.answer()
	all("squatter gone", "asked")
	counts, err := n.r.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dns_steered", "dns_passed"} {
		if counts[name] < 3*4 {
			t.Errorf("counter %s is %d", name, counts[name])
		}
	}
}

func TestWhatIsNoQueryOfAnEnrolledWorkloadIsLeftAlone(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	p.answer()
	v4 := p.v4.String()
	waitFor(t, p.app(nil, "NP_APP=resolve", "NP_ADDR=127.0.0.53:53,"+v4+":5353"), "listening")
	want := func(what, got, text string) {
		t.Helper()
		if !strings.Contains(got, text) {
			t.Errorf("%s: got %s, want %q", what, got, text)
		}
	}
	want("a process of no workload", p.askFrom(nil, "udp4", "127.0.0.53:53"), `got "real"`)
	want("another port", p.ask("udp4", v4+":5353"), `got "real"`)
	want("from a name server's own port", p.ask("udp4", "127.0.0.53:53", "NP_BIND="+v4+":53"), `got "real"`)
	if err := n.hub.Address("pod1", netip.MustParsePrefix("10.9.1.1/24")); err != nil {
		t.Fatal(err)
	}
	hub := *p
	hub.netns = n.hub
	waitFor(t, hub.app(nil, "NP_APP=resolve", "NP_ADDR=10.9.1.1:53"), "listening")
	want("a name server of the network", p.ask("udp4", "10.9.1.1:53"), `got "asked`)
	want("bound to a device, from which loopback is out of reach", p.ask("udp4", "10.9.1.1:53", "NP_DEVICE=eth0"), `got "real"`)
	want("a group", p.ask("udp4", "224.0.0.251:53"), "network is unreachable")
	if err := n.r.Unenroll(mustID(t, p.cgroup)); err != nil {
		t.Fatal(err)
	}
	want("un-enrolled", p.ask("udp4", "127.0.0.53:53"), `got "real"`)
}

func TestNestedWorkloadsAreSteeredOnce(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	p.answer()
	child, err := p.cgroup.Child("inner")
	if err != nil {
		t.Fatal(err)
	}
	inner := *p
	inner.cgroup = child
	inner.enroll(redirect.Nesting{Outer: true})
	if err := n.r.SteerDNS(child.Path()); err != nil {
		t.Fatal(err)
	}
	for _, env := range []string{"NP_CONNECT=0", "NP_CONNECT=1"} {
		if got, want := inner.ask("udp4", "192.0.2.1:53", env), `from 192.0.2.1:53 got "asked 192.0.2.1:53 from 127.0.0.1"`; !strings.Contains(got, want) {
			t.Errorf("%s: got %s, want %s", env, got, want)
		}
	}
}

func TestSlotsOfNameServersAreBounded(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	p.answer()
	counter := func(name string) uint64 {
		counts, err := n.r.Counters()
		if err != nil {
			t.Fatal(err)
		}
		return counts[name]
	}
	var addrs []string
	for i := range 256 {
		addrs = append(addrs, fmt.Sprintf("198.51.100.%d:53", i))
	}
	for some := range slices.Chunk(addrs, 64) { // all at once could overflow the client's receive buffer
		got := p.ask("udp4", strings.Join(some, ","))
		for _, a := range some {
			if !strings.Contains(got, fmt.Sprintf("from %s got %q", a, "asked "+a+" from 127.0.0.1")) {
				t.Fatalf("%s is not answered: %s", a, got)
			}
		}
	}
	if full := counter("dns_full"); full != 0 {
		t.Errorf("dns_full is %d before the slots are", full)
	}
	waitFor(t, p.app(nil, "NP_APP=resolve", "NP_ADDR=127.0.0.53:53"), "listening")
	if got := p.ask("udp4", "127.0.0.53:53"); !strings.Contains(got, `got "real"`) {
		t.Errorf("one name server too many: %s", got)
	}
	if full := counter("dns_full"); full != 1 {
		t.Errorf("dns_full is %d, want 1", full)
	}
	if err := p.ns.Close(); err != nil {
		t.Fatal(err)
	}
	fills, err := n.r.Fills()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fills {
		if strings.HasPrefix(f.Name, "dns_") && f.Entries != 0 {
			t.Errorf("map %s keeps %d entries of a namespace that is closed", f.Name, f.Entries)
		}
	}
}

func TestSteeringSurvivesTheDaemonAndGoesWithItsSetting(t *testing.T) {
	n := newDNSNode(t)
	p := n.pod()
	p.answer()
	if got := p.ask("udp4", "192.0.2.7:53,192.0.2.8:53"); !strings.Contains(got, "asked 192.0.2.8:53") {
		t.Fatal(got)
	}
	pins := filepath.Join(n.r.Dir(), "cgroups", fmt.Sprint(mustID(t, p.cgroup)), "dns")
	reopen := func(dns bool) {
		t.Helper()
		n.mu.Lock()
		err := n.r.Close()
		n.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		n.cfg.DNS = dns
		n.open()
	}
	reopen(true)
	p.listen()
	p.answer()
	// 192.0.2.8 has the slot that a client of the earlier daemon is connected to.
	if got := p.ask("udp4", "192.0.2.8:53,192.0.2.7:53"); !strings.Contains(got, `from 192.0.2.8:53 got "asked 192.0.2.8:53`) {
		t.Errorf("after a restart: %s", got)
	}
	reopen(false)
	p.listen()
	if _, err := os.Stat(pins); !os.IsNotExist(err) {
		t.Errorf("a daemon without DNS leaves its hooks: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(n.r.Dir(), "maps", "dns_*")); err != nil || len(left) > 0 {
		t.Errorf("a daemon without DNS leaves %v %v", left, err)
	}
	waitFor(t, p.app(nil, "NP_APP=resolve", "NP_ADDR=127.0.0.53:53"), "listening")
	if got := p.ask("udp4", "127.0.0.53:53"); !strings.Contains(got, `got "real"`) {
		t.Errorf("DNS switched off: %s", got)
	}
	if err := n.r.SteerDNS(p.cgroup.Path()); err == nil {
		t.Error("queries are steered without DNS")
	}
}

func TestTheDNSPortTakesNothingFromOtherNamespaces(t *testing.T) {
	n := newDNSNode(t)
	server, stranger := n.pod(), n.pod()
	d := server.answer()
	// The pods are on different links: the stranger gets an address on the server's.
	out, in := "x0", "x1"
	if err := netlab.Join(stranger.netns, out, server.netns, in); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		stranger.netns.Address(out, netip.MustParsePrefix("10.77.0.1/24")), server.netns.Address(in, netip.MustParsePrefix("10.77.0.2/24")),
		stranger.netns.Up(out), server.netns.Up(in),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, server.app(nil, "NP_APP=resolve", "NP_ADDR=10.77.0.2:7000"), "listening")
	if got := stranger.ask("udp4", "10.77.0.2:7000"); !strings.Contains(got, `got "real"`) {
		t.Fatalf("the stranger does not reach the server at all: %s", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*deadline)
	defer cancel()
	app := stranger.app(nil, "NP_APP=ask", "NP_NETWORK=udp4", "NP_ADDR=10.77.0.2:15053,10.77.0.2:7000")
	if err := app.WaitOutput(ctx, "from"); err != nil {
		t.Fatal(err)
	}
	app.Kill()
	if out := app.Output(); strings.Contains(out, "asked") {
		t.Errorf("a stranger got an answer: %s", out)
	}
	if _, ok := d.Resolver(netip.MustParseAddrPort("127.53.0.9:15053")); ok {
		t.Error("a slot that no hook gave away stands for a name server")
	}
}

func mustID(t testing.TB, cgroup *netlab.Cgroup) uint64 {
	t.Helper()
	id, err := redirect.CgroupID(cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

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

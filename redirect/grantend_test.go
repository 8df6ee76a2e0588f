package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

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

func TestAWorkloadThatHasItsShareTakesTheProxy(t *testing.T) {
	const share = 16384 // ARCHITECTURE.md, maps
	g := newGranting(t)
	for _, c := range []struct {
		announced, granted int32
		direct             bool
	}{{share, 0, false}, {0, share, false}, {share - 1, share - 1, true}} {
		if err := g.r.Charge(g.client.id, c.announced, c.granted); err != nil {
			t.Fatal(err)
		}
		if got := g.client.dial("tcp4", virtual4+":80"); answered(got) != c.direct || !c.direct && !strings.Contains(got, "for workload") {
			t.Errorf("with %d announced and %d granted: %s", c.announced, c.granted, got)
		}
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

func TestASYNThatArrivesAfterItsGrantHasEndedIsTheProxys(t *testing.T) {
	grantEndsMeanwhile(t, "1", func(*granting) []redirect.Grant { return nil })
}

func TestSoItIsIfItIsAnsweredBySYNCookies(t *testing.T) {
	grantEndsMeanwhile(t, "2", func(*granting) []redirect.Grant { return nil })
}

func TestSoItIsIfItsGrantLeadsElsewhereByNow(t *testing.T) {
	grantEndsMeanwhile(t, "1", func(g *granting) []redirect.Grant {
		grants := g.grants(g.client, g.server, time.Now().Add(time.Hour))
		for i := range grants {
			grants[i].Targets[0].Address = netip.AddrPortFrom(grants[i].Targets[0].Address.Addr(), 8080)
		}
		return grants
	})
}

// grantEndsMeanwhile has grants be others while SYNs are under way, with a value of tcp_syncookies from then on.
func grantEndsMeanwhile(t *testing.T, cookies string, others func(*granting) []redirect.Grant) {
	t.Helper()
	g := newGranting(t)
	g.server.serve()
	var held []*netlab.Process
	for range 6 { // some of their SYNs find the queue full, and are sent again a second later
		held = append(held, g.client.hold(g.client.cgroup, virtualKept+":80", "dialling"))
	}
	g.awaitGranted(len(held))
	if err := errors.Join(g.r.SetGrants(others(g)), g.server.netns.Sysctl("net/ipv4/tcp_syncookies", cookies)); err != nil {
		t.Fatal(err)
	}
	for _, p := range held {
		waitFor(t, p, "connected")
	}
	proxied := func(p *netlab.Process) bool {
		return strings.Contains(p.Output(), fmt.Sprintf("%s:80 for workload %d by ", virtualKept, g.client.id))
	}
	for end := time.Now().Add(deadline); !slices.ContainsFunc(held, proxied); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the proxy gets none of them")
		}
	}
	for _, p := range held {
		p.Kill()
		g.ended(p)
	}
	g.settled(g.client.id, g.server.id)
}

func TestASYNThatArrivesWhenNoDaemonBeatsAnyMoreIsRefused(t *testing.T) {
	g := newGranting(t)
	var held []*netlab.Process
	for range 6 { // some of their SYNs find the queue full, and are sent again a second later
		held = append(held, g.client.hold(g.client.cgroup, virtualKept+":80", "dialling"))
	}
	g.awaitGranted(len(held))
	all, err := g.r.Granted()
	if err != nil {
		t.Fatal(err)
	}
	g.rest(true)
	if err := g.keeper.Signal(unix.SIGUSR1); err != nil { // it has room for them by then
		t.Fatal(err)
	}
	refusals := 0
	for _, c := range all {
		if c.Opened.IsZero() {
			refusals++
		}
	}
	for end := time.Now().Add(deadline); ; time.Sleep(10 * time.Millisecond) {
		n := 0
		for _, p := range held {
			if refused(p.Output()) {
				n++
			}
		}
		if n == refusals && n > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d are refused, of %d that were under way", n, refusals)
		}
	}
	for _, p := range held {
		p.Kill()
		g.ended(p)
	}
	g.rest(false)
	g.settled(g.client.id, g.server.id)
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

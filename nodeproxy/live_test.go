package nodeproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

func TestAllowedConnectionsAreCutByADeny(t *testing.T) {
	onEveryPath(t, testAllowedConnectionsAreCutByADeny)
}

func testAllowedConnectionsAreCutByADeny(t *testing.T, path option) {
	m := newMesh(t, path)
	m.rule(policy.Allow)
	client, server := m.pair()
	say(t, client, "x")
	hear(t, server, "x")
	stop := make(chan struct{})
	go func() { // it copies while it is cut
		defer close(stop)
		io.Copy(client, neverEnding{})
	}()
	m.rule(policy.Deny)
	begin := time.Now()
	generation := m.publish()
	t.Logf("in force and cut after %s", time.Since(begin))
	wantReset(t, server)
	<-stop
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, io.EOF) {
		t.Errorf("the client reads %v", err)
	}
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		e := m.events.wait(t, "close", is(admin.EventClose, direction))
		if e.Verdict != admin.Denied || e.Reason != catalog.ReasonIntention || e.Generation != generation || e.Intention != "web => api (deny), intentions.hcl:1" {
			t.Errorf("%+v", e)
		}
	}
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonIntention)
}

func TestADenyCutsEitherDirectionOnItsOwn(t *testing.T) {
	t.Run("inbound", func(t *testing.T) {
		m := newMesh(t)
		a := m.app()
		at := m.instance("api", "api-1", a.addr()).Mesh
		m.publish()
		peer := m.peer(at, m.leaf("web"))
		say(t, peer, "x")
		server := a.accept()
		hear(t, server, "x")
		m.rule(policy.Deny)
		m.publish()
		wantReset(t, server)
		wantReset(t, peer) // and no close_notify, which would read as an orderly end
	})
	t.Run("outbound", func(t *testing.T) {
		m := newMesh(t)
		m.remote("api-1", m.tlsServer(&tls.Config{Certificates: []tls.Certificate{*m.leaf("api")}, ClientAuth: tls.RequireAnyClientCert}))
		m.publish()
		client := m.dial(m.origin(apiVIP()))
		m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))
		m.rule(policy.Deny)
		m.publish()
		wantReset(t, client)
	})
}

func TestADenyCutsAConnectionThatIsStillDialling(t *testing.T) {
	onEveryPath(t, testADenyCutsAConnectionThatIsStillDialling)
}

func testADenyCutsAConnectionThatIsStillDialling(t *testing.T, path option) {
	dialling := make(chan struct{}, 1)
	m := newMesh(t, path, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, _ netip.AddrPort) (*net.TCPConn, error) {
			dialling <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	inst := m.remote("api-1", m.silent())
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	<-dialling
	m.rule(policy.Deny)
	m.publish()
	wantReset(t, client)
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Outbound))
	if e.Reason != catalog.ReasonIntention || e.Generation != 2 {
		t.Errorf("%+v", e)
	}
	if m.proxy.balancer.why(inst) != "" {
		t.Error("the instance was ejected for it")
	}
}

func TestADenyCutsADeliveryUnderWay(t *testing.T) {
	delivering := make(chan struct{}, 1)
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.deliver = func(ctx context.Context, _ *workload.Served, _ netip.AddrPort) (net.Conn, error) {
			delivering <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	at := m.instance("api", "api-1", "").Mesh
	m.publish()
	peer := m.peer(at, m.leaf("web"))
	if err := peer.Handshake(); err != nil {
		t.Fatal(err)
	}
	<-delivering
	m.rule(policy.Deny)
	m.publish()
	wantReset(t, peer)
	if e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound)); e.Reason != catalog.ReasonIntention {
		t.Errorf("%+v", e)
	}
}

func TestACondemnedConnectionTakesNothingMore(t *testing.T) {
	c := newConnection(1, admin.Outbound)
	denied := errors.New("denied")
	c.condemn(denied, nil)
	ours, theirs := tcpPair(t)
	if err := c.hold(ours); !errors.Is(err, denied) {
		t.Errorf("hold: %v", err)
	}
	wantReset(t, theirs)
	if err := c.open(); !errors.Is(err, denied) {
		t.Errorf("open: %v", err)
	}
	if e, _ := c.finish(nil); e.Event != admin.EventDenied || e.Detail != "denied" {
		t.Errorf("%+v", e)
	}
}

func TestUnconcernedConnectionsSurviveAPolicyChange(t *testing.T) {
	onEveryPath(t, testUnconcernedConnectionsSurviveAPolicyChange)
}

func testUnconcernedConnectionsSurviveAPolicyChange(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	m.rules = []policy.Intention{{Source: "batch", Destination: "api", Action: policy.Deny}}
	m.publish()
	say(t, client, "still here")
	hear(t, server, "still here")
}

func TestVerdictsAreInTheOrderOfGenerations(t *testing.T) {
	onEveryPath(t, testVerdictsAreInTheOrderOfGenerations)
}

func testVerdictsAreInTheOrderOfGenerations(t *testing.T, path option) {
	m := newMesh(t, path)
	a := m.app()
	go func() {
		for conn := range a.conns {
			go io.Copy(conn, conn)
		}
	}()
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := net.DialTimeout("tcp", at, patience)
				if err != nil {
					continue // reset while connecting
				}
				conn.SetDeadline(time.Now().Add(patience))
				io.WriteString(conn, "x")
				conn.Read(make([]byte, 1))
				conn.Close()
			}
		})
	}
	verdicts := func() (points []verdict) {
		events, _ := m.events.all()
		for _, e := range events {
			if e.Sequence != 0 {
				points = append(points, verdict{policy.Verdict{Generation: e.Generation}, e.Sequence})
			}
		}
		return points
	}
	for i := 0; i < 60 || len(verdicts()) < 200; i++ {
		m.rule(policy.Action(i % 2))
		m.publish()
	}
	close(stop)
	callers.Wait()
	m.shutdown()
	a.ln.Close()
	close(a.conns)
	wantOrder(t, verdicts())
}

// wantOrder fails when a verdict of an older generation follows one of a newer.
func wantOrder(t *testing.T, all []verdict) {
	t.Helper()
	slices.SortFunc(all, func(a, b verdict) int { return cmp.Compare(a.sequence, b.sequence) })
	for i := 1; i < len(all); i++ {
		if all[i].Generation < all[i-1].Generation {
			t.Fatalf("verdict %d of generation %d follows verdict %d of generation %d", all[i].sequence, all[i].Generation, all[i-1].sequence, all[i-1].Generation)
		}
	}
}

// TestNoSwapFallsBetweenAPolicyAndItsPlaceInTheOrder has verdicts that take long, because the caller's name is, while states are
// swapped: one of the older state that got its place only when it was ready would follow those that were given meanwhile.
func TestNoSwapFallsBetweenAPolicyAndItsPlaceInTheOrder(t *testing.T) {
	var g gate
	unrelated := []policy.Intention{{Source: "a", Destination: "b"}} // without any no name is looked at
	swap := func(generation uint64) {
		p, err := policy.Compile(generation, policy.Action(generation%2), policy.Identity{TrustDomain: trustDomain}, nil, unrelated)
		if err != nil {
			t.Fatal(err)
		}
		g.swap(&state{snap: &catalog.Snapshot{Policy: p}})
	}
	callers := []string{strings.Repeat("slow", 1<<18), strings.Repeat("late", 1<<18), "web", "shop"}
	each := []int{200, 200, 100_000, 100_000}
	results := make([][]verdict, len(callers)+1)
	decide := func(i int, caller string) {
		v := g.decide(policy.Identity{TrustDomain: trustDomain, Service: caller}, "api")
		if v.Allowed != (v.Generation%2 == 1) {
			t.Errorf("generation %d decided %v", v.Generation, v.Allowed)
		}
		results[i] = append(results[i], v)
	}
	swap(1)
	var readers sync.WaitGroup
	for i, caller := range callers {
		readers.Go(func() {
			for range each[i] {
				decide(i, caller)
			}
		})
	}
	done := make(chan struct{})
	go func() { readers.Wait(); close(done) }()
	for generation := uint64(2); ; generation++ {
		swap(generation)
		decide(len(callers), "batch")
		select {
		case <-done:
		default:
			continue
		}
		break
	}
	all := slices.Concat(results...)
	wantOrder(t, all)
	if n := len(slices.CompactFunc(all, func(a, b verdict) bool { return a.sequence == b.sequence })); n != len(all) {
		t.Errorf("%d verdicts share %d sequence numbers", len(all), n)
	}
}

func TestRotationDoesNotDisturbLiveConnections(t *testing.T) {
	onEveryPath(t, testRotationDoesNotDisturbLiveConnections)
}

func testRotationDoesNotDisturbLiveConnections(t *testing.T, path option) {
	m := newMesh(t, path)
	client, server := m.pair()
	say(t, client, "old")
	hear(t, server, "old")
	m.trust(mtlstest.NewRoot(t)) // leaves and root, all at once
	m.publish()
	say(t, client, "still")
	hear(t, server, "still")
	a := m.app()
	m.instance("web", "web-1", a.addr())
	m.publish()
	fresh := m.dial(m.origin(netip.AddrPortFrom(vip["web"], 80)))
	say(t, fresh, "new")
	hear(t, a.accept(), "new")
	say(t, client, "and still")
	hear(t, server, "and still")
}

func TestTheAddressAndNotTheSNISelectsTheCertificate(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	at := map[string]netip.AddrPort{"api": m.instance("api", "api-1", a.addr()).Mesh, "web": m.instance("web", "web-1", a.addr()).Mesh}
	m.publish()
	for service, addr := range at {
		peer := m.peer(addr, m.leaf("web"))
		if err := peer.Handshake(); err != nil {
			t.Fatal(err)
		}
		if got := peer.ConnectionState().PeerCertificates[0].URIs[0].String(); got != spiffe(service) {
			t.Errorf("%s shows the certificate of %s", service, got)
		}
	}
	config := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*m.leaf("web")}, ServerName: "web.default.dc1.internal." + trustDomain}
	peer := tls.Client(m.dial(at["api"].String()), config)
	if err := peer.Handshake(); err == nil {
		t.Error("the SNI of another service was accepted")
	}
}

package nodeproxy

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

// dials is a Kernel.Dial that counts.
type dials struct {
	mu sync.Mutex
	to map[netip.AddrPort]int
}

func (d *dials) option(_ *Config, k *fakeKernel) {
	d.to = map[netip.AddrPort]int{}
	k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
		d.mu.Lock()
		d.to[to]++
		d.mu.Unlock()
		return dialTCP(ctx, to.String())
	}
}

func (d *dials) count(to netip.AddrPort) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to[to]
}

func TestNextInstanceIsTriedBeforeTheFirstByte(t *testing.T) {
	m := newMesh(t)
	a := m.app()
	m.remote("refuses", m.silent())
	m.remote("not-api", m.tlsServer(&tls.Config{Certificates: []tls.Certificate{*m.leaf("web")}, ClientAuth: tls.RequireAnyClientCert}))
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	for range 4 { // the good one is drawn first in some
		client := m.dial(at)
		say(t, client, "hello")
		hear(t, a.accept(), "hello")
	}
	for _, e := range m.events.waitN(t, "open", 4, is(admin.EventOpen, admin.Outbound)) {
		if e.Destination.Instance != "api-1" {
			t.Errorf("%+v", e)
		}
	}
}

func TestAPeerThatResetsTheHandshakeIsTriedAgain(t *testing.T) {
	var resets atomic.Int32
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
			if resets.Add(1) <= 3 {
				return nil, &net.OpError{Op: "dial", Err: syscall.ECONNRESET}
			}
			return dialTCP(ctx, to.String())
		}
	})
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.publish()
	client := m.dial(m.origin(apiVIP()))
	say(t, client, "hello")
	hear(t, a.accept(), "hello")
}

func TestAFailedInstanceIsEjected(t *testing.T) {
	var d dials
	m := newMesh(t, d.option)
	a := m.app()
	dead := m.remote("dead", m.silent())
	m.instance("api", "api-1", a.addr())
	m.publish()
	at := m.origin(apiVIP())
	begin := time.Now()
	for i := range 40 {
		client := m.dial(at)
		say(t, client, "x")
		hear(t, a.accept(), "x")
		client.Close()
		if i == 0 && d.count(dead.Mesh) == 0 { // not drawn first: make sure that it is ejected
			m.proxy.balancer.failed(dead, nil, call{}, syscall.ECONNREFUSED)
		}
	}
	if n := d.count(dead.Mesh); n > 1+int(time.Since(begin)/minEjection) {
		t.Errorf("the dead instance was dialled %d times of 40", n)
	}
	instances := m.proxy.Status().Services[0].Instances
	i := slices.IndexFunc(instances, func(s admin.Instance) bool { return s.ID == "dead" })
	if time.Since(begin) < minEjection && instances[i].Ejected == "" {
		t.Errorf("status does not show the ejection: %+v", instances[i])
	}
}

func TestAnInstanceAddressIsThatInstanceOnly(t *testing.T) {
	var d dials
	m := newMesh(t, d.option)
	a := m.app()
	dead := m.remote("dead", m.silent())
	good := m.instance("api", "api-1", a.addr())
	m.publish()
	m.refused(m.origin(dead.Address), admin.Outbound, catalog.ReasonConnectFailed)
	if d.count(dead.Mesh) != 1 || d.count(good.Mesh) != 0 {
		t.Fatalf("dialled %v", d.to)
	}
	client := m.dial(m.origin(good.Address))
	say(t, client, "x")
	hear(t, a.accept(), "x")
}

func TestFaultsOfThisNodeEjectNobody(t *testing.T) {
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.dial = func(context.Context, netip.AddrPort) (*net.TCPConn, error) {
			return nil, &net.OpError{Op: "dial", Err: syscall.EMFILE}
		}
	})
	inst := m.remote("api-1", m.silent())
	m.publish()
	m.refused(m.origin(apiVIP()), admin.Outbound, catalog.ReasonConnectFailed)
	if why := m.proxy.balancer.why(inst); why != "" {
		t.Fatalf("ejected: %s", why)
	}
}

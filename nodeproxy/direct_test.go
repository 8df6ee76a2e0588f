package nodeproxy

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

// directEvent is the opening of a connection.
func directEvent(id uint64) workload.DirectConnection {
	return workload.DirectConnection{
		ID: id, Source: "web", Workload: "/cg/web", Destination: "api", Instance: "api-1", PID: 9, Comm: "curl", Opened: time.Now().Add(-time.Minute),
		Client: netip.MustParseAddrPort("10.0.0.1:4000"), Dialled: netip.MustParseAddrPort("240.0.0.1:80"), Peer: netip.MustParseAddrPort("10.0.0.2:8080"),
	}
}

func TestADirectConnectionIsToldLikeAnyOther(t *testing.T) {
	m := newMesh(t)
	m.publish()
	d := directEvent(77)
	m.proxy.Direct(d)
	opened := m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))
	if list := m.proxy.Connections(); len(list) != 1 || list[0].ID != opened.ID || list[0].Path != admin.PathDirect {
		t.Errorf("open connections: %+v", list)
	}
	d.Stage, d.Sent, d.Received, d.RTT = workload.DirectClosed, 3, 4, time.Millisecond
	m.proxy.Direct(d)
	closed := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	if closed.ID != opened.ID || closed.Path != admin.PathDirect || closed.Verdict != admin.Allowed || closed.Sent != 3 || closed.Received != 4 ||
		closed.RTT != time.Millisecond || closed.Duration < time.Minute || closed.Source.Service != "web" || closed.Source.Workload != "/cg/web" ||
		closed.Destination.Peer != "10.0.0.2:8080" || closed.Sequence == 0 {
		t.Errorf("closed as %+v", closed)
	}
	if list := m.proxy.Connections(); len(list) != 0 {
		t.Errorf("after the close there are %+v", list)
	}
}

func TestADenyCondemnsDirectConnectionsBeforeTheKernelEndsThem(t *testing.T) {
	m := newMesh(t)
	m.publish()
	d := directEvent(78)
	m.proxy.Direct(d)
	m.events.wait(t, "open", is(admin.EventOpen, admin.Outbound))
	m.rule(policy.Deny)
	generation := m.publish()
	m.kernel.mu.Lock()
	revoked := slices.Contains(m.kernel.revoked, generation)
	m.kernel.mu.Unlock()
	if !revoked {
		t.Errorf("the kernel was not told to revoke what generation %d denies", generation)
	}
	ended := directEvent(81) // by itself, though that is told after the policy has changed
	m.proxy.Direct(ended)
	ended.Stage = workload.DirectClosed
	m.proxy.Direct(ended)
	if c := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound)); c.Verdict != admin.Allowed {
		t.Errorf("a connection that was not cut is closed as %+v", c)
	}
	late := directEvent(79) // told only now, and admitted before
	m.proxy.Direct(late)
	for _, d := range []workload.DirectConnection{d, late} {
		d.Stage, d.Cut = workload.DirectClosed, true
		m.proxy.Direct(d)
	}
	for _, c := range m.events.waitN(t, "close", 3, is(admin.EventClose, admin.Outbound))[1:] {
		if c.Verdict != admin.Denied || c.Reason != catalog.ReasonIntention {
			t.Errorf("it is closed as %+v", c)
		}
	}
}

func TestADirectConnectionThatFailedIsADenial(t *testing.T) {
	m := newMesh(t)
	m.publish()
	d := directEvent(80)
	d.Stage, d.Reason = workload.DirectFailed, catalog.ReasonGrantMismatch
	m.proxy.Direct(d)
	c := m.events.wait(t, "denial", is(admin.EventDenied, admin.Outbound))
	if c.Reason != catalog.ReasonGrantMismatch || c.Path != admin.PathDirect || c.Verdict != admin.Denied {
		t.Errorf("it is told as %+v", c)
	}
}

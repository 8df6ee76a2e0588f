package nodeproxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/nodeproxy/workload"
)

// ServeInbound implements workload.Handler: it delivers the connections of Connect peers to local instances.
func (p *Proxy) ServeInbound(ns *workload.Namespace, ln *net.TCPListener) {
	p.accept(ln, func(conn *net.TCPConn) {
		if p.cfg.Kernel.Probed(conn) { // that we accepted is all that it wants to know
			_ = conn.Close()
			return
		}
		c := p.begin(admin.Inbound, conn)
		in, err := p.admitInbound(c, ns, conn)
		p.run(c, err, in.serve)
	})
	p.tunnels.retireNamespace(ns.Cookie)
}

// inbound is one connection of a Connect peer.
type inbound struct {
	*Proxy
	c      *connection
	conn   *net.TCPConn
	ns     *workload.Namespace
	client netip.AddrPort // what the application sees as its peer
	at     netip.AddrPort // what the peer dialled
	served *workload.Served

	handshake      *handshake
	connectionDone func() // gives a place back
}

// admitInbound finds out which instance conn is for, by its local address, and takes a place among the handshakes in
// progress. It does not block.
func (p *Proxy) admitInbound(c *connection, ns *workload.Namespace, conn *net.TCPConn) (*inbound, error) {
	in := &inbound{Proxy: p, c: c, conn: conn, ns: ns, client: addrPort(conn.RemoteAddr()), at: addrPort(conn.LocalAddr())}
	in.describe(nil)
	served, err := p.cfg.Kernel.Served(ns, in.at)
	if err != nil {
		return nil, withReason(err, catalog.ReasonUnknownService)
	}
	in.served = served
	in.describe(served)
	if err := in.takePlace(); err != nil {
		return nil, err
	}
	if in.handshake, err = p.handshakes.begin(c, conn, p.cfg.Limits.handshakeSlots(served.Instance, in.client.Addr())); err != nil {
		return nil, err
	}
	c.onEnd(in.handshake.end)
	return in, nil
}

// describe notes both ends of in's connection; served is nil while it is not known.
func (in *inbound) describe(served *workload.Served) {
	in.c.describe(func(about *admin.Connection) {
		about.Source.Address, about.Destination.Address = in.client.String(), in.at.String()
		if served == nil {
			return
		}
		about.Destination.Service, about.Destination.Instance = served.Service, served.Instance
		if len(served.Workloads) == 1 {
			about.Destination.Workload = served.Workloads[0].Cgroup
		}
	})
}

// takePlace takes a place among all connections of the node.
func (in *inbound) takePlace() (err error) {
	if in.connectionDone, err = in.slots.take(slot{everyConnection, in.cfg.Limits.Connections}); err == nil {
		in.c.onEnd(in.connectionDone)
	}
	return err
}

func addrPort(addr net.Addr) netip.AddrPort {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := tcp.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// serve keeps the order of a Connect server: handshake, identity, intention, limits, and only then the application.
func (in *inbound) serve() (*carrying, error) {
	now := in.gate.current()
	if now == nil {
		return nil, notReady()
	}
	peer, err := in.authenticate(now)
	if err != nil {
		return nil, err
	}
	if l, ok := peer.(*link); ok {
		return in.serveTunnel(l, now.trust), nil
	}
	in.handshake.end()
	if err := in.authorize(in.c); err != nil {
		return nil, err
	}
	if err := in.reserve(now); err != nil {
		return nil, err
	}
	application, err := in.deliver()
	if err != nil {
		return nil, err
	}
	if err := in.open(in.c); err != nil {
		return nil, err
	}
	return in.carry(in.c, application, peer), nil
}

// authenticate does the handshake and notes who the peer is. When it fails the connection is closed in order and not reset, so
// that the TLS alert, which says why, arrives.
func (in *inbound) authenticate(now *state) (leg, error) {
	begin := time.Now()
	deadline := begin.Add(in.cfg.Limits.Handshake)
	w, err := newWire(in.conn, in.buffers)
	if err != nil {
		return nil, err
	}
	if err := in.conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("set the deadline of the handshake: %w", err)
	}
	protocol := ""
	if in.cfg.Tunnels {
		protocol = tunnel.ALPN
	}
	peer, err := in.answer(now, w, protocol, deadline)
	took := time.Since(begin)
	in.c.describe(func(about *admin.Connection) { about.Handshake = took })
	if err != nil {
		if catalog.ReasonOf(err, "") != catalog.ReasonNoCertificate {
			_ = in.conn.Close()
		}
		return nil, err
	}
	if err := in.conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if protocol != "" && peer.Protocol == protocol {
		l := newLink(w, peer, true)
		l.handshake = took
		return l, nil
	}
	in.c.identify(peer.Peer.Identity, in.served.Service)
	return w.leg(peer), nil
}

// answer does the TLS handshake. Its costly part waits for a turn.
func (in *inbound) answer(now *state, w *wire, protocol string, deadline time.Time) (*mtls.Secured, error) {
	ctx, cancel := context.WithDeadline(in.c.ctx, deadline)
	defer cancel()
	done := func() {}
	defer func() { done() }()
	return now.credentials.Accept(w, in.served.Service, protocol, func() (err error) {
		in.handshake.reach(heard)
		done, err = in.answers.take(ctx, in.served.Instance, in.client.Addr())
		w.first = func() { in.handshake.reach(answered); done() }
		return err
	})
}

// reserve takes the places of an authorised connection.
func (in *inbound) reserve(now *state) error {
	maxInbound := 0
	if svc := now.snap.Services[in.served.Service]; svc != nil {
		maxInbound = svc.MaxInbound
	}
	source, _, _ := in.c.pair()
	release, err := in.slots.take(in.cfg.Limits.inboundSlots(in.served.Instance, source.String(), maxInbound)...)
	if err != nil {
		return err
	}
	in.c.onEnd(release)
	return nil
}

// deliver connects to the application.
func (in *inbound) deliver() (*plainLeg, error) {
	ctx, cancel := context.WithTimeout(in.c.ctx, in.cfg.Limits.Connect)
	defer cancel()
	conn, err := in.cfg.Kernel.Deliver(ctx, in.served, in.client)
	if err != nil {
		return nil, withReason(fmt.Errorf("deliver to instance %q: %w", in.served.Instance, err), catalog.ReasonDeliveryFailed)
	}
	if err := in.c.hold(conn); err != nil {
		return nil, err
	}
	in.c.describe(func(about *admin.Connection) { about.Destination.Peer = conn.RemoteAddr().String() })
	return newPlainLeg(conn, in.buffers) // without keep-alive: the kernel itself tells when the other end is gone
}

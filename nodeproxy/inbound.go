package nodeproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
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
}

// inbound is one connection of a Connect peer.
type inbound struct {
	*Proxy
	c         *connection
	conn      *net.TCPConn
	client    netip.AddrPort
	served    *workload.Served
	handshake *handshake
}

// admitInbound finds out which instance conn is for, by its local address, and takes a place among the handshakes in
// progress. It does not block.
func (p *Proxy) admitInbound(c *connection, ns *workload.Namespace, conn *net.TCPConn) (*inbound, error) {
	client, at := addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr())
	c.describe(func(about *admin.Connection) {
		about.Source.Address, about.Destination.Address = client.String(), at.String()
	})
	served, err := p.cfg.Kernel.Served(ns, at)
	if err != nil {
		return nil, withReason(err, catalog.ReasonUnknownService)
	}
	c.describe(func(about *admin.Connection) {
		about.Destination.Service, about.Destination.Instance = served.Service, served.Instance
		if len(served.Workloads) == 1 {
			about.Destination.Workload = served.Workloads[0].Cgroup
		}
	})
	whole, err := p.slots.take(slot{everyConnection, p.cfg.Limits.Connections})
	if err != nil {
		return nil, err
	}
	c.onEnd(whole)
	handshake, err := p.handshakes.begin(c, conn, p.cfg.Limits.handshakeSlots(served.Instance, client.Addr()))
	if err != nil {
		return nil, err
	}
	c.onEnd(handshake.end)
	return &inbound{Proxy: p, c: c, conn: conn, client: client, served: served, handshake: handshake}, nil
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
func (in *inbound) serve() error {
	now := in.gate.current()
	if now == nil {
		return notReady()
	}
	peer, err := in.authenticate(now)
	if err != nil {
		return err
	}
	in.handshake.end()
	if err := in.authorize(in.c); err != nil {
		return err
	}
	if err := in.reserve(now); err != nil {
		return err
	}
	application, err := in.deliver()
	if err != nil {
		return err
	}
	if err := in.open(in.c); err != nil {
		return err
	}
	return in.relay(in.c, application, peer)
}

// authenticate does the handshake and notes who the peer is. When it fails the connection is closed in order and not reset, so
// that the TLS alert, which says why, arrives.
func (in *inbound) authenticate(now *state) (*secureLeg, error) {
	begin := time.Now()
	deadline := begin.Add(in.cfg.Limits.Handshake)
	w, err := newWire(in.conn, in.buffers)
	if err != nil {
		return nil, err
	}
	if err := in.conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("set the deadline of the handshake: %w", err)
	}
	ctx, cancel := context.WithDeadline(in.c.ctx, deadline)
	defer cancel()
	done := func() {}
	defer func() { done() }()
	secure, source, err := now.credentials.Accept(w, in.served.Service, func() (err error) {
		in.handshake.reach(heard)
		done, err = in.turns.take(ctx, answerTurn(in.client.Addr()))
		w.first = func() { in.handshake.reach(answered); done() }
		return err
	})
	in.c.describe(func(about *admin.Connection) { about.Handshake = time.Since(begin) })
	if err != nil {
		if catalog.ReasonOf(err, "") != catalog.ReasonNoCertificate {
			_ = in.conn.Close()
		}
		return nil, err
	}
	in.c.identify(source, in.served.Service)
	return newSecureLeg(secure, w), errors.Join(tune(in.conn), in.conn.SetDeadline(time.Time{}))
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
	return in.applicationLeg(conn)
}

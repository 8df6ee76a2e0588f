package nodeproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// ServeOutbound implements workload.Handler: it carries the connections of applications to other services.
func (p *Proxy) ServeOutbound(ns *workload.Namespace, ln *net.TCPListener) {
	p.accept(ln, func(app *net.TCPConn) {
		c := p.begin(admin.Outbound, app)
		origin, err := p.admitOutbound(c, ns, app)
		p.run(c, err, func() error { return p.serveOutbound(c, origin, app) })
	})
	p.tunnels.retireNamespace(ns.Cookie)
}

// admitOutbound finds out whose connection app is, and takes its places. It does not block.
func (p *Proxy) admitOutbound(c *connection, ns *workload.Namespace, app *net.TCPConn) (*workload.Origin, error) {
	c.describe(func(about *admin.Connection) { about.Source.Address = app.RemoteAddr().String() })
	origin, err := p.cfg.Kernel.Origin(ns, app)
	if err != nil {
		return nil, withReason(err, catalog.ReasonUnknownOrigin)
	}
	c.describe(func(about *admin.Connection) {
		about.Source = admin.Endpoint{
			Service: origin.Workload.Service, Address: origin.Client.String(),
			Workload: origin.Workload.Cgroup, PID: origin.PID, Comm: origin.Comm,
		}
		about.Destination.Address = origin.Destination.String()
	})
	release, err := p.slots.take(p.cfg.Limits.outboundSlots(origin.Workload.ID)...)
	if err != nil {
		return nil, err
	}
	c.onEnd(release)
	return origin, nil
}

func (p *Proxy) serveOutbound(c *connection, origin *workload.Origin, app *net.TCPConn) error {
	now := p.gate.current()
	if now == nil {
		return notReady()
	}
	to, ok := now.snap.Resolve(origin.Destination)
	if !ok && slices.Contains(now.snap.Canaries(), origin.Destination.Addr()) {
		return refuse(catalog.ReasonUnknownService, "a canary of \"nodeproxy check\" has come this far: nothing is wrong")
	}
	if !ok {
		return refuse(catalog.ReasonUnknownService, "find the service of %s: it is neither a virtual IP nor the address of an instance", origin.Destination)
	}
	c.identify(now.snap.Identity(origin.Workload.Service), to.Service.Name)
	if err := p.authorize(c); err != nil {
		return err
	}
	application, err := p.applicationLeg(app)
	if err != nil {
		return err
	}
	d := dialer{Proxy: p, c: c, state: now, origin: origin, to: to, application: application}
	peer, err := d.connect()
	if err != nil {
		application.release()
		return err
	}
	if err := p.open(c); err != nil {
		application.release()
		return err
	}
	err = p.relay(c, application, peer)
	d.ended(peer, err)
	return err
}

// applicationLeg makes a leg of a connection to an application of this node.
func (p *Proxy) applicationLeg(conn net.Conn) (*plainLeg, error) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		if err := tune(tcp); err != nil {
			return nil, fmt.Errorf("set the options of the application's socket: %w", err)
		}
	}
	return newPlainLeg(conn, p.buffers)
}

// dialer finds a peer for one outbound connection.
type dialer struct {
	*Proxy
	c           *connection
	state       *state
	origin      *workload.Origin
	to          catalog.Destination
	application *plainLeg
	inst        *catalog.Instance // the last that was tried
}

// connect tries one instance after the other until a handshake succeeds: nothing of the application has been passed on
// yet. An instance that the application dialled by its own address is the only one tried. After two connect timeouts no
// further attempt is begun.
func (d *dialer) connect() (leg, error) {
	if _, err := d.state.credentials.Leaf(d.origin.Workload.Service); err != nil {
		return nil, err
	}
	timeout := cmp.Or(d.to.Service.ConnectTimeout, d.cfg.Limits.Connect)
	begin := time.Now()
	var tried []*catalog.Instance
	var errs []error
	for time.Since(begin) < 2*timeout {
		inst, done := d.choose(tried)
		if inst == nil {
			break
		}
		tried, d.inst = append(tried, inst), inst
		peer, err := d.dial(inst, timeout)
		if err == nil {
			d.balancer.succeeded(inst)
			d.c.onEnd(done)
			return peer, nil
		}
		done()
		if d.c.ctx.Err() != nil || isOurs(err) || isFinal(err) {
			return nil, err
		}
		if backoff := d.balancer.failed(inst, err); backoff > 0 {
			d.cfg.Log.Warn("eject an instance", "service", inst.Service, "instance", inst.ID, "node", inst.Node, "for", backoff, "error", err)
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, refuse(catalog.ReasonNoInstance, "find an instance of %q: none of its %d is healthy and speaks mTLS", d.to.Service.Name, len(d.to.Service.Instances))
	}
	return nil, &catalog.Refusal{Reason: catalog.ReasonOf(errs[len(errs)-1], catalog.ReasonConnectFailed), Err: errors.Join(errs...)}
}

func (d *dialer) choose(tried []*catalog.Instance) (inst *catalog.Instance, done func()) {
	if d.to.Instance == nil {
		return d.balancer.pick(d.to.Service.Instances, tried)
	}
	if len(tried) > 0 || !d.to.Instance.Mesh.IsValid() {
		return nil, nil
	}
	return d.to.Instance, d.balancer.only(d.to.Instance)
}

// dial makes a leg to inst: a stream of a tunnel, or a connection of its own.
func (d *dialer) dial(inst *catalog.Instance, timeout time.Duration) (leg, error) {
	if d.cfg.Tunnels && d.tunnels.speaks(inst) {
		return d.openStream(inst, timeout)
	}
	return d.dialMesh(meshDial{Proxy: d.Proxy, state: d.state, origin: d.origin, inst: inst}, timeout)
}

// dialMesh is m.dial for d's connection.
func (d *dialer) dialMesh(m meshDial, timeout time.Duration) (leg, error) {
	ctx, cancel := context.WithTimeout(d.c.ctx, timeout)
	defer cancel()
	peer, handshake, err := m.dial(ctx, d.c.hold)
	d.c.describe(func(about *admin.Connection) { about.Handshake = handshake })
	if err == nil {
		d.leadsTo(m.inst)
	}
	return peer, err
}

// leadsTo notes whom d's connection goes to.
func (d *dialer) leadsTo(inst *catalog.Instance) {
	d.c.describe(func(about *admin.Connection) {
		about.Destination.Instance, about.Destination.Peer = inst.ID, inst.Mesh.String()
		about.Destination.Identity = d.state.snap.Identity(inst.Service).String()
	})
}

// meshDial is a connection to inst that is to be made from the caller's namespace, with an ALPN or "".
type meshDial struct {
	*Proxy
	state    *state
	origin   *workload.Origin
	inst     *catalog.Instance
	protocol string
}

// dial connects, until ctx ends, and does the handshake. hold gets the connection before it; the leg is a *link if the
// other side took the protocol, else a *secureLeg. How long the handshake took is returned with an error too.
func (m *meshDial) dial(ctx context.Context, hold func(net.Conn) error) (leg, time.Duration, error) {
	conn, err := m.cfg.Kernel.Dial(ctx, m.origin.Namespace, m.inst.Mesh)
	if err != nil {
		return nil, 0, withReason(fmt.Errorf("dial instance %q at %s: %w", m.inst.ID, m.inst.Mesh, err), catalog.ReasonConnectFailed)
	}
	if err := hold(conn); err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	peer, err := m.secure(conn, begin)
	if err != nil {
		_ = conn.Close()
	}
	return peer, time.Since(begin), err
}

func (m *meshDial) secure(conn *net.TCPConn, begin time.Time) (leg, error) {
	w, err := newWire(conn, m.buffers)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(tune(conn), conn.SetDeadline(begin.Add(m.cfg.Limits.Handshake))); err != nil {
		return nil, err
	}
	secure, peer, err := m.state.credentials.Connect(w, m.origin.Workload.Service, m.inst.Service, m.protocol)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if m.protocol != "" && secure.ConnectionState().NegotiatedProtocol == m.protocol {
		return newLink(secure, w, peer, false), nil
	}
	return newSecureLeg(secure, w), nil
}

// isOurs says whether a dial failed because of this node and not because of the instance: another would fail as well.
func isOurs(err error) bool {
	if isFarRefusal(err) {
		return false
	}
	switch catalog.ReasonOf(err, catalog.ReasonConnectFailed) {
	case catalog.ReasonConnectFailed, catalog.ReasonHandshakeFailed, catalog.ReasonPeerIdentity:
	default:
		return true
	}
	for _, errno := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.EPERM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func notReady() error {
	return refuse(catalog.ReasonNotReady, "serve the connection: the source has delivered no snapshot yet: see the source in nodeproxy status")
}

func refuse(reason catalog.Reason, format string, args ...any) error {
	return &catalog.Refusal{Reason: reason, Err: fmt.Errorf(format, args...)}
}

// withReason gives err the reason it has, or else fallback, with its whole text.
func withReason(err error, fallback catalog.Reason) error {
	return &catalog.Refusal{Reason: catalog.ReasonOf(err, fallback), Err: err}
}

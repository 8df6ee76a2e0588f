package nodeproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/workload"
)

// ServeOutbound implements workload.Handler: it carries the connections of applications to other services.
func (p *Proxy) ServeOutbound(ns *workload.Namespace, ln *net.TCPListener) {
	p.accept(ln, func(app *net.TCPConn) {
		c := p.begin(admin.Outbound, app)
		c.describe(func(about *admin.Connection) { about.Source.Address = app.RemoteAddr().String() })
		origin, err := p.cfg.Kernel.Origin(ns, app)
		origin, err = p.admitOutbound(c, origin, err)
		p.run(c, err, func() (*carrying, error) { return p.serveOutbound(c, origin, app) })
	})
	p.tunnels.retireNamespace(ns.Cookie)
}

// ServeUpstream implements workload.Handler: it carries the connections of applications to a unix socket.
func (p *Proxy) ServeUpstream(ln *net.UnixListener, origin func(*net.UnixConn) (*workload.Origin, error)) {
	acceptAll(p, ln.Addr(), ln.AcceptUnix, func(app *net.UnixConn) {
		c := p.begin(admin.Outbound, app)
		origin, err := origin(app)
		origin, err = p.admitOutbound(c, origin, err)
		p.run(c, err, func() (*carrying, error) { return p.serveOutbound(c, origin, app) })
	})
}

// admitOutbound takes the places of a connection of origin, if it is known whose it is. It does not block.
func (p *Proxy) admitOutbound(c *connection, origin *workload.Origin, err error) (*workload.Origin, error) {
	if err != nil {
		return nil, withReason(err, catalog.ReasonUnknownOrigin)
	}
	c.describe(func(about *admin.Connection) {
		about.Source = admin.Endpoint{
			Service: origin.Workload.Service, Address: origin.Client.String(),
			Workload: origin.Workload.Cgroup, PID: origin.PID, Comm: origin.Comm,
		}
		about.Destination.Address = cmp.Or(origin.Socket, origin.Destination.String())
	})
	release, err := p.slots.take(p.cfg.Limits.outboundSlots(origin.Workload.ID)...)
	if err != nil {
		return nil, err
	}
	c.onEnd(release)
	return origin, nil
}

func (p *Proxy) serveOutbound(c *connection, origin *workload.Origin, app net.Conn) (*carrying, error) {
	now := p.gate.current()
	if now == nil {
		return nil, notReady()
	}
	to, ok := now.snap.UpstreamSocket(origin.Instances, origin.Socket)
	if origin.Socket != "" && !ok {
		return nil, refuse(catalog.ReasonUnknownService, "find the service of %s: it is no upstream any more", origin.Socket)
	}
	if !ok {
		to, ok = now.snap.Upstream(origin.Instances, origin.Destination)
	}
	if !ok {
		to, ok = now.snap.Resolve(origin.Destination)
	}
	if !ok && slices.Contains(now.snap.Canaries(), origin.Destination.Addr()) {
		return nil, refuse(catalog.ReasonUnknownService, "a canary of \"nodeproxy check\" has come this far: nothing is wrong")
	}
	if !ok {
		return nil, refuse(catalog.ReasonUnknownService, "find the service of %s: it is neither a virtual IP nor the address of an instance", origin.Destination)
	}
	d := newDialer(p, c, now, origin, to)
	if err := d.aim(d.route.Preferred()); err != nil {
		return nil, err
	}
	if err := d.reserve(); err != nil {
		return nil, err
	}
	application, err := newPlainLeg(app, p.buffers)
	if err != nil {
		return nil, err
	}
	d.application = application
	peer, err := d.connect()
	if err != nil {
		application.release()
		return nil, err
	}
	if err := p.open(c); err != nil {
		application.release()
		return nil, err
	}
	carries := p.carry(c, application, peer)
	if l, ok := peer.(*link); ok {
		end := carries.ended
		carries.ended = func(err error) error {
			err = end(err)
			d.ended(l, err)
			return err
		}
	}
	return carries, nil
}

// dialer finds a peer for one outbound connection.
type dialer struct {
	*Proxy
	c      *connection
	state  *state
	origin *workload.Origin
	to     catalog.Destination
	route  *catalog.Route
	config catalog.CallConfig
	call   call
	target *catalog.Target   // whose intention was evaluated last
	inst   *catalog.Instance // of target, the last that was tried

	application *plainLeg
}

func newDialer(p *Proxy, c *connection, now *state, origin *workload.Origin, to catalog.Destination) *dialer {
	caller := origin.Workload.Service
	d := &dialer{Proxy: p, c: c, state: now, origin: origin, to: to, route: now.snap.RouteOf(caller, to), config: now.snap.Call(caller, to)}
	d.call = call{balance: d.route.Balance, source: origin.Client.Addr(), ejection: d.config.Ejection}
	if d.call.ejection != nil {
		d.call.caller = caller
	}
	return d
}

// aim makes target the one whose intention and identity count: those of what was dialled never do. Of a peer's service the
// intentions are not known here: they are the other side's to keep.
func (d *dialer) aim(target *catalog.Target) error {
	d.target = target
	decided := target.Service
	if target.Peered != nil {
		decided = "" // by the peer
	}
	d.c.identify(d.state.snap.Identity(d.origin.Workload.Service), decided)
	d.c.describe(func(about *admin.Connection) {
		about.Destination.Service, about.Destination.Target = d.to.Name(), target.String()
		if about.Destination.Target == about.Destination.Service {
			about.Destination.Target = ""
		}
	})
	if target.Peered != nil {
		return nil
	}
	return d.authorize(d.c)
}

// reserve takes a place among the connections that the workload may have to what it calls.
func (d *dialer) reserve() error {
	if d.config.MaxConnections == 0 {
		return nil
	}
	key := slotKey{what: "UpstreamConfig Limits.MaxConnections", workload: d.origin.Workload.ID, upstream: d.to.Name()}
	release, err := d.slots.take(slot{key, d.config.MaxConnections})
	if err != nil {
		return err
	}
	d.c.onEnd(release)
	return nil
}

// The pauses before all instances are tried again, because one of them has reset the connection or left the handshake
// unanswered: it is busy, or its proxy is being restarted.
var busyPauses = []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}

// connect tries one instance after the other until a handshake succeeds, those of the next target when none is left in
// one: nothing of the application has been passed on yet. After two connect timeouts no further attempt is begun.
func (d *dialer) connect() (leg, error) {
	if _, err := d.state.credentials.Leaf(d.origin.Workload.Service); err != nil {
		return nil, err
	}
	begin := time.Now()
	var tried []*catalog.Instance
	var errs []error
	for pauses := busyPauses; d.target == nil || time.Since(begin) < 2*d.timeout(); {
		target, inst, done := d.choose(tried)
		if inst == nil && len(pauses) > 0 && slices.ContainsFunc(errs, isBusy) {
			d.pause(pauses[0])
			pauses, tried, errs = pauses[1:], nil, nil
			continue
		}
		if inst == nil {
			break
		}
		tried, d.inst = append(tried, inst), inst
		peer, err := d.attempt(target, inst)
		if err == nil {
			d.balancer.succeeded(inst, d.call)
			d.c.onEnd(done)
			return peer, nil
		}
		done()
		if errors.Is(err, errEnding) { // it is dialled if there is no other
			tried = tried[:len(tried)-1]
			continue
		}
		if d.c.ctx.Err() != nil || isOurs(err) || isFinal(err) {
			return nil, err
		}
		errs = append(errs, err)
		if isFull(err) {
			continue // it answers
		}
		if backoff := d.balancer.failed(inst, target.Instances, d.call, err); backoff > 0 {
			d.cfg.Log.Warn("eject an instance", "service", inst.Service, "instance", inst.ID, "node", inst.Node, "for", backoff, "error", err)
		}
	}
	if len(errs) == 0 {
		return nil, refuse(catalog.ReasonNoInstance, "find an instance of %q: %s", d.to.Name(), strings.Join(whyUnusable(d.route), "; "))
	}
	return nil, &catalog.Refusal{Reason: catalog.ReasonOf(errs[len(errs)-1], catalog.ReasonConnectFailed), Err: errors.Join(errs...)}
}

// whyUnusable says of each target why nothing can be dialled there.
func whyUnusable(route *catalog.Route) []string {
	var why []string
	for _, t := range route.Targets {
		switch {
		case t.Unreachable != "":
			why = append(why, t.Unreachable)
		case !t.Usable():
			if t.Gateway.Through() {
				why = append(why, fmt.Sprintf("%s has no healthy instance, or none of the %d mesh gateways on the way (mode %q) is healthy", t, len(t.Instances), t.Gateway))
				continue
			}
			why = append(why, fmt.Sprintf("none of the %d instances of %s is healthy and speaks mTLS", len(t.Instances), t))
		}
	}
	return why
}

func (d *dialer) timeout() time.Duration {
	return cmp.Or(d.config.ConnectTimeout, d.target.ConnectTimeout, d.cfg.Limits.Connect)
}

// choose is the next instance to try. One that the application dialled by its own address is the only one, whatever its
// health.
func (d *dialer) choose(tried []*catalog.Instance) (target *catalog.Target, inst *catalog.Instance, done func()) {
	if d.to.Instance == nil {
		return d.balancer.pick(d.route.Targets, tried, d.call)
	}
	if len(tried) > 0 || !d.to.Instance.Mesh.IsValid() {
		return nil, nil, nil
	}
	return d.route.Targets[0], d.to.Instance, d.balancer.only(d.to.Instance)
}

// attempt connects to inst, an instance of target, if the intention allows that.
func (d *dialer) attempt(target *catalog.Target, inst *catalog.Instance) (leg, error) {
	if target != d.target {
		if err := d.aim(target); err != nil {
			return nil, err
		}
	}
	return d.dial(inst)
}

// dial makes a leg to inst: a stream of a tunnel, or a connection of its own.
func (d *dialer) dial(inst *catalog.Instance) (leg, error) {
	if d.cfg.Tunnels && d.tunnels.speaks(d.state.snap, inst) {
		return d.openStream(inst)
	}
	return d.dialMesh(d.meshDial(inst, ""))
}

func (d *dialer) meshDial(inst *catalog.Instance, protocol string) meshDial {
	return meshDial{Proxy: d.Proxy, state: d.state, origin: d.origin, target: d.target, inst: inst, timeout: d.timeout(), protocol: protocol}
}

// dialMesh is m.dial for d's connection.
func (d *dialer) dialMesh(m meshDial) (leg, error) {
	peer, handshake, err := m.dial(d.c.ctx, d.c.hold)
	d.c.describe(func(about *admin.Connection) { about.Handshake = handshake })
	if err == nil {
		d.leadsTo(m.inst)
	}
	return peer, err
}

// leadsTo notes whom d's connection goes to.
func (d *dialer) leadsTo(inst *catalog.Instance) {
	d.c.describe(func(about *admin.Connection) {
		about.Destination.Instance, about.Destination.Gateway, about.Destination.Peer = inst.ID, "", inst.Mesh.String()
		if inst.Gateway { // which instance is behind it is not known
			about.Destination.Instance, about.Destination.Gateway = "", inst.ID
		}
		about.Destination.Identity = d.state.snap.TargetIdentity(d.target).String()
	})
}

// meshDial is a connection to inst, an instance of target, that is to be made from the caller's namespace, with an ALPN or "".
type meshDial struct {
	*Proxy
	state    *state
	origin   *workload.Origin
	target   *catalog.Target
	inst     *catalog.Instance
	timeout  time.Duration // for a turn, and to connect
	protocol string
}

// dial connects and does the handshake, when it is this connection's turn and until ctx ends. hold gets the connection
// before it; the leg is a *link if the other side took the protocol, else another. errNoTunnels means that it is known
// by now that it would not. How long the handshake took is returned with an error too.
func (m *meshDial) dial(ctx context.Context, hold func(net.Conn) error) (leg, time.Duration, error) {
	done, err := m.wait(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	if m.protocol != "" && !m.tunnels.speaks(m.state.snap, m.inst) { // another connection's turn has shown it
		return nil, 0, errNoTunnels
	}
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	conn, err := m.cfg.Kernel.Dial(ctx, m.origin.Namespace, m.inst.Mesh)
	if err != nil {
		return nil, 0, withReason(fmt.Errorf("dial instance %q at %s: %w", m.inst.ID, m.inst.Mesh, err), catalog.ReasonConnectFailed)
	}
	if err := hold(conn); err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	peer, err := m.secure(conn, begin)
	if _, tunnels := peer.(*link); m.protocol != "" && (peer != nil && !tunnels || mtls.NoSuchProtocol(err)) {
		m.tunnels.isPlain(m.inst.Mesh)
	}
	if err != nil {
		_ = conn.Close()
	}
	return peer, time.Since(begin), err
}

// wait waits for a turn to do a handshake with inst, as long as for a connection.
func (m *meshDial) wait(ctx context.Context) (done func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, fmt.Errorf("no turn within %s", m.timeout))
	defer cancel()
	return m.turns.take(ctx, m.cfg.Limits.dialTurns(m.origin.Workload.ID, m.inst.Node+"/"+m.inst.ID)...)
}

func (m *meshDial) secure(conn *net.TCPConn, begin time.Time) (leg, error) {
	w, err := newWire(conn, m.buffers)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(conn.SetKeepAliveConfig(keepAlive), conn.SetDeadline(begin.Add(m.cfg.Limits.Handshake))); err != nil {
		return nil, err
	}
	peer, err := m.state.credentials.Connect(w, m.origin.Workload.Service, m.target, m.protocol)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if m.protocol != "" && peer.Protocol == m.protocol {
		l := newLink(w, peer, false)
		l.ending = func() { m.ends.hear(m.inst) }
		return l, nil
	}
	return w.leg(peer), nil
}

// pause waits, or until the connection is cut off.
func (d *dialer) pause(pause time.Duration) {
	select {
	case <-time.After(pause):
	case <-d.c.ctx.Done():
	}
}

// isBusy says whether a peer ended the connection before or during the handshake without saying why, or did not answer.
func isBusy(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded)
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

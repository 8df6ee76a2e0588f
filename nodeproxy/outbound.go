package nodeproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
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
	d := dialer{Proxy: p, c: c, state: now, origin: origin, to: to}
	peer, err := d.connect()
	if err != nil {
		return err
	}
	if err := p.open(c); err != nil {
		return err
	}
	return p.relay(c, application, peer)
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
	c      *connection
	state  *state
	origin *workload.Origin
	to     catalog.Destination
}

// The pauses before all instances are tried again, because one of them has reset the connection or left the handshake
// unanswered: it is busy, or its proxy is being restarted.
var busyPauses = []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}

// connect tries one instance after the other until a handshake succeeds: nothing of the application has been passed on
// yet. An instance that the application dialled by its own address is the only one tried. After two connect timeouts no
// further attempt is begun.
func (d *dialer) connect() (*secureLeg, error) {
	if _, err := d.state.credentials.Leaf(d.origin.Workload.Service); err != nil {
		return nil, err
	}
	timeout := cmp.Or(d.to.Service.ConnectTimeout, d.cfg.Limits.Connect)
	begin := time.Now()
	var tried []*catalog.Instance
	var errs []error
	for pauses := busyPauses; time.Since(begin) < 2*timeout; {
		inst, done := d.choose(tried)
		if inst == nil && len(pauses) > 0 && slices.ContainsFunc(errs, isBusy) {
			d.pause(pauses[0])
			pauses, tried, errs = pauses[1:], nil, nil
			continue
		}
		if inst == nil {
			break
		}
		tried = append(tried, inst)
		peer, err := d.dial(inst, timeout)
		if err == nil {
			d.balancer.succeeded(inst)
			d.c.onEnd(done)
			return peer, nil
		}
		done()
		if d.c.ctx.Err() != nil || isOurs(err) {
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

// dial connects to inst from the caller's namespace and does the handshake, when it is this connection's turn.
func (d *dialer) dial(inst *catalog.Instance, timeout time.Duration) (*secureLeg, error) {
	done, err := d.wait(inst, timeout)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(d.c.ctx, timeout)
	defer cancel()
	conn, err := d.cfg.Kernel.Dial(ctx, d.origin.Namespace, inst.Mesh)
	if err != nil {
		return nil, withReason(fmt.Errorf("dial instance %q at %s: %w", inst.ID, inst.Mesh, err), catalog.ReasonConnectFailed)
	}
	if err := d.c.hold(conn); err != nil {
		return nil, err
	}
	peer, err := d.secure(conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	d.c.describe(func(about *admin.Connection) {
		about.Destination.Instance, about.Destination.Peer = inst.ID, inst.Mesh.String()
		about.Destination.Identity = d.state.snap.Identity(inst.Service).String()
	})
	return peer, nil
}

// wait waits for a turn to do a handshake with inst, as long as for a connection.
func (d *dialer) wait(inst *catalog.Instance, timeout time.Duration) (done func(), err error) {
	ctx, cancel := context.WithTimeoutCause(d.c.ctx, timeout, fmt.Errorf("no turn within %s", timeout))
	defer cancel()
	return d.turns.take(ctx, d.cfg.Limits.dialTurns(d.origin.Workload.ID, inst.Node+"/"+inst.ID)...)
}

func (d *dialer) secure(conn *net.TCPConn) (*secureLeg, error) {
	begin := time.Now()
	w, err := newWire(conn, d.buffers)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(tune(conn), conn.SetDeadline(begin.Add(d.cfg.Limits.Handshake))); err != nil {
		return nil, err
	}
	secure, err := d.state.credentials.Connect(w, d.origin.Workload.Service, d.to.Service.Name)
	d.c.describe(func(about *admin.Connection) { about.Handshake = time.Since(begin) })
	if err != nil {
		return nil, err
	}
	return newSecureLeg(secure, w), conn.SetDeadline(time.Time{})
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

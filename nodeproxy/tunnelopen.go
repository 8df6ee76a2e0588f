package nodeproxy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/tunnel"
)

// maxOpenings is how often a stream is asked for at one instance, with the same id.
const maxOpenings = 3

// inDoubt is the end of an opening whose bytes may have reached the application: nothing else may be tried.
type inDoubt struct{ error }

func (e inDoubt) Unwrap() error { return e.error }

// isFinal says whether no other instance may be tried, or need be, after an opening that ended with err.
func isFinal(err error) bool {
	if _, ok := errors.AsType[inDoubt](err); ok {
		return true
	}
	refusal, ok := errors.AsType[*farRefusal](err)
	return ok && refusal.reason == catalog.ReasonIntention
}

// isFarRefusal says whether another node answered, and so is alive.
func isFarRefusal(err error) bool {
	_, ok := errors.AsType[*farRefusal](err)
	return ok
}

// errEnding is an instance of which it has just been heard that it ends.
var errEnding = errors.New("the instance is about to end")

// errNoTunnels is an instance that speaks plain Connect.
var errNoTunnels = errors.New("the instance makes no tunnels")

// isFull says whether another node refused because of its limits: the instance is well, and another may have room.
func isFull(err error) bool {
	refusal, ok := errors.AsType[*farRefusal](err)
	return ok && refusal.reason == catalog.ReasonCapacity
}

// openStream asks inst for a stream over a tunnel that is ready, or a new one. What the application has sent already goes
// with it, and stays with the application's leg until the stream is accepted. Where inst makes no tunnel, the leg is the
// plain Connect connection that came instead of it.
func (d *dialer) openStream(inst *catalog.Instance) (leg, error) {
	timeout := d.timeout()
	begin := time.Now()
	var o tunnel.Opening
	_, _ = rand.Read(o.ID[:]) // it never fails
	doubt := false            // bytes of the application were sent, and not answered
	for attempt := 1; ; attempt++ {
		peer, err := d.tunnelTo(inst, attempt == 1)
		l, isTunnel := peer.(*link)
		if err == nil && !isTunnel {
			if !doubt {
				return peer, nil
			}
			peer.reset()
			err = fmt.Errorf("open a stream at instance %q again: it makes no tunnels any more", inst.ID)
		}
		if err == nil {
			o.Source = d.claim(l)
			first := d.application.first(plainChunk - tunnel.OpeningSize)
			err = d.openOver(l, o, first, time.Now().Add(timeout+d.cfg.Limits.Handshake))
			if err == nil {
				return l, nil
			}
			err = d.openingError(inst, l, err)
			if _, refused := errors.AsType[*catalog.Refusal](err); refused && !doubt || d.c.ctx.Err() != nil {
				return nil, err
			} else if !refused {
				doubt = doubt || first.buf != nil
			}
			// A peer that is slow is not helped by being asked again.
			final := isFarRefusal(err) || errors.Is(err, errDuplicate) || errors.Is(err, os.ErrDeadlineExceeded)
			if attempt < maxOpenings && time.Since(begin) < 2*timeout && !final {
				continue
			}
		}
		if doubt { // what is refused now may be what was sent before
			err = inDoubt{err}
		}
		return nil, withReason(err, catalog.ReasonConnectFailed)
	}
}

// claim is the address that the application calls from. One that has bound its socket to none got loopback by the redirect, and has
// the address of the way to the instance, which is l's.
func (d *dialer) claim(l *link) netip.AddrPort {
	client := d.origin.Client
	if !client.Addr().IsLoopback() {
		return client
	}
	return netip.AddrPortFrom(addrPort(l.conn.LocalAddr()).Addr(), client.Port())
}

// openOver asks for the stream over l.
func (d *dialer) openOver(l *link, o tunnel.Opening, first batch, deadline time.Time) error {
	if err := l.conn.SetDeadline(deadline); err != nil {
		return err
	}
	if err := l.open(o, first); err != nil {
		return err
	}
	if err := l.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if first.buf != nil {
		d.c.sent.Add(uint64(first.size()))
		d.application.release()
	}
	d.c.via(admin.PathTunnel)
	return nil
}

// openingError puts l away after an opening that failed with err. What it returns is a *catalog.Refusal when nothing
// reached the application.
func (d *dialer) openingError(inst *catalog.Instance, l *link, err error) error {
	text := fmt.Errorf("open a stream at instance %q at %s: %w", inst.ID, inst.Mesh, err)
	if refusal, ok := errors.AsType[*farRefusal](err); ok {
		if d.c.letGo(l.conn) {
			d.putBack(l, inst)
		}
		return &catalog.Refusal{Reason: refusal.reason, Err: text}
	}
	l.reset()
	if remote, ok := errors.AsType[*net.OpError](err); ok && remote.Op == "remote error" {
		// With TLS 1.3 the client is told only now that its certificate was refused.
		return &catalog.Refusal{Reason: catalog.ReasonHandshakeFailed, Err: text}
	}
	return text
}

// tunnelTo takes a tunnel to inst that is ready, if it may, or makes one. A peer that makes none is returned as it is.
func (d *dialer) tunnelTo(inst *catalog.Instance, ready bool) (leg, error) {
	key, err := d.tunnelKey(inst)
	if err != nil {
		return nil, err
	}
	ahead := d.meshDial(inst, tunnel.ALPN)
	if ready {
		known := d.ends.has(inst)
		l, ok := d.tunnels.pool.Take(d.c.ctx, key, ahead.ahead)
		if !known && d.ends.has(inst) {
			if ok {
				d.tunnels.pool.Put(key, l)
			}
			return nil, errEnding
		}
		if ok {
			if err := d.c.hold(l.conn); err != nil {
				return nil, err
			}
			d.leadsTo(inst)
			d.c.describe(func(about *admin.Connection) { about.Handshake = l.handshake })
			l.handshake = 0
			return l, nil
		}
	}
	peer, err := d.dialMesh(ahead)
	if mtls.NoSuchProtocol(err) || errors.Is(err, errNoTunnels) {
		return d.dialMesh(d.meshDial(inst, ""))
	}
	return peer, err
}

func (d *dialer) tunnelKey(inst *catalog.Instance) (tunnelKey, error) {
	source := d.origin.Workload.Service
	leaf, err := d.state.credentials.Leaf(source)
	if err != nil {
		return tunnelKey{}, err
	}
	return tunnelKey{
		source: source, workload: d.origin.Workload.ID, namespace: d.origin.Namespace.Cookie, client: d.origin.Client.Addr(),
		leaf: leaf.Leaf, trust: d.state.trust, identity: d.state.snap.TargetIdentity(d.target), to: inst.Mesh,
	}, nil
}

// putBack gives the pool a tunnel whose stream has ended in order, if the other side is ready for another one.
func (d *dialer) putBack(l *link, inst *catalog.Instance) {
	key, err := d.tunnelKey(inst)
	if err != nil || !l.ready() || !l.caughtUp() {
		l.Close()
		return
	}
	d.tunnels.pool.Put(key, l)
}

// ended is to be called when the relay over l has ended with err: a tunnel whose stream ended in order is used again.
func (d *dialer) ended(l *link, err error) {
	if err == nil && d.c.letGo(l.conn) {
		d.putBack(l, d.inst)
	}
}

// ahead makes a tunnel before anybody needs it.
func (m meshDial) ahead(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stop func() bool
	peer, handshake, err := m.dial(ctx, func(conn net.Conn) error {
		stop = context.AfterFunc(ctx, func() { abort(conn) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	l, ok := peer.(*link)
	if !ok {
		peer.close()
		return nil, errNoTunnels
	}
	l.handshake = handshake
	return l, nil
}

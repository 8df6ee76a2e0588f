package nodeproxy

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/tunnel"
)

// noticeTime is how long a peer has to take the last word of a tunnel.
const noticeTime = 100 * time.Millisecond

// lateClose is for how long a destination keeps an idle tunnel after its source should have closed it.
const lateClose = 15 * time.Second

// tunnelEnd is a tunnel that leads to an instance of this node. One goroutine serves one stream after the other, or none while a
// stream rests; retire and resting may be called by any.
type tunnelEnd struct {
	inbound // the connection that became the tunnel
	link    *link
	trust   uint64          // of the state by which the peer was verified
	until   time.Time       // when it is closed without a stream
	over    func(err error) // is called at last

	mu      sync.Mutex
	places  func() // gives back what an idle tunnel takes; nil while there is a stream
	retired bool   // no further stream
}

// serveTunnel is what is left of in, which became a tunnel. Its own connection ends here without a word: every stream is a connection.
func (in *inbound) serveTunnel(l *link, trust uint64) *carrying {
	e := &tunnelEnd{inbound: *in, link: l, trust: trust}
	return &carrying{e.start, func(err error) error { return err }}
}

func (e *tunnelEnd) start(_ *sync.WaitGroup, over func(err error)) {
	e.over = over
	e.tunnels.add(e)
	e.c.silence()
	e.live.remove(e.c)
	again := false
	err := e.protect(func() error {
		again = e.restFirst()
		return nil
	})
	e.serve(again && err == nil)
}

// serve serves streams until e is closed, or one rests: who goes on with that serves the next ones.
func (e *tunnelEnd) serve(again bool) {
	for again {
		var o tunnel.Opening
		woken := false
		err := e.protect(func() (err error) {
			if o, err = e.link.awaitOpening(e.until, e.cfg.Limits.Handshake); err == nil {
				woken = e.wake()
			}
			return err
		})
		if err != nil || !woken {
			break // whoever is opening notices, and does it again
		}
		over := false
		if again, over = e.stream(o); !over {
			return
		}
	}
	e.close()
}

// restFirst is rest of a new tunnel. Where idle ones have no place left it keeps those of a handshake, has no more time than
// one, and gives way like one: a tunnel is always good for the stream that it was made for.
func (e *tunnelEnd) restFirst() bool {
	places, err := e.slots.take(e.cfg.Limits.tunnelSlots(e.served.Instance, e.link.peer.Identity.String())...)
	wait := tunnel.MaxIdleTime + lateClose
	if err != nil {
		wait = e.cfg.Limits.Handshake
		places = e.endHandshake
	} else {
		e.endHandshake()
	}
	return e.restFor(wait, places)
}

func (e *tunnelEnd) endHandshake() {
	e.handshake.end()
	e.connectionDone()
}

// tell has e say that its instance ends, now or after its stream.
func (e *tunnelEnd) tell() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.places != nil {
		_ = e.conn.SetReadDeadline(time.Unix(1, 0)) // of serve, which writes alone
	}
}

// lastWord tells the peer why e closes, if its instance ends.
func (e *tunnelEnd) lastWord() {
	if e.ends.local(e.served.Instance) && e.link.session.Idle() && e.conn.SetWriteDeadline(time.Now().Add(noticeTime)) == nil {
		_ = e.link.control(tunnel.Ending, nil)
	}
}

// rest makes e idle. It returns false when e must be closed instead.
func (e *tunnelEnd) rest() bool {
	if e.ends.local(e.served.Instance) {
		return false
	}
	if time.Since(e.link.born) > tunnel.MaxLife {
		return false
	}
	places, err := e.slots.take(e.cfg.Limits.tunnelSlots(e.served.Instance, e.link.peer.Identity.String())...)
	if err != nil || !e.restFor(tunnel.MaxIdleTime+lateClose, places) {
		return false
	}
	if e.ends.local(e.served.Instance) { // since the look above, when tell did not find e at rest
		e.tell()
	}
	return true
}

func (e *tunnelEnd) restFor(wait time.Duration, places func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.until = time.Now().Add(wait)
	if e.retired || e.stopping.Load() || e.conn.SetDeadline(e.until) != nil {
		places()
		return false
	}
	e.places = places
	return true
}

// wake makes e busy. It returns false when e must be closed instead: certificates, roots and expiry are looked at for every
// stream.
func (e *tunnelEnd) wake() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.retired || !e.c.letGo(e.conn) || !e.fits(e.gate.current()) {
		return false
	}
	e.places()
	e.places = nil
	return true
}

// fits says whether the peer would be accepted by now as it was when the tunnel was made.
func (e *tunnelEnd) fits(now *state) bool {
	return e.trust == now.trust && now.credentials.Still(&e.link.peer, e.served.Service) == nil
}

// retire closes e now, or after its stream.
func (e *tunnelEnd) retire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = true
	if e.places != nil {
		_ = e.conn.Close() // there is nothing to lose, and a close_notify might have to wait
	}
}

func (e *tunnelEnd) resting() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.places != nil
}

// close ends e, without a stream.
func (e *tunnelEnd) close() {
	_ = e.protect(func() error { // which tells
		e.lastWord()
		return nil
	})
	_ = e.conn.Close()
	e.mu.Lock()
	if e.places != nil {
		e.places()
		e.places = nil
	}
	e.mu.Unlock()
	e.tunnels.remove(e)
	e.over(nil)
}

// stream serves one stream. over is false if that rests: then who goes on with it will serve. again is false when e is not fit for
// another.
func (e *tunnelEnd) stream(o tunnel.Opening) (again, over bool) {
	c := newConnection(e.lastID.Add(1), admin.Inbound)
	c.via(admin.PathTunnel)
	_ = c.hold(e.conn) // c is new: it cannot have been cut off
	e.live.add(c)
	ended := func(err error) (again bool) {
		defer e.live.remove(c)
		errEnd := e.protect(func() error {
			again = e.link.ready() && c.letGo(e.conn)
			e.end(c, err)
			again = again && e.rest()
			return nil
		})
		return again && errEnd == nil
	}
	s := inboundStream{inbound: e.inbound, end: e, opening: o}
	s.c = c
	over = true
	err := e.protect(func() error {
		r, limited, err := s.serve()
		if err != nil {
			return err
		}
		if err, over = r.run(&e.connections, func(err error) {
			e.serve(ended(e.protect(func() error { return limited(err) })))
		}); over {
			err = limited(err)
		}
		return err
	})
	return over && ended(err), over
}

// inboundStream is one stream of a tunnel: a connection like any other, but for the handshake.
type inboundStream struct {
	inbound
	end     *tunnelEnd
	opening tunnel.Opening
}

// serve begins the stream, whose bytes the relay is to carry.
func (s *inboundStream) serve() (r *relay, ended func(err error) error, err error) {
	l := s.end.link
	// Until the answer is sent, the peer must read and the application accept.
	if err := s.conn.SetDeadline(time.Now().Add(s.cfg.Limits.Handshake + s.cfg.Limits.Connect)); err != nil {
		return nil, nil, err
	}
	application, err := s.admit()
	if err != nil {
		return nil, nil, errors.Join(err, s.refuse(err))
	}
	if err := s.open(s.c); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(l.control(tunnel.Accepted, nil), s.conn.SetDeadline(time.Time{})); err != nil {
		return nil, nil, err
	}
	return s.relay(s.c, application, l), s.limited(s.c), nil
}

// admit keeps the order of a Connect server: identity, intention, limits, and only then the application.
func (s *inboundStream) admit() (*plainLeg, error) {
	now := s.gate.current()
	l := s.end.link
	source := l.peer.Identity
	s.client = s.sourceAddress(now)
	s.c.describe(func(about *admin.Connection) { about.Handshake = l.handshake })
	l.handshake = 0
	served, err := s.cfg.Kernel.Served(s.ns, s.at)
	if err == nil && served.Service != s.served.Service {
		err = refuse(catalog.ReasonUnknownService, "serve %s: it is an instance of %q now, and was one of %q", s.at, served.Service, s.served.Service)
	}
	if err != nil {
		s.describe(s.served)
		return nil, withReason(err, catalog.ReasonUnknownService)
	}
	s.served = served
	s.describe(served)
	s.c.identify(source, served.Service)
	if err := s.authorize(s.c); err != nil {
		return nil, err
	}
	if err := s.takePlace(); err != nil {
		return nil, err
	}
	if err := s.reserve(now); err != nil {
		return nil, err
	}
	if !s.tunnels.openings.Add(source, s.opening.ID) {
		return nil, &catalog.Refusal{Reason: catalog.ReasonConnectFailed, Err: errSeenBefore}
	}
	application, err := s.deliver()
	if err != nil {
		s.tunnels.openings.Remove(source, s.opening.ID)
	}
	return application, err
}

var errSeenBefore = errors.New("open the stream: an opening with the same id was accepted before, so what it carries may have been delivered")

// refuse answers an opening that ended with err, and skips what came with it.
func (s *inboundStream) refuse(err error) error {
	if s.c.ctx.Err() != nil {
		return nil // the tunnel is reset
	}
	l := s.end.link
	if err := l.skip(); err != nil {
		return err
	}
	if errors.Is(err, errSeenBefore) {
		return l.control(tunnel.Duplicate, nil)
	}
	return l.control(tunnel.Refused, []byte(catalog.ReasonOf(err, catalog.ReasonDeliveryFailed)))
}

// sourceAddress is what the application sees as its client: what the other node claims, if it is the tunnel's own or one
// that the catalog gives the source service, and could not be taken for somebody of this node.
func (s *inboundStream) sourceAddress(now *state) netip.AddrPort {
	claimed := s.opening.Source
	if !s.mayBe(now, claimed.Addr()) || claimed.Port() == 0 {
		s.tunnels.rejected.Add(1)
		return s.client
	}
	return claimed
}

func (s *inboundStream) mayBe(now *state, ip netip.Addr) bool {
	switch {
	case !ip.IsValid(), ip.IsLoopback(), ip.IsUnspecified(), ip.IsMulticast(), ip.IsLinkLocalUnicast():
		return false
	case ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}), s.cfg.Kernel.Owns(ip):
		return false
	case ip == s.client.Addr():
		return true
	}
	source := s.end.link.peer.Identity
	svc := now.snap.Services[source.Service]
	return svc != nil && source == now.snap.Identity(svc.Name) && slices.ContainsFunc(svc.Instances, func(inst *catalog.Instance) bool { return !inst.Local && inst.Address.Addr() == ip })
}

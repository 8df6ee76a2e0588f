package nodeproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// connection is one connection of an application or a peer, from accept to close. Its owner is the goroutine that serves
// it; pair, record, condemn, cutOff and line may be called by any.
type connection struct {
	id      uint64
	started time.Time

	ctx    context.Context // ends when the connection is cut off
	cancel context.CancelFunc

	sent, received atomic.Uint64

	mu       sync.Mutex
	about    admin.Connection // all but what event adds
	verdict  verdict          // the one that c stands on; its sequence is 0 before there is one
	source   policy.Identity
	service  string // the destination; "" while source and service are not known
	sockets  []net.Conn
	resume   func() // of what rests when sockets are cut off; nil: nothing does
	releases []func()
	path     admin.Path // that bytes take once c is open
	opened   bool
	opening  *sync.WaitGroup // has c until it is open or over; nil: it is, or nobody waits
	silent   bool            // nothing is told of c
	ended    error           // why we ended it, set once
}

func newConnection(id uint64, direction admin.Direction) *connection {
	c := toldConnection(id, direction)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// toldConnection is one that nobody serves: it has no context, and nothing of it is held.
func toldConnection(id uint64, direction admin.Direction) *connection {
	return &connection{
		id: id, started: time.Now(), cancel: func() {}, path: admin.PathMTLS,
		about: admin.Connection{ID: id, Direction: direction, Path: admin.PathNone, Verdict: admin.Allowed},
	}
}

// describe changes what is told about c.
func (c *connection) describe(change func(*admin.Connection)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.about)
}

// identify sets whose intention decides. A policy change from here on re-evaluates c.
func (c *connection) identify(source policy.Identity, service string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.source, c.service = source, service
	c.about.Source.Service, c.about.Source.Identity = source.Service, source.String()
	c.about.Destination.Service = service
}

// pair is what identify set.
func (c *connection) pair() (source policy.Identity, service string, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.source, c.service, c.service != ""
}

// hold makes conn end with c. When c is condemned already, conn is reset and the reason returned.
func (c *connection) hold(conn net.Conn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		abort(conn)
		return c.ended
	}
	c.sockets = append(c.sockets, conn)
	return nil
}

// letGo makes conn, which c holds, survive c. It returns false when c is condemned already: conn may be reset then.
func (c *connection) letGo(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sockets = slices.DeleteFunc(c.sockets, func(held net.Conn) bool { return held == conn })
	return c.ended == nil
}

// via sets the path that bytes take once c is open. It is plain mTLS if nobody says otherwise.
func (c *connection) via(path admin.Path) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.path = path
}

// silence makes c end without a word.
func (c *connection) silence() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.silent = true
}

// onEnd calls release when c has ended.
func (c *connection) onEnd(release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.releases = append(c.releases, release)
}

// record notes the verdict that c stands on. A recheck may have noted a newer one already.
func (c *connection) record(v verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.note(v)
}

func (c *connection) note(v verdict) {
	if v.sequence > c.verdict.sequence {
		c.verdict = v
	}
}

// denial is the error of a verdict that denies.
func denial(source policy.Identity, service string, v verdict) error {
	return &catalog.Refusal{
		Reason: catalog.ReasonIntention,
		Err:    fmt.Errorf("connect %q to %q: %s", source.Service, service, v.Why),
	}
}

// open says that bytes may flow now. It fails with the reason when c is condemned.
func (c *connection) open() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return c.ended
	}
	c.opened = true
	c.about.Path = c.path
	c.settle()
	return nil
}

func (c *connection) settle() {
	if c.opening != nil {
		c.opening.Done()
		c.opening = nil
	}
}

// condemn decides that c ends because of err; cutOff must follow. Whoever ends several connections condemns all of them
// first: two may be the two sides of one, and the second must not take the end of the first for a reset by its peer. v is
// the verdict that demands it, nil when it is none.
func (c *connection) condemn(err error, v *verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v != nil {
		c.note(*v)
	}
	if c.ended == nil {
		c.ended = err
	}
}

// cutOff ends c, which is condemned: both sockets are reset, and whatever its owner waits for returns.
func (c *connection) cutOff() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel()
	c.resetSockets()
	if c.resume != nil {
		c.resume()
	}
}

// onCut has resume called when c is cut off.
func (c *connection) onCut(resume func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resume = resume
}

func (c *connection) resetSockets() {
	for _, conn := range c.sockets {
		abort(conn)
	}
	c.sockets = nil
}

// finish is the owner's last call. It resets what is still open when err is not nil, gives back what c took, and returns
// what is to be told of the end; false when nothing is.
func (c *connection) finish(err error) (_ admin.Connection, told bool) {
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if c.ended == nil {
		c.ended = err
	}
	if c.ended != nil {
		c.resetSockets()
		c.about.Detail = c.ended.Error()
	}
	if refusal, ok := errors.AsType[*catalog.Refusal](c.ended); ok {
		c.about.Verdict, c.about.Reason = admin.Denied, refusal.Reason
	}
	for _, release := range c.releases {
		release()
	}
	c.sockets = nil
	if c.opened {
		return c.event(admin.EventClose), true
	}
	c.about.Verdict = admin.Denied
	if c.about.Reason == "" {
		c.about.Reason = catalog.ReasonConnectFailed
		if c.about.Direction == admin.Inbound {
			c.about.Reason = catalog.ReasonDeliveryFailed
		}
	}
	return c.event(admin.EventDenied), !c.silent
}

// line is c as an "open" event with the bytes so far; false when it is not open.
func (c *connection) line() (admin.Connection, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.event(admin.EventOpen), c.opened
}

func (c *connection) event(event string) admin.Connection {
	e := c.about
	e.Event, e.Time = event, time.Now()
	e.Duration = e.Time.Sub(c.started)
	e.Sent, e.Received = c.sent.Load(), c.received.Load()
	e.Sequence, e.Generation = c.verdict.sequence, c.verdict.Generation
	if c.verdict.Intention != nil {
		e.Intention = c.verdict.Intention.String()
	}
	return e
}

// table holds every connection from its acceptance on.
type table struct {
	mu   sync.Mutex
	live map[uint64]*connection
}

func (t *table) add(c *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live[c.id] = c
}

func (t *table) remove(c *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, c.id)
}

func (t *table) all() []*connection {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*connection, 0, len(t.live))
	for _, c := range t.live {
		all = append(all, c)
	}
	return all
}

func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.live)
}

// Package nodeproxy is the data path: it accepts the redirected connections of workloads and those of Connect peers,
// identifies both ends, lets intentions decide, dials, copies, and drains.
//
// A Proxy lives as long as its Run; when that returns, no goroutine or socket of it is left. It has no kernel code of its
// own (see Kernel) and keeps nothing on disk.
package nodeproxy

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

// Observer is told of every connection: an "open" event when bytes may flow and a "close" event at its end, or one
// "denied" event. Observe is called concurrently, on the data path: it must not block.
type Observer interface {
	Observe(admin.Connection)
}

// Config is what a Proxy needs; every field from PreferLocal on may be left out.
type Config struct {
	Node     string
	Source   catalog.Source
	Kernel   Kernel
	Observer Observer
	Log      *slog.Logger
	Limits   Limits

	PreferLocal bool   // instances of this node go first
	Tunnels     bool   // are made to and accepted from other nodeproxies, but where FIPS 140 is asked for
	Version     string // shown in status
	MapABI      int    // shown in status

	// Restarts says, once Run's ctx has ended, whether the next daemon waits for the end of this one. nil: none does.
	Restarts func() bool
}

// restartDrain is how long live connections may go on after the end of Run's ctx when the next daemon waits, and with it all new ones:
// together with a start it takes less time than a heartbeat lasts.
const restartDrain = 2 * time.Second

func (c *Config) validate() error {
	if c.Source == nil || c.Kernel == nil || c.Observer == nil || c.Log == nil || c.Node == "" {
		return errors.New("configure the proxy: it needs a node name, a source, a kernel, an observer and a logger")
	}
	return c.Limits.validate()
}

// Proxy is the data path of one node. It implements workload.Handler.
type Proxy struct {
	cfg        Config
	started    time.Time
	gate       gate
	slots      slots
	handshakes handshakes // inbound
	answers    rounds     // of inbound handshakes
	turns      turns      // of outbound handshakes
	ends       endings
	balancer   *balancer
	buffers    *buffers
	rests      *rests
	live       table
	observed   observations
	tunnels    *tunnels
	direct     directs

	connections sync.WaitGroup // one for each connection in live
	openings    sync.WaitGroup // and for each of an application's that is not open yet
	lastID      atomic.Uint64
	opened      atomic.Uint64
	denied      atomic.Uint64
	stopping    atomic.Bool

	offers chan *catalog.Snapshot // the newest snapshot not yet applied

	mu       sync.Mutex
	needed   []string       // services that workloads here run as
	applying error          // what the kernel could not apply
	revoked  *policy.Policy // the newest of which Kernel.Revoke has ended what it denies; nil before there is one
}

var _ workload.Handler = (*Proxy)(nil)

// New returns a Proxy that does nothing until Run.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg.Tunnels = cfg.Tunnels && !fips140.Enabled() // they need records that are not crypto/tls'
	rests, err := newRests()
	if err != nil {
		return nil, err
	}
	p := &Proxy{
		cfg:        cfg,
		started:    time.Now(),
		slots:      slots{taken: make(map[slotKey]int)},
		handshakes: handshakes{scopes: make(map[slotKey]*scope)},
		answers:    rounds{free: answering()},
		turns:      turns{lines: make(map[slotKey]*line)},
		buffers:    newBuffers(),
		rests:      rests,
		live:       table{live: make(map[uint64]*connection)},
		tunnels:    newTunnels(&cfg.Limits),
		direct:     directs{open: make(map[uint64]*directConnection)},
		offers:     make(chan *catalog.Snapshot, 1),
	}
	p.balancer = newBalancer(cfg.PreferLocal, &p.ends)
	return p, nil
}

// Run runs the source and the kernel, applies snapshots and serves, until ctx ends or one of the two fails. It then lets
// the live connections end by themselves until limits.drain, or restartDrain, has passed, resets the rest, and returns. Policy changes are
// in force while it drains. It may be called once.
func (p *Proxy) Run(ctx context.Context) error {
	asked := ctx
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	sourceCtx, stopSource := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSource()

	var sourceErr error
	var workers sync.WaitGroup
	workers.Go(func() {
		defer stop()
		if sourceErr = p.cfg.Source.Run(sourceCtx, p.offer); sourceErr != nil {
			sourceErr = fmt.Errorf("run the source: %w", sourceErr)
		}
	})
	workers.Go(func() { p.applyAll(sourceCtx, ctx) })
	workers.Go(func() { p.tunnels.pool.Run(ctx) })
	workers.Go(func() { p.tunnels.sweep(ctx) })
	var resting sync.WaitGroup
	resting.Go(func() {
		if err := p.rests.run(); err != nil {
			p.cfg.Log.Error("idle connections keep their memory: restart the daemon to give it back", "error", err)
		}
	})
	workers.Go(func() { reclaim(ctx, p.cfg.Log, p.rests.freed) })
	kernelErr := p.cfg.Kernel.Run(ctx, p)
	if kernelErr != nil {
		kernelErr = fmt.Errorf("run the kernel side: %w", kernelErr)
	}
	stop()
	p.stopping.Store(true)
	p.drain(asked)
	stopSource()
	workers.Wait()
	err := p.rests.close() // no connection is left
	resting.Wait()
	return errors.Join(sourceErr, kernelErr, err)
}

// drain closes the tunnels that nobody uses, waits for the live connections, and resets those that are left at the
// deadline. asked ends when the service manager wants the process to end.
func (p *Proxy) drain(asked context.Context) {
	p.tunnels.retireEnds(func(*tunnelEnd) bool { return true })
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.connections.Wait()
	}()
	deadline := time.NewTimer(p.cfg.Limits.Drain)
	defer deadline.Stop()
	hurry := context.AfterFunc(asked, func() {
		if p.cfg.Restarts != nil && p.cfg.Restarts() {
			deadline.Reset(min(restartDrain, p.cfg.Limits.Drain))
		}
	})
	defer hurry()
	select {
	case <-done:
		return
	case <-deadline.C:
	}
	late := p.live.all()
	for _, c := range late {
		c.condemn(&catalog.Refusal{Reason: catalog.ReasonDrain}, nil)
	}
	for _, c := range late {
		c.cutOff()
	}
	<-done
}

// Need implements workload.Handler.
func (p *Proxy) Need(services []string) {
	p.mu.Lock()
	p.needed = services
	p.mu.Unlock()
	p.cfg.Source.Need(services)
}

// begin starts the life of an accepted connection. Every begin is followed by one run.
func (p *Proxy) begin(direction admin.Direction, conn net.Conn) *connection {
	c := newConnection(p.lastID.Add(1), direction)
	_ = c.hold(conn) // c is new: it cannot have been cut off
	if direction == admin.Outbound {
		p.openings.Add(1)
		c.opening = &p.openings
	}
	return c
}

// Settle implements workload.Handler.
func (p *Proxy) Settle(ctx context.Context) {
	settled := make(chan struct{})
	go func() {
		defer close(settled)
		p.openings.Wait()
	}()
	select {
	case <-settled:
	case <-ctx.Done():
	}
}

// carrying is what is left to do of a connection that is open.
type carrying struct {
	start func(group *sync.WaitGroup, ended func(err error)) // in the caller's goroutine and others of group; it may return before the end
	ended func(err error) error                              // makes of its end the connection's
}

// run registers c and calls serve in a goroutine of c's own. admitted is why c is refused at once, or nil. What serve returns goes
// on in it, and in others of its own.
func (p *Proxy) run(c *connection, admitted error, serve func() (*carrying, error)) {
	if admitted != nil {
		p.end(c, admitted)
		return
	}
	p.live.add(c)
	ended := func(err error) {
		p.end(c, err)
		p.live.remove(c)
	}
	p.connections.Go(func() {
		var carries *carrying
		err := p.protect(func() (err error) {
			carries, err = serve()
			return err
		})
		if err != nil {
			ended(err)
			return
		}
		carries.start(&p.connections, func(err error) {
			ended(p.protect(func() error { return carries.ended(err) }))
		})
	})
}

func (p *Proxy) end(c *connection, err error) {
	e, told := c.finish(err)
	if !told {
		return
	}
	if e.Event == admin.EventDenied {
		p.denied.Add(1)
	}
	p.cfg.Observer.Observe(e)
}

// open tells that bytes may flow on c now.
func (p *Proxy) open(c *connection) error {
	if err := c.open(); err != nil {
		return err
	}
	e, _ := c.line()
	p.opened.Add(1)
	p.cfg.Observer.Observe(e)
	return nil
}

// protect turns a panic of run into an error. Strangers' bytes reach the code that runs here: a mistake in it must end
// their connection and not all connections of the node. The stack is logged, so that it is not overlooked.
func (p *Proxy) protect(run func() error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			p.cfg.Log.Error("a connection failed because of a mistake in nodeproxy: please report it", "panic", cause, "stack", string(debug.Stack()))
			err = fmt.Errorf("serve the connection: internal error: %v", cause)
		}
	}()
	return run()
}

// authorize evaluates the intention of c, which is registered: a policy change either comes first and decides here, or
// finds c in the table.
func (p *Proxy) authorize(c *connection) error {
	source, service, _ := c.pair()
	v := p.gate.decide(source, service)
	c.record(v)
	if !v.Allowed {
		return denial(source, service, v)
	}
	return nil
}

// relay is the copying between the two legs of c. application is the end on this node.
func (p *Proxy) relay(c *connection, application, peer leg) *relay {
	fromA, fromB := &c.sent, &c.received
	if c.about.Direction == admin.Inbound {
		fromA, fromB = fromB, fromA
	}
	r := newRelay(application, peer, fromA, fromB, p.protect, p.rests)
	c.onCut(r.resume)
	return r
}

// carry is relay, and what is to follow.
func (p *Proxy) carry(c *connection, application, peer leg) *carrying {
	r, ended := p.relay(c, application, peer), p.limited(c)
	return &carrying{r.start, ended}
}

// limited has limits.idle end c, and returns what makes of the relay's end the connection's.
func (p *Proxy) limited(c *connection) (ended func(err error) error) {
	stop := p.limitIdle(c)
	return func(err error) error {
		stop()
		if remote, ok := errors.AsType[*net.OpError](err); ok && remote.Op == "remote error" && c.received.Load() == 0 {
			// With TLS 1.3 the client is told only now that its certificate was refused.
			return &catalog.Refusal{Reason: catalog.ReasonHandshakeFailed, Err: fmt.Errorf("do the TLS handshake: the peer refused it: %w", err)}
		}
		return err
	}
}

// limitIdle cuts c off when limits.idle passed without a byte, give or take a quarter. It looks at the byte counts, so
// that copying does not have to look at the clock. What it returns ends it; a look that is under way may cut off what is over.
func (p *Proxy) limitIdle(c *connection) (stop func()) {
	limit := p.cfg.Limits.Idle
	if limit == 0 {
		return func() {}
	}
	const looks = 4
	interval := max(limit/looks, 1)
	var last uint64
	quiet := 0
	var timer *time.Timer
	timer = time.AfterFunc(math.MaxInt64, func() {
		if now := c.sent.Load() + c.received.Load(); now != last {
			last, quiet = now, 0
		} else if quiet++; quiet == looks {
			c.condemn(&catalog.Refusal{Reason: catalog.ReasonIdle}, nil)
			c.cutOff()
			return
		}
		timer.Reset(interval)
	})
	timer.Reset(interval)
	return func() { timer.Stop() }
}

package tunnel

import (
	"context"
	"slices"
	"sync"
	"time"
)

// What a Pool keeps, and how long.
const (
	MaxIdleTime  = time.Minute     // a tunnel that nobody took for so long is closed
	MaxLife      = time.Hour       // one older than this is not used again
	restedTime   = 5 * time.Second // one that was idle for longer is pinged before it is used
	PingTimeout  = 500 * time.Millisecond
	maxIdleOfKey = 64
	maxSpares    = 16               // tunnels of one key that are dialled ahead
	spareTime    = 10 * time.Second // after so long without a miss, half as many
	maxDialling  = 4                // of all keys, ahead
	dialBackoff  = time.Second      // after a dial ahead that failed
	tidyInterval = time.Second
)

// Conn is a tunnel as a Pool sees it. A pooled one is used by nobody else.
type Conn interface {
	Born() time.Time
	// Alive looks, without waiting, whether the other side has closed it or sent what nobody asked for.
	Alive() bool
	// Ping asks the other side for an answer.
	Ping(deadline time.Time) error
	// Close does not wait. It ends a Ping that is under way.
	Close()
}

// Pool keeps tunnels ready, by key. What it was given is its own until it is taken; all else is the caller's. It does
// nothing by itself but inside Run.
type Pool[K comparable, C Conn] struct {
	maxIdle int
	now     func() time.Time

	mu       sync.Mutex
	shelves  map[K]*shelf[C]
	idle     int
	dialling int
	closed   bool

	wanted chan struct{} // has an element when spares are wanted
}

// shelf is what there is of one key.
type shelf[C Conn] struct {
	idle     []resting[C] // the one that was used last is the last, those that were dialled ahead are before all that were used
	dial     func(context.Context) (C, error)
	dialling int
	spares   int       // how many shall be idle
	missed   time.Time // when one was asked for and there was none, or spares was lowered
	used     time.Time // when one was asked for
	failed   time.Time // when the last dial ahead failed
}

type resting[C Conn] struct {
	conn  C
	since time.Time
}

// NewPool returns an empty one that keeps at most maxIdle tunnels.
func NewPool[K comparable, C Conn](maxIdle int) *Pool[K, C] {
	return &Pool[K, C]{maxIdle: maxIdle, now: time.Now, shelves: make(map[K]*shelf[C]), wanted: make(chan struct{}, 1)}
}

// Take returns a tunnel that is most likely alive; false when there is none, or ctx ends. How often it is called, and in
// vain, decides how many more are dialled ahead, with dial. One ping without an answer is all that it waits for: the others
// that rested lead to the same peer, and are closed with the one that was pinged.
func (p *Pool[K, C]) Take(ctx context.Context, key K, dial func(context.Context) (C, error)) (conn C, ok bool) {
	for ctx.Err() == nil {
		r, ok := p.pop(key, dial)
		if !ok {
			break
		}
		now := p.now()
		switch {
		case now.Sub(r.conn.Born()) >= MaxLife || now.Sub(r.since) >= MaxIdleTime || !r.conn.Alive():
			r.conn.Close()
		case now.Sub(r.since) < restedTime || ping(ctx, r.conn, now.Add(PingTimeout)):
			return r.conn, true
		default:
			r.conn.Close()
			if ctx.Err() == nil {
				p.closeRested(key)
			}
			return conn, false
		}
	}
	return conn, false
}

// ping says whether the other side answers before the deadline and the end of ctx.
func ping(ctx context.Context, conn Conn, deadline time.Time) bool {
	stop := context.AfterFunc(ctx, conn.Close)
	err := conn.Ping(deadline)
	return stop() && err == nil
}

// closeRested closes what a key has that would be pinged before it is used.
func (p *Pool[K, C]) closeRested(key K) {
	p.mu.Lock()
	var old []resting[C]
	if s := p.shelves[key]; s != nil {
		now := p.now()
		old = p.sift(s, func(r resting[C]) bool { return now.Sub(r.since) < restedTime })
	}
	p.mu.Unlock()
	for _, r := range old {
		r.conn.Close()
	}
}

// sift keeps what good accepts and returns the rest, to be closed.
func (p *Pool[K, C]) sift(s *shelf[C], good func(resting[C]) bool) (bad []resting[C]) {
	kept := s.idle[:0]
	for _, r := range s.idle {
		if good(r) {
			kept = append(kept, r)
		} else {
			bad = append(bad, r)
		}
	}
	clear(s.idle[len(kept):])
	s.idle = kept
	p.idle -= len(bad)
	return bad
}

func (p *Pool[K, C]) pop(key K, dial func(context.Context) (C, error)) (r resting[C], ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return r, false
	}
	s := p.shelves[key]
	if s == nil {
		s = &shelf[C]{}
		p.shelves[key] = s
	}
	now := p.now()
	s.dial, s.used = dial, now
	if n := len(s.idle); n > 0 {
		r, ok = s.idle[n-1], true
		s.idle[n-1] = resting[C]{}
		s.idle = s.idle[:n-1]
		p.idle--
	} else {
		s.spares, s.missed = min(max(1, 2*s.spares), maxSpares), now
	}
	if len(s.idle)+s.dialling < s.spares {
		p.want()
	}
	return r, ok
}

func (p *Pool[K, C]) want() {
	select {
	case p.wanted <- struct{}{}:
	default:
	}
}

// Put gives a tunnel back, or in. It is closed when it is not wanted: when its key was retired, or there are enough.
func (p *Pool[K, C]) Put(key K, conn C) {
	if !p.keep(key, conn, false) {
		conn.Close()
	}
}

func (p *Pool[K, C]) keep(key K, conn C, spare bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelves[key]
	now := p.now()
	if s == nil || p.closed || len(s.idle) >= maxIdleOfKey || p.idle >= p.maxIdle || now.Sub(conn.Born()) >= MaxLife {
		return false
	}
	if spare { // what is said over those that were used is heard before it is taken
		s.idle = slices.Insert(s.idle, 0, resting[C]{conn, now})
	} else {
		s.idle = append(s.idle, resting[C]{conn, now})
	}
	p.idle++
	return true
}

// Idle counts the tunnels that nobody uses.
func (p *Pool[K, C]) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle
}

// Retire closes the tunnels of all keys that valid does not accept; those in use are closed when they are put back.
func (p *Pool[K, C]) Retire(valid func(K) bool) {
	p.mu.Lock()
	var old []resting[C]
	for key, s := range p.shelves {
		if !valid(key) {
			old = append(old, p.drop(key, s)...)
		}
	}
	p.mu.Unlock()
	for _, r := range old {
		r.conn.Close()
	}
}

// drop forgets a key and returns the tunnels to close.
func (p *Pool[K, C]) drop(key K, s *shelf[C]) []resting[C] {
	delete(p.shelves, key)
	p.idle -= len(s.idle)
	return s.idle
}

// Run dials ahead and closes what nobody takes, until ctx ends. It then closes all tunnels, keeps none any more, and
// returns with no goroutine left.
func (p *Pool[K, C]) Run(ctx context.Context) {
	var dials sync.WaitGroup
	tick := time.NewTicker(tidyInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			p.tidy()
		case <-p.wanted:
			p.dialAhead(ctx, &dials)
		}
	}
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.Retire(func(K) bool { return false })
	dials.Wait()
}

// dialAhead begins the dials that are wanted, as far as their number is not bounded.
func (p *Pool[K, C]) dialAhead(ctx context.Context, dials *sync.WaitGroup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, s := range p.shelves {
		for len(s.idle)+s.dialling < s.spares && p.dialling < maxDialling && p.idle+p.dialling < p.maxIdle && p.now().Sub(s.failed) > dialBackoff {
			s.dialling++
			p.dialling++
			dial := s.dial
			dials.Go(func() {
				conn, err := dial(ctx)
				p.mu.Lock()
				s.dialling--
				p.dialling--
				if err != nil {
					s.failed = p.now()
				}
				p.mu.Unlock()
				if err == nil && !p.keep(key, conn, true) {
					conn.Close()
				}
				p.want()
			})
		}
	}
}

// tidy closes what was idle for too long or is closed by the other side, and forgets what nobody uses.
func (p *Pool[K, C]) tidy() {
	p.mu.Lock()
	var old []resting[C]
	now := p.now()
	for key, s := range p.shelves {
		if now.Sub(s.missed) >= spareTime {
			s.spares, s.missed = max(1, s.spares/2), now
		}
		if len(s.idle) == 0 && s.dialling == 0 && now.Sub(s.used) >= MaxIdleTime {
			p.drop(key, s)
			continue
		}
		old = append(old, p.sift(s, func(r resting[C]) bool {
			return now.Sub(r.since) < MaxIdleTime && now.Sub(r.conn.Born()) < MaxLife && r.conn.Alive()
		})...)
	}
	p.mu.Unlock()
	for _, r := range old {
		r.conn.Close()
	}
}

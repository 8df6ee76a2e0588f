package tunnel

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

const patience = 20 * time.Second

type fake struct {
	born   time.Time
	dead   bool
	mute   bool
	onPing func()
	mu     sync.Mutex
	pinged int
	closed bool
}

func (f *fake) Born() time.Time { return f.born }
func (f *fake) Alive() bool     { return !f.dead }
func (f *fake) Ping(time.Time) error {
	f.pinged++
	if f.onPing != nil {
		f.onPing()
	}
	if f.mute {
		return errors.New("no answer")
	}
	return nil
}
func (f *fake) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}
func (f *fake) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

type clock struct{ t time.Time }

func newPool(max int) (*Pool[string, *fake], *clock) {
	p, c := NewPool[string, *fake](max), &clock{time.Now()}
	p.now = func() time.Time { return c.t }
	return p, c
}

func never(context.Context) (*fake, error) { return nil, errors.New("it is not dialled here") }

func TestATunnelIsOnlyForItsKey(t *testing.T) {
	p, c := newPool(10)
	p.Take(t.Context(), "a", never)
	p.Take(t.Context(), "b", never)
	p.Put("a", &fake{born: c.t})
	if _, ok := p.Take(t.Context(), "b", never); ok {
		t.Error("b has the tunnel of a")
	}
	if _, ok := p.Take(t.Context(), "a", never); !ok || p.Idle() != 0 {
		t.Error("a has not its own")
	}
}

func TestTunnelsThatAreNoGoodAreNotTaken(t *testing.T) {
	for name, tc := range map[string]struct {
		f      *fake
		rested time.Duration
		taken  bool
		pinged int
	}{
		"fresh":                {&fake{}, 0, true, 0},
		"rested":               {&fake{}, 6 * time.Second, true, 1},
		"rested and mute":      {&fake{mute: true}, 6 * time.Second, false, 1},
		"closed by the other":  {&fake{dead: true}, 0, false, 0},
		"idle for a minute":    {&fake{}, time.Minute, false, 0},
		"an hour old when put": {&fake{born: time.Now().Add(-time.Hour - time.Minute)}, 0, false, 0},
		"an hour old by now":   {&fake{born: time.Now().Add(-time.Hour + 2*time.Second)}, 3 * time.Second, false, 0},
	} {
		p, c := newPool(10)
		if tc.f.born.IsZero() {
			tc.f.born = c.t
		}
		p.Take(t.Context(), "a", never)
		p.Put("a", tc.f)
		if old := c.t.Sub(tc.f.born) >= MaxLife; tc.f.closed != old {
			t.Errorf("%s: closed when it is put: %v", name, tc.f.closed)
		}
		c.t = c.t.Add(tc.rested)
		_, ok := p.Take(t.Context(), "a", never)
		if ok != tc.taken || tc.f.pinged != tc.pinged || tc.f.closed == ok {
			t.Errorf("%s: taken %v, pinged %d, closed %v", name, ok, tc.f.pinged, tc.f.closed)
		}
	}
}

func TestRetiredTunnelsAreClosedAndNotTakenBack(t *testing.T) {
	p, c := newPool(10)
	busy, idle, other := &fake{born: c.t}, &fake{born: c.t}, &fake{born: c.t}
	p.Take(t.Context(), "a", never)
	p.Take(t.Context(), "b", never)
	p.Put("a", idle)
	p.Put("b", other)
	p.Retire(func(key string) bool { return key != "a" })
	p.Put("a", busy)
	if !busy.closed || !idle.closed || other.closed || p.Idle() != 1 {
		t.Errorf("busy %v, idle %v, other %v, %d idle", busy.closed, idle.closed, other.closed, p.Idle())
	}
}

func TestThePoolIsBounded(t *testing.T) {
	p, c := newPool(maxIdleOfKey + 1)
	for _, key := range []string{"a", "b"} {
		p.Take(t.Context(), key, never)
		for range maxIdleOfKey + 5 {
			p.Put(key, &fake{born: c.t})
		}
	}
	if n := len(p.shelves["a"].idle); n != maxIdleOfKey {
		t.Errorf("%d of one key", n)
	}
	if p.Idle() != maxIdleOfKey+1 {
		t.Errorf("%d in all", p.Idle())
	}
}

func TestWhatNobodyUsesIsClosedAndForgotten(t *testing.T) {
	p, c := newPool(10)
	old, dead, fresh := &fake{born: c.t}, &fake{born: c.t, dead: true}, &fake{born: c.t}
	aged := &fake{born: c.t.Add(31*time.Second - MaxLife)}
	p.Take(t.Context(), "a", never)
	p.Put("a", old)
	p.Put("a", dead)
	c.t = c.t.Add(30 * time.Second)
	p.Put("a", fresh)
	p.Put("a", aged)
	c.t = c.t.Add(30 * time.Second)
	p.tidy()
	if !old.closed || !dead.closed || !aged.closed || fresh.closed || p.Idle() != 1 {
		t.Errorf("old %v, dead %v, fresh %v, %d idle", old.closed, dead.closed, fresh.closed, p.Idle())
	}
	c.t = c.t.Add(time.Minute)
	p.tidy()
	p.tidy()
	if !fresh.closed || len(p.shelves) != 0 {
		t.Errorf("fresh %v, %d keys", fresh.closed, len(p.shelves))
	}
}

// What the other side says over a tunnel that rested must be heard before one is used that was only just made.
func TestWhatWasDialledAheadIsTakenAfterWhatWasUsed(t *testing.T) {
	p := NewPool[string, *fake](100)
	spare, used := &fake{born: time.Now()}, &fake{born: time.Now()}
	dialling, put := make(chan struct{}), make(chan struct{})
	dial := func(context.Context) (*fake, error) {
		close(dialling)
		<-put
		return spare, nil
	}
	p.Take(t.Context(), "a", dial)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { p.Run(ctx) })
	defer running.Wait()
	defer stop()
	<-dialling
	p.Put("a", used)
	close(put)
	for deadline := time.Now().Add(patience); p.Idle() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d are ready", p.Idle())
		}
	}
	for i, want := range []*fake{used, spare} {
		if got, ok := p.Take(t.Context(), "a", never); !ok || got != want {
			t.Errorf("take %d: %p, want %p of used %p and spare %p", i, got, want, used, spare)
		}
	}
}

// TestTunnelsAreDialledAheadOfDemand misses again and again: the next ones are there.
func TestTunnelsAreDialledAheadOfDemand(t *testing.T) {
	p := NewPool[string, *fake](100)
	var mu sync.Mutex
	var all []*fake
	dialling, most := 0, 0
	dial := func(context.Context) (*fake, error) {
		mu.Lock()
		dialling++
		most = max(most, dialling)
		mu.Unlock()
		time.Sleep(time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		dialling--
		f := &fake{born: time.Now()}
		all = append(all, f)
		return f, nil
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx)
	}()
	for range 4 {
		for _, ok := p.Take(t.Context(), "a", dial); ok; _, ok = p.Take(context.Background(), "a", dial) {
		}
	}
	for deadline := time.Now().Add(patience); p.Idle() < 8; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d are ready", p.Idle())
		}
	}
	stop()
	<-done
	if most > maxDialling {
		t.Errorf("%d were dialled at once", most)
	}
	late := &fake{born: time.Now()}
	p.Put("a", late)
	taken := 0
	for _, f := range all {
		if !f.isClosed() {
			taken++
		}
	}
	if p.Idle() != 0 || !late.closed || taken > len(all)-8 {
		t.Errorf("after Run %d are idle, and %d of %d open", p.Idle(), taken, len(all))
	}
}

func TestAFailingDialIsNotRepeatedAtOnce(t *testing.T) {
	p := NewPool[string, *fake](100)
	var mu sync.Mutex
	dials := 0
	first := make(chan struct{}, 1)
	dial := func(context.Context) (*fake, error) {
		mu.Lock()
		defer mu.Unlock()
		dials++
		select {
		case first <- struct{}{}:
		default:
		}
		return nil, errors.New("refused")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx)
	}()
	for range 100 {
		p.Take(t.Context(), "a", dial)
	}
	<-first
	stop()
	<-done
	if dials > 2*maxDialling {
		t.Errorf("%d dials", dials)
	}
}

func TestOnePingWithoutAnAnswerIsAllThatIsWaitedFor(t *testing.T) {
	p, c := newPool(100)
	p.Take(t.Context(), "a", never)
	p.Take(t.Context(), "b", never)
	var rested []*fake
	for range maxIdleOfKey - 1 {
		f := &fake{born: c.t, mute: true}
		rested = append(rested, f)
		p.Put("a", f)
	}
	other := &fake{born: c.t}
	p.Put("b", other)
	c.t = c.t.Add(restedTime)
	fresh := &fake{born: c.t}
	rested[len(rested)-1].onPing = func() { p.Put("a", fresh) } // somebody else's, while that is pinged
	if _, ok := p.Take(t.Context(), "a", never); ok {
		t.Error("a mute one is taken")
	}
	pinged, open := 0, 0
	for _, f := range rested {
		pinged += f.pinged
		if !f.closed {
			open++
		}
	}
	if pinged != 1 || open != 0 || other.closed || fresh.closed || p.Idle() != 2 {
		t.Errorf("%d were pinged, %d are open; other %v, fresh %v, %d idle", pinged, open, other.closed, fresh.closed, p.Idle())
	}
}

func TestTheEndOfAConnectionEndsItsPing(t *testing.T) {
	p, c := newPool(10)
	p.Take(t.Context(), "a", never)
	ctx, cancel := context.WithCancel(t.Context())
	first, second := &fake{born: c.t}, &fake{born: c.t}
	second.onPing = func() {
		cancel()
		for deadline := time.Now().Add(patience); !second.isClosed() && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
	}
	p.Put("a", first)
	p.Put("a", second)
	c.t = c.t.Add(restedTime)
	if _, ok := p.Take(ctx, "a", never); ok || !second.isClosed() || first.closed || p.Idle() != 1 {
		t.Errorf("taken %v, closed %v; the other: closed %v, %d idle", ok, second.isClosed(), first.closed, p.Idle())
	}
	if _, ok := p.Take(ctx, "a", never); ok || first.pinged != 0 {
		t.Errorf("after the end: taken %v, %d pings", ok, first.pinged)
	}
}

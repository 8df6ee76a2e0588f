package nodeproxy

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
)

// relay joins two legs until both directions are closed in order, or either leg fails. It closes both, and ends with no goroutine
// left.
//
// The end of one direction is passed on as a half-close and leaves the other one open. A reset stays a reset: it is
// passed on to the other leg, as is a TLS stream that ends without a close_notify.
type relay struct {
	a, b    leg
	ways    [2]way
	protect func(run func() error) error // turns a panic into an error
	rests   *rests                       // nil: it does not rest

	group    *sync.WaitGroup // has one for each way that is not over
	ended    func(err error)
	open     atomic.Int32 // ways that are not closed yet
	under    atomic.Int32 // ways that are not over
	end      sync.Once
	firstErr error

	here atomic.Bool   // run waits for over
	over chan struct{} // nil but for run
}

// newRelay joins a and b, and counts the bytes that come from each and go to the other one. Of what protect runs it makes errors of panics.
func newRelay(a, b leg, fromA, fromB *atomic.Uint64, protect func(run func() error) error, rests *rests) *relay {
	r := &relay{a: a, b: b, protect: protect, rests: rests}
	r.ways[0] = way{relay: r, dst: b, src: a, count: fromA, seen: math.MaxUint64}
	r.ways[1] = way{relay: r, dst: a, src: b, count: fromB, seen: math.MaxUint64}
	r.open.Store(2)
	r.under.Store(2)
	if r.spliced() {
		r.rests = nil
	}
	return r
}

// start relays, in the caller's goroutine and another one of group, and has ended called when both ways are over; nil means that both sides closed
// in order. It may return before, when the caller's part is over or rests.
func (r *relay) start(group *sync.WaitGroup, ended func(err error)) {
	r.begin(group, ended)
	go r.carry(&r.ways[1])
	r.carry(&r.ways[0])
}

// run is start of which the caller's goroutine does a part, and waits: then it returns what ended would be called with. If the
// relay rests meanwhile it returns false, and ended will be called.
func (r *relay) run(group *sync.WaitGroup, ended func(err error)) (err error, over bool) {
	r.over = make(chan struct{})
	r.here.Store(true)
	r.begin(group, ended)
	go r.carry(&r.ways[1])
	if !r.carry(&r.ways[0]) {
		return nil, false
	}
	<-r.over
	return r.firstErr, true
}

func (r *relay) begin(group *sync.WaitGroup, ended func(err error)) {
	r.group, r.ended = group, ended
	group.Add(2)
	if r.rests != nil {
		r.rests.add(r)
	}
}

// left notes that w goes on in another goroutine than it did.
func (r *relay) left(w *way) {
	if w == &r.ways[0] {
		r.here.Store(false)
	}
}

// resume goes on with what rests: the connections are closed.
func (r *relay) resume() {
	r.ways[0].resume()
	r.ways[1].resume()
}

// carry does what is to be done of a way until that is over, or rests: then it returns false.
func (r *relay) carry(w *way) (over bool) {
	rests := false
	err := r.protect(func() (err error) {
		rests, err = w.carry()
		return err
	})
	if rests {
		return false
	}
	r.finish(err)
	defer r.group.Done()
	if r.under.Add(-1) > 0 {
		return true
	}
	if r.rests != nil {
		r.rests.remove(r)
	}
	if r.here.Load() {
		close(r.over)
	} else {
		r.ended(r.firstErr)
	}
	return true
}

// carry copies from src to dst. Then it stays to notice a reset of src, which nobody reads any more.
func (w *way) carry() (rests bool, err error) {
	for {
		err := pump(w.dst, w.src, w.count)
		if err == nil {
			break
		}
		if !errors.Is(err, errInterrupted) {
			return false, err
		}
		if w.rest() {
			return true, nil
		}
		w.src.waits().goOn()
	}
	w.state.Store(wayEnds)
	if w.relay.open.Add(-1) == 0 {
		return false, nil
	}
	for {
		err := w.src.watch()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return false, err
		}
		w.src.waits().goOn() // it was asked to rest just before
	}
}

func (r *relay) finish(err error) {
	r.end.Do(func() {
		r.firstErr = err
		if err != nil {
			r.a.reset()
			r.b.reset()
		} else {
			r.a.close()
			r.b.close()
		}
		r.resume()
	})
}

// spliced says whether the kernel copies by itself.
func (r *relay) spliced() bool {
	_, a := r.a.(*plainLeg)
	_, b := r.b.(*plainLeg)
	return a && b
}

// errInterrupted says that src was asked to rest where it waits for bytes.
var errInterrupted = errors.New("the wait for bytes was interrupted")

// pump copies from src to dst until src is half-closed, and passes that on.
func pump(dst, src leg, count *atomic.Uint64) error {
	if err := transfer(dst, src, count); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return dst.closeWrite()
}

func transfer(dst, src leg, count *atomic.Uint64) error {
	if from, ok := src.(*plainLeg); ok {
		if to, ok := dst.(*plainLeg); ok {
			n, err := splice(to, from)
			count.Add(uint64(n))
			return err
		}
	}
	for {
		b, err := src.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return errInterrupted
		}
		if err != nil {
			return err
		}
		size := b.size()
		err = dst.write(b)
		src.release()
		if err != nil {
			return err
		}
		count.Add(uint64(size))
	}
}

package nodeproxy

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// relay joins two legs until both directions are closed in order, or either leg fails. It closes both, and ends with no goroutine
// left.
//
// The end of one direction is passed on as a half-close and leaves the other one open. A reset stays a reset: it is
// passed on to the other leg, as is a TLS stream that ends without a close_notify.
type relay struct {
	a, b     leg
	fromA    *atomic.Uint64               // bytes that came from a and went to b
	fromB    *atomic.Uint64               // bytes that came from b and went to a
	protect  func(run func() error) error // turns a panic into an error
	open     atomic.Int32                 // directions not yet closed
	end      sync.Once
	firstErr error
}

// run relays; nil means that both sides closed in order.
func (r *relay) run() error {
	r.open.Store(2)
	var other sync.WaitGroup
	other.Go(func() { r.direction(r.b, r.a, r.fromA) })
	r.direction(r.a, r.b, r.fromB)
	other.Wait()
	return r.firstErr
}

// start relays in goroutines of group, and calls ended with what run would return. Its caller can end: the stack that a handshake
// needed is twice what an idle connection does.
func (r *relay) start(group *sync.WaitGroup, ended func(err error)) {
	r.open.Store(2)
	var running atomic.Int32
	running.Store(2)
	one := func(dst, src leg, count *atomic.Uint64) {
		r.direction(dst, src, count)
		if running.Add(-1) == 0 {
			ended(r.firstErr)
		}
	}
	group.Go(func() { one(r.b, r.a, r.fromA) })
	group.Go(func() { one(r.a, r.b, r.fromB) })
}

// direction copies from src to dst. Then it stays to notice a reset of src, which nobody reads any more.
func (r *relay) direction(dst, src leg, count *atomic.Uint64) {
	err := r.protect(func() error {
		if err := pump(dst, src, count); err != nil {
			return err
		}
		if r.open.Add(-1) == 0 {
			return nil
		}
		return src.watch()
	})
	r.finish(err)
}

func (r *relay) finish(err error) {
	r.end.Do(func() {
		r.firstErr = err
		if err != nil {
			r.a.reset()
			r.b.reset()
			return
		}
		r.a.close()
		r.b.close()
	})
}

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

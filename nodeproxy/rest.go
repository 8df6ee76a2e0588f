package nodeproxy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stack is what a goroutine takes, and more, that waits for bytes.
const stack = 4 << 10

// restAfter is for how long no byte came one way of a relay before that rests: up to twice as long.
const restAfter = 3 * time.Second

// lookAtOnce is how many relays are looked at while nobody can begin another one.
const lookAtOnce = 256

// rests waits for bytes of what is idle, in one goroutine for all of it: a way of a relay that rests has no goroutine, and no stack.
type rests struct {
	fd    int
	epoll *os.File // of fd
	raw   syscall.RawConn

	closing atomic.Bool

	mu      sync.Mutex
	relays  map[*relay]bool // that are under way
	resting map[uint64]*way
	last    uint64 // number of a way that rests
	most    int    // that ever rested at once
}

func newRests() (*rests, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // for the runtime's poller
	}
	if err != nil {
		return nil, fmt.Errorf("wait for idle connections: %w", err)
	}
	s := &rests{fd: fd, epoll: os.NewFile(uintptr(fd), "epoll"), relays: make(map[*relay]bool), resting: make(map[uint64]*way)}
	if s.raw, err = s.epoll.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for idle connections: %w", err), s.epoll.Close())
	}
	return s, nil
}

// run serves until close. No relay may be under way then. After an error nothing rests any more.
func (s *rests) run() error {
	var events [64]unix.EpollEvent
	for look := time.Now().Add(restAfter); ; {
		if time.Now().After(look) {
			s.look()
			look = time.Now().Add(restAfter)
		}
		n, err := s.wait(events[:], look)
		if s.closing.Load() {
			return nil
		}
		if err != nil {
			s.resumeAll()
			return fmt.Errorf("wait for idle connections: %w", err)
		}
		for _, e := range events[:n] {
			s.mu.Lock()
			w := s.resting[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
			s.mu.Unlock()
			if w != nil {
				w.resume()
			}
		}
	}
}

// wait waits for events until a time.
func (s *rests) wait(events []unix.EpollEvent, until time.Time) (n int, err error) {
	if err := s.epoll.SetReadDeadline(until); err != nil {
		return 0, err
	}
	var errWait error
	err = s.raw.Read(func(fd uintptr) bool {
		for {
			if n, errWait = unix.EpollWait(int(fd), events, 0); !errors.Is(errWait, unix.EINTR) {
				return n != 0 // -1 of an error too
			}
		}
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, nil
	}
	if err := cmp.Or(err, errWait); err != nil {
		return 0, err
	}
	return n, nil
}

func (s *rests) resumeAll() {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.resting))
	s.mu.Unlock()
	for _, w := range all {
		w.resume()
	}
}

func (s *rests) close() error {
	s.closing.Store(true)
	return s.epoll.Close()
}

// freed is how many bytes of stacks were not needed any more, as never before.
func (s *rests) freed() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.most) * stack
}

// look asks the ways to rest that no byte has come since the last look.
func (s *rests) look() {
	s.mu.Lock()
	defer s.mu.Unlock()
	looked := 0
	for r := range s.relays {
		for i := range r.ways {
			w := &r.ways[i]
			n := w.count.Load()
			if n == w.seen && w.ask() {
				w.src.waits().interrupt()
			}
			w.seen = n
		}
		if looked++; looked%lookAtOnce == 0 { // others wait: to begin, or to rest
			s.mu.Unlock()
			s.mu.Lock()
		}
	}
}

func (s *rests) add(r *relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.relays[r] = true
}

// remove forgets r, which is asked for nothing any more.
func (s *rests) remove(r *relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.relays, r)
}

func (s *rests) enter(w *way) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	w.number = s.last
	s.resting[w.number] = w
	s.most = max(s.most, len(s.resting))
}

func (s *rests) leave(w *way) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.resting, w.number)
}

// The states of a way.
const (
	wayRuns  = iota
	wayAsked // to rest, when it waits for bytes
	wayRests
	wayEnds // there are no more bytes
)

// way is one direction of a relay.
type way struct {
	relay    *relay
	dst, src leg
	count    *atomic.Uint64
	state    atomic.Int32
	number   uint64 // in rests
	seen     uint64 // of count, when rests last looked
}

// ask says whether w is to be woken so that it rests.
func (w *way) ask() bool {
	return w.src.waits() != nil && (w.state.CompareAndSwap(wayRuns, wayAsked) || w.state.Load() == wayAsked)
}

// rest has rests go on with w when there is something to read, or w's relay when it is over. It returns false if w was not asked to,
// or cannot; if it returns true w is not the caller's any more.
func (w *way) rest() bool {
	s := w.relay.rests
	if w.state.Load() != wayAsked {
		return false
	}
	s.enter(w)
	w.state.Store(wayRests)
	var errAdd error
	err := w.src.waits().raw.Control(func(fd uintptr) {
		e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(uint32(w.number)), Pad: int32(uint32(w.number >> 32))}
		errAdd = unix.EpollCtl(s.fd, unix.EPOLL_CTL_ADD, int(fd), &e)
	})
	if errors.Join(err, errAdd) == nil {
		return true
	}
	if !w.state.CompareAndSwap(wayRests, wayRuns) {
		return true
	}
	s.leave(w)
	return false
}

// resume goes on with w in a goroutine of its own, if it rests.
func (w *way) resume() {
	if !w.state.CompareAndSwap(wayRests, wayRuns) {
		return
	}
	s := w.relay.rests
	s.leave(w)
	_ = w.src.waits().raw.Control(func(fd uintptr) { _ = unix.EpollCtl(s.fd, unix.EPOLL_CTL_DEL, int(fd), nil) }) // closed ones are not there any more
	w.src.waits().goOn()
	w.relay.left(w)
	go w.relay.carry(w)
}

package nodeproxy

import (
	"container/list"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
)

// slowHandshake is how long a peer may take for its answer when others want its place.
const slowHandshake = time.Second

// looks is how many handshakes are looked at for one that gives way.
const looks = 16

// scopes is in how many places an inbound handshake counts: the node's, its instance's, its client address's there.
const scopes = 3

// stage is how far a handshake is.
type stage int

const (
	silent   stage = iota // its hello is not here, or not whole
	heard                 // it waits for us
	answered              // it is the peer's turn again
	stages
)

// handshakes are the inbound ones in progress. Whoever reaches a mesh port can begin one, so that being refused when all
// places are taken would let a few clients that never finish lock out the rest, those behind the same address first.
// A handshake whose peer has not said hello therefore gives way to a newer one, the oldest first; then one whose peer
// takes longer than slowHandshake for its answer. What is neither is left alone: a burst of honest clients is served at
// the rate that this node has, instead of ending each other.
type handshakes struct {
	mu     sync.Mutex
	scopes map[slotKey]*scope
}

// scope is the handshakes of one key, those of each stage in the order in which they reached it.
type scope [stages]list.List

func (s *scope) len() (n int) {
	for i := range s {
		n += s[i].Len()
	}
	return n
}

// handshake is one in progress, from begin to end.
type handshake struct {
	of    *handshakes
	c     *connection
	conn  *net.TCPConn
	slots [scopes]slot
	stage stage
	since time.Time             // when it reached its stage
	at    [scopes]*list.Element // nil once it has ended
}

// begin takes a place in each of slots for the handshake of c on conn, from older ones if need be. end gives them back.
func (h *handshakes) begin(c *connection, conn *net.TCPConn, slots [scopes]slot) (*handshake, error) {
	h.mu.Lock()
	var gaveWay []*handshake
	defer func() {
		h.mu.Unlock()
		for _, old := range gaveWay {
			old.c.condemn(refuse(catalog.ReasonCapacity, "finish the TLS handshake: the peer took its time, and newer ones need its place"), nil)
			old.c.cutOff()
		}
	}()
	for _, w := range slots {
		s := h.scopes[w.key]
		if s == nil || s.len() < w.max {
			continue
		}
		old := s.victim()
		if old == nil {
			return nil, &catalog.Refusal{Reason: catalog.ReasonCapacity, Err: fmt.Errorf("accept the connection: %s: all %d are in use", w.key, w.max)}
		}
		h.remove(old)
		gaveWay = append(gaveWay, old)
	}
	fresh := &handshake{of: h, c: c, conn: conn, since: time.Now(), slots: slots}
	for i, w := range slots {
		s := h.scopes[w.key]
		if s == nil {
			s = new(scope)
			h.scopes[w.key] = s
		}
		fresh.at[i] = s[silent].PushBack(fresh)
	}
	return fresh, nil
}

// victim is the handshake that gives way first, nil when none does.
func (s *scope) victim() *handshake {
	for range looks {
		e := s[silent].Front()
		if e == nil {
			break
		}
		old := e.Value.(*handshake)
		if !old.unread() {
			return old
		}
		s[silent].MoveToBack(e) // it is we who are late
	}
	if e := s[answered].Front(); e != nil {
		if old := e.Value.(*handshake); time.Since(old.since) > slowHandshake {
			return old
		}
	}
	return nil
}

// unread reports whether bytes of the peer have arrived that nobody has read.
func (hs *handshake) unread() bool {
	raw, err := hs.conn.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	err = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return err == nil && n > 0
}

// reach notes that the handshake is at a later stage.
func (hs *handshake) reach(next stage) {
	hs.of.mu.Lock()
	defer hs.of.mu.Unlock()
	for i, w := range hs.slots {
		if hs.at[i] == nil {
			return
		}
		s := hs.of.scopes[w.key]
		s[hs.stage].Remove(hs.at[i])
		hs.at[i] = s[next].PushBack(hs)
	}
	hs.stage, hs.since = next, time.Now()
}

// end gives back the places, unless that is done already.
func (hs *handshake) end() {
	hs.of.mu.Lock()
	defer hs.of.mu.Unlock()
	hs.of.remove(hs)
}

func (h *handshakes) remove(hs *handshake) {
	for i, w := range hs.slots {
		if hs.at[i] == nil {
			return
		}
		s := h.scopes[w.key]
		s[hs.stage].Remove(hs.at[i])
		hs.at[i] = nil
		if s.len() == 0 {
			delete(h.scopes, w.key)
		}
	}
}

package tunnel

import (
	"math"
	"sync"
)

type phase uint8

const (
	idle    phase = iota // between streams
	opening              // OPEN was sent, and not answered
	open                 // ACCEPTED
	dead                 // RESET, or a protocol error: nothing more
)

// Session is what one end of a tunnel knows of it: which stream is under way and what may come next. It is for concurrent
// use by one reader and one writer.
type Session struct {
	mu        sync.Mutex
	server    bool
	phase     phase
	stream    uint32
	ended     bool // we sent END
	peerEnded bool
	pings     int // sent and not answered
}

// NewSession is the state after the handshake.
func NewSession(server bool) *Session { return &Session{server: server} }

// Idle says whether no stream is under way.
func (s *Session) Idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase == idle
}

// Exhausted says whether there is no number for another stream.
func (s *Session) Exhausted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream == math.MaxUint32
}

// Receive takes the header of a frame that arrived. The error wraps ErrMalformed.
func (s *Session) Receive(h Header) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mayCome(h) {
		at := s.phase
		s.phase = dead
		return malformed("%s of stream %d came in phase %d of stream %d", h.Type, h.Stream, at, s.stream)
	}
	switch h.Type {
	case Open:
		s.begin()
	case Pong:
		s.pings--
	case End:
		s.peerEnded = true
		s.settle()
	case Ping, Data, Ending:
	default:
		s.answer(h.Type)
	}
	return nil
}

func (s *Session) mayCome(h Header) bool {
	if h.Type == Open {
		return s.server && s.phase == idle && s.stream != math.MaxUint32 && h.Stream == s.stream+1
	}
	if h.Type == Ending { // it may cross an OPEN, which is not served then
		return !s.server && (s.phase == idle || s.phase == opening)
	}
	if h.Stream != s.stream {
		return false
	}
	switch h.Type {
	case Ping:
		return s.server && s.phase == idle
	case Pong:
		return s.pings > 0
	case Accepted, Refused, Duplicate:
		return !s.server && s.phase == opening
	case Data, End:
		return s.phase == open && !s.peerEnded
	case Reset:
		return s.phase == open || s.phase == opening
	}
	return false
}

// Send says that a frame is about to be sent, and returns the number to put into it: it must be called before the frame
// is written, for the answer may come before the write returns. The caller sends nothing out of turn.
func (s *Session) Send(t Type) (stream uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch t {
	case Open:
		s.begin()
	case Ping:
		s.pings++
	case End:
		s.ended = true
		s.settle()
	case Pong, Data, Ending:
	default:
		s.answer(t)
	}
	return s.stream
}

func (s *Session) begin() {
	s.stream++
	s.phase, s.ended, s.peerEnded = opening, false, false
}

// answer is what an answer to OPEN, or RESET, makes of the stream.
func (s *Session) answer(t Type) {
	switch t {
	case Accepted:
		s.phase = open
	case Refused, Duplicate:
		s.phase = idle
	default:
		s.phase = dead
	}
}

// settle ends the stream when both ends did.
func (s *Session) settle() {
	if s.ended && s.peerEnded {
		s.phase = idle
	}
}

package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Succession is a hand-over under way, seen by the daemon that comes.
type Succession struct {
	From   Self
	Estate *Estate

	wire    wire
	ended   chan struct{} // closed once err is set: the older daemon's last word, or its death
	err     error
	drained chan struct{} // closed once it is gone
}

// Begin asks the daemon that listens at path for its estate. It returns nil when none does, or when it died before it had
// given all. Refused is its answer when it does not hand over.
func Begin(path string, self Self) (*Succession, error) {
	conn, err := net.DialTimeout("unix", path, greeting)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("take over from the daemon that listens at %s: %w", path, err)
	}
	s := &Succession{wire: wire{conn.(*net.UnixConn)}, ended: make(chan struct{}), drained: make(chan struct{})}
	err = s.begin(self)
	if err == nil {
		go s.listen()
		return s, nil
	}
	conn.Close()
	if died(err) {
		return nil, nil
	}
	return nil, fmt.Errorf("take over from the daemon that listens at %s: %w", path, err)
}

func (s *Succession) begin(self Self) error {
	pid, err := peer(s.wire.UnixConn)
	if err != nil {
		return err
	}
	self.Protocol = Protocol
	text, err := json.Marshal(self)
	if err != nil {
		return err
	}
	if err := s.wire.send(greeting, hello, text); err != nil && !died(err) { // its last word may be there already
		return err
	}
	_, body, _, err := s.wire.receive(patience, hello)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, &s.From); err != nil {
		return err
	}
	s.From.PID = pid
	if why := mismatch(s.From, self); why != "" {
		return &Refused{why}
	}
	s.Estate, err = s.wire.receiveEstate()
	return err
}

// listen waits for the older daemon's last word, and then until it is gone. Close ends it.
func (s *Succession) listen() {
	defer close(s.drained)
	_, _, _, err := s.wire.receive(0, released)
	if err != nil && !died(err) {
		s.err = fmt.Errorf("take over: %w", err)
	}
	close(s.ended)
	if err == nil {
		_, _ = io.Copy(io.Discard, s.wire)
	}
}

// Lost is closed when the older daemon is gone, or does not wait any longer. Err says of the latter why.
func (s *Succession) Lost() <-chan struct{} { return s.ended }

// Err is nil when this daemon may go on: the older one has let go, or is dead. Lost must be closed.
func (s *Succession) Err() error { return s.err }

// Commit tells the older daemon that this one serves, and returns once that one has let go of everything, is dead, or hangs. An
// error says that it goes on, and this one must not.
func (s *Succession) Commit() error {
	if err := s.wire.send(greeting, serving, nil); err != nil && !died(err) {
		return fmt.Errorf("take over: %w", err)
	}
	select {
	case <-s.ended:
		return s.err
	case <-time.After(patience):
		return nil
	}
}

// Drained is closed once the older daemon carries no connection any more.
func (s *Succession) Drained() <-chan struct{} { return s.drained }

// Close ends the hand-over, and closes the files that nobody took.
func (s *Succession) Close() error {
	s.Estate.Files.Close()
	err := s.wire.Close()
	<-s.drained
	return err
}

// died says whether err is that the other side is gone: none closes its end while it lives, without a last word.
func died(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}

// await returns when the other side is gone, or has said something, or the time is over.
func (w wire) await(within time.Duration, k kind) error {
	_, _, _, err := w.receive(within, k)
	return err
}

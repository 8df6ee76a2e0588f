package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Owner is the daemon that hands over.
type Owner interface {
	// Bequeath stops changing the kernel and returns what the next daemon needs; on error all is as before.
	Bequeath(ctx context.Context, to Self) (*Estate, error)

	// Resume undoes Bequeath: the daemon that came is gone, and why.
	Resume(to Self, why error)

	// Release stops accepting and lets go of all that has only one owner: the daemon that came serves. Only then may
	// the process tell others that it is not the node's daemon any more.
	Release(to Self)
}

// Server hands over to whoever asks at a socket, once.
type Server struct {
	self  Self
	ln    *net.UnixListener
	owner Owner
	log   *slog.Logger
	path  string
	busy  chan struct{} // holds a token of the hand-over that is under way
	left  atomic.Bool   // it has succeeded: the path is the next daemon's
}

// Listen binds path, for root alone. What a dead daemon has left there is replaced: the caller has made sure that it is the
// only one.
func Listen(path string, self Self, owner Owner, log *slog.Logger) (*Server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace the hand-over socket: %w", err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return nil, fmt.Errorf("listen for the next daemon: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil { // who comes before that is asked who he is all the same
		return nil, errors.Join(fmt.Errorf("listen for the next daemon: %w", err), ln.Close())
	}
	ln.SetUnlinkOnClose(false)
	self.Protocol = Protocol
	return &Server{self: self, ln: ln, path: path, owner: owner, log: log, busy: make(chan struct{}, 1)}, nil
}

// Serve hands over, once, until ctx ends. It removes the socket, unless it has: the socket is the next daemon's then, which sees
// that this one is gone when Serve returns.
func (s *Server) Serve(ctx context.Context) error {
	defer func() {
		if !s.left.Load() {
			_ = os.Remove(s.path)
		}
	}()
	var conversations sync.WaitGroup
	defer conversations.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	closing := context.AfterFunc(ctx, func() { _ = s.ln.Close() })
	defer closing()
	for {
		conn, err := s.ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			<-ctx.Done()
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept the next daemon: %w", err)
		}
		conversations.Go(func() {
			defer conn.Close()
			if err := s.converse(ctx, wire{conn}); err != nil {
				s.log.Warn("hand over", "error", err)
			}
		})
	}
}

// converse is one hand-over, from the greeting on.
func (s *Server) converse(ctx context.Context, w wire) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	to, why := s.greet(w)
	if why == nil {
		select {
		case s.busy <- struct{}{}:
			defer func() { <-s.busy }()
		case <-time.After(ending):
			why = errors.New("another hand-over is under way")
		}
	}
	if why != nil {
		return errors.Join(why, w.send(greeting, refused, []byte(why.Error())))
	}
	estate, err := s.owner.Bequeath(ctx, to)
	if err != nil {
		return errors.Join(err, w.send(greeting, refused, []byte(err.Error())))
	}
	if err := s.give(w, estate); err != nil {
		clear(estate.Snapshot)
		s.owner.Resume(to, err)
		if !died(err) {
			_ = w.send(greeting, refused, []byte("it goes on itself: "+err.Error()))
		}
		return nil
	}
	s.left.Store(true)
	s.owner.Release(to)
	_ = s.ln.Close()
	if err := w.send(greeting, released, nil); err != nil && !died(err) {
		return err
	}
	<-ctx.Done()
	return nil
}

// greet finds out who comes.
func (s *Server) greet(w wire) (to Self, err error) {
	pid, err := peer(w.UnixConn)
	if err != nil {
		return to, err
	}
	_, body, _, err := w.receive(greeting, hello)
	if err != nil {
		return to, err
	}
	if err := json.Unmarshal(body, &to); err != nil {
		return to, fmt.Errorf("read who comes: %w", err)
	}
	to.PID = pid
	if why := mismatch(s.self, to); why != "" {
		return to, errors.New(why)
	}
	return to, nil
}

// give sends the estate, and waits until the other side serves.
func (s *Server) give(w wire, e *Estate) error {
	text, err := json.Marshal(s.self)
	if err != nil {
		return err
	}
	if err := w.send(greeting, hello, text); err != nil {
		return err
	}
	if err := w.sendEstate(e); err != nil {
		return err
	}
	clear(e.Snapshot) // keys
	err = w.await(patience, serving)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the other does not serve after %s: %w", patience, err)
	}
	return err
}

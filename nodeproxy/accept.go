package nodeproxy

import (
	"errors"
	"net"
	"time"
)

// The back-off of an accept that fails, as it does while the process is out of file descriptors.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = time.Second
)

// listener is the part of *net.TCPListener that accepting needs.
type listener interface {
	AcceptTCP() (*net.TCPConn, error)
	Addr() net.Addr
}

func (p *Proxy) accept(ln listener, serve func(*net.TCPConn)) {
	acceptAll(p, ln.Addr(), ln.AcceptTCP, serve)
}

// acceptAll calls serve for every connection of a listener, until that is closed. serve must not block.
//
// Errors of accept pass with time (a connection that was aborted, no file descriptor or memory left), so the loop waits
// a little longer after each and never gives a listener up. The connections wait in the backlog meanwhile.
func acceptAll[C net.Conn](p *Proxy, at net.Addr, accept func() (C, error), serve func(C)) {
	var backoff time.Duration
	for {
		conn, err := accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			backoff = 0
			serve(conn)
			continue
		}
		if backoff == 0 {
			p.cfg.Log.Warn("accept: new connections wait: raise the limit of open files (LimitNOFILE) if it is the cause", "listener", at, "error", err)
		}
		backoff = min(max(2*backoff, minAcceptBackoff), maxAcceptBackoff)
		time.Sleep(backoff)
	}
}

package nodeproxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/tunnel"
)

var (
	errStreamReset = errors.New("the other node reset the stream")
	errTunnelEnded = errors.New("the other node closed the tunnel")
	errDuplicate   = errors.New("the other node has seen this opening before, and may have passed on what it carried")
)

// link is one end of a tunnel: its TLS connection, the state of the protocol, and what was read and not used yet. It is
// the leg of the stream that is under way, and holds a buffer only while there are bytes in it.
type link struct {
	tls       *tls.Conn
	wire      *wire
	session   *tunnel.Session
	peer      mtls.Peer
	born      time.Time
	handshake time.Duration // of TLS, if it is yet to be told with a stream

	// Used by whoever reads.
	held     *buffer // nil when nothing is unread
	from, to int     // what is unread of held; from is never below headroom
	left     int     // how much of a body is not returned yet, of OPEN and DATA
	drained  bool    // no whole record is left of what has arrived

	// Used by whoever writes.
	unconfirmed int // how much was sent that the other side is not known to have read

	watching, finished atomic.Bool
}

// sureToBeRead is what the other side reads whatever its application does: so much, headroom included for each write, always
// fits the socket to it.
const sureToBeRead = 4 << 10

// newLink takes over conn, whose handshake was done over w.
func newLink(conn *tls.Conn, w *wire, peer mtls.Peer, server bool) *link {
	w.polling = true
	// Nothing can have been sent by a client before its handshake was done, and a server sends nothing first.
	return &link{tls: conn, wire: w, session: tunnel.NewSession(server), peer: peer, born: time.Now()}
}

// more waits for bytes. What is unread moves to the front; only then.
func (l *link) more() error {
	if l.drained {
		if err := l.wire.fill(); err != nil {
			return err
		}
	}
	if l.held == nil {
		l.held, l.from, l.to = l.wire.pool.get(), headroom, headroom
	} else {
		n := copy(l.held[headroom:], l.held[l.from:l.to])
		l.from, l.to = headroom, headroom+n
	}
	// A frame of the most bytes is read alone if it is the first: what follows then begins with a header.
	n, err := drain(l.tls, l.held[l.to:], maxRecord-headroom-plainSlack)
	l.to += n
	l.drained = errors.Is(err, os.ErrDeadlineExceeded)
	l.release()
	switch {
	case n > 0 || l.drained || err == nil:
		return nil // an error comes again
	case errors.Is(err, io.EOF):
		return errTunnelEnded
	}
	return err
}

// plainSlack is by how much the last record of a frame of the most bytes is smaller than others.
const plainSlack = chunk - plainChunk

// need waits until n bytes are unread, which must fit one record.
func (l *link) need(n int) error {
	for l.to-l.from < n {
		if err := l.more(); err != nil {
			return err
		}
	}
	return nil
}

// frame waits for a frame and takes its header.
func (l *link) frame() (h tunnel.Header, err error) {
	if err := l.need(tunnel.HeaderSize); err != nil {
		return h, err
	}
	if h, err = tunnel.ParseHeader(l.held[l.from:l.to]); err == nil {
		err = l.session.Receive(h)
	}
	l.from += tunnel.HeaderSize
	return h, err
}

// body takes n bytes of a body. They are valid until the next read.
func (l *link) body(n int) ([]byte, error) {
	if err := l.need(n); err != nil {
		return nil, err
	}
	l.from += n
	return l.held[l.from-n : l.from], nil
}

// skip passes over what is left of a body.
func (l *link) skip() error {
	for l.left > 0 {
		if _, err := l.next(); err != nil {
			return err
		}
		l.release()
	}
	return nil
}

func (l *link) next() ([]byte, error) {
	for {
		if l.left > 0 && l.from < l.to {
			n := min(l.left, l.to-l.from)
			p := l.held[l.from-headroom : l.from+n]
			l.from += n
			l.left -= n
			return p, nil
		}
		if l.left > 0 {
			if err := l.more(); err != nil {
				return nil, err
			}
			continue
		}
		h, err := l.frame()
		if err != nil {
			return nil, err
		}
		switch h.Type {
		case tunnel.Data:
			l.left = h.Length
		case tunnel.End:
			l.release()
			return nil, io.EOF
		default:
			return nil, errStreamReset
		}
	}
}

// release gives the buffer back if nothing in it is unread.
func (l *link) release() {
	if l.held != nil && l.from == l.to {
		l.wire.pool.put(l.held)
		l.held = nil
	}
}

func (l *link) write(p []byte) error {
	frame := p[headroom-tunnel.HeaderSize:]
	tunnel.Header{Type: tunnel.Data, Length: len(p) - headroom, Stream: l.session.Send(tunnel.Data)}.Put(frame)
	l.unconfirmed += len(p)
	return l.wire.seal(l.tls, frame)
}

// control sends a frame that carries nothing of the application's.
func (l *link) control(t tunnel.Type, body []byte) error {
	frame := make([]byte, tunnel.HeaderSize, tunnel.HeaderSize+tunnel.MaxReason)
	tunnel.Header{Type: t, Length: len(body), Stream: l.session.Send(t)}.Put(frame)
	return l.wire.seal(l.tls, append(frame, body...))
}

func (l *link) closeWrite() error { return l.control(tunnel.End, nil) }

// watch returns early when the stream is over; the OPEN of another may have been read by then.
func (l *link) watch() error {
	l.watching.Store(true)
	defer l.watching.Store(false)
	for !l.finished.Load() && !l.session.Idle() {
		if l.to-l.from >= tunnel.HeaderSize {
			if _, err := l.frame(); err != nil {
				return err
			}
			return errStreamReset // nothing else may follow END
		}
		if err := l.more(); err != nil && !l.session.Idle() {
			return err
		}
	}
	return nil // an error comes again
}

// close ends the stream. The link can be used for another one when ready says so.
func (l *link) close() {
	l.finished.Store(true)
	if l.watching.Load() {
		_ = l.wire.SetReadDeadline(time.Unix(1, 0)) // it fails only when all is lost anyway
	}
}

func (l *link) reset() { abort(l.wire.TCPConn) }

// ready makes l ready for another stream. It returns false if that cannot be: the last one did not end in order.
func (l *link) ready() bool {
	l.finished.Store(false)
	l.release()
	return l.session.Idle() && !l.session.Exhausted() && l.wire.SetDeadline(time.Time{}) == nil
}

// Born implements tunnel.Conn.
func (l *link) Born() time.Time { return l.born }

// Alive implements tunnel.Conn.
func (l *link) Alive() bool {
	if !l.drained && !l.look() {
		return false
	}
	return l.drained && l.held == nil && len(l.wire.unread) == 0 && l.wire.socket.quiet() && time.Now().Before(l.peer.Until())
}

// look reads what has arrived, without waiting. crypto/tls answers some records, for which a peer that reads nothing could
// make it wait for ever: no answer is sent, and a tunnel on which one was due is no good.
func (l *link) look() bool {
	if l.wire.TCPConn.SetWriteDeadline(time.Unix(1, 0)) != nil || l.more() != nil {
		return false
	}
	_, err := l.tls.Write(nil) // sends nothing, and fails if an answer did
	return err == nil && l.wire.TCPConn.SetWriteDeadline(time.Time{}) == nil
}

// Ping implements tunnel.Conn.
func (l *link) Ping(deadline time.Time) error {
	if err := l.wire.SetDeadline(deadline); err != nil {
		return err
	}
	if err := l.control(tunnel.Ping, make([]byte, tunnel.PingSize)); err != nil {
		return err
	}
	h, err := l.frame()
	if err != nil {
		return err
	}
	if _, err := l.body(h.Length); err != nil {
		return err
	}
	l.release()
	l.unconfirmed = 0
	return l.wire.SetDeadline(time.Time{})
}

// caughtUp says whether the other side has read the last stream, and asks if that is not sure. An OPEN behind bytes that its
// application does not read would be in doubt until that does.
func (l *link) caughtUp() bool {
	return l.unconfirmed <= sureToBeRead || l.Ping(time.Now().Add(tunnel.PingTimeout)) == nil
}

// Close implements tunnel.Conn. What was sent still arrives. There is no close_notify, which might have to wait, and without
// a stream it says nothing more than a FIN.
func (l *link) Close() { _ = l.wire.TCPConn.Close() }

// open asks for a stream. first is what the application has sent already, after headroom, or nil.
func (l *link) open(o tunnel.Opening, first []byte) error {
	if first == nil {
		first = make([]byte, headroom)
	}
	tunnel.Header{Type: tunnel.Open, Length: len(first) - tunnel.HeaderSize, Stream: l.session.Send(tunnel.Open)}.Put(first)
	o.Put(first[tunnel.HeaderSize:])
	l.unconfirmed = len(first)
	if err := l.wire.seal(l.tls, first); err != nil {
		return err
	}
	return l.answer()
}

// farRefusal is the REFUSED of another node.
type farRefusal struct{ reason catalog.Reason }

func (r *farRefusal) Error() string {
	if sentence := r.reason.Sentence(); sentence != "" {
		return "its node refused: " + sentence
	}
	return fmt.Sprintf("its node refused for the reason %q, which this version does not know", string(r.reason))
}

// answer waits for what becomes of an opening. A *farRefusal leaves the link ready for another one.
func (l *link) answer() error {
	h, err := l.frame()
	if err != nil {
		return err
	}
	switch h.Type {
	case tunnel.Accepted:
		l.release()
		return nil
	case tunnel.Refused:
		body, err := l.body(h.Length)
		if err != nil {
			return err
		}
		reason, err := tunnel.ParseReason(body)
		if err != nil {
			return err
		}
		l.release()
		l.unconfirmed = 0
		return &farRefusal{catalog.Reason(reason)}
	case tunnel.Duplicate:
		return errDuplicate
	}
	return errStreamReset
}

// awaitOpening waits until a time for the OPEN of the next stream, answering pings. A frame that has begun has no more than
// whole to arrive: it takes a buffer, which an idle tunnel has not. The first bytes of the application follow from next.
func (l *link) awaitOpening(until time.Time, whole time.Duration) (tunnel.Opening, error) {
	for {
		if err := l.need(1); err != nil {
			return tunnel.Opening{}, err
		}
		if by := time.Now().Add(whole); by.Before(until) {
			if err := l.wire.SetDeadline(by); err != nil {
				return tunnel.Opening{}, err
			}
		}
		h, err := l.frame()
		if err != nil {
			return tunnel.Opening{}, err
		}
		switch h.Type {
		case tunnel.Ping:
			body, err := l.body(h.Length)
			if err == nil {
				err = errors.Join(l.control(tunnel.Pong, body), l.wire.SetDeadline(until))
			}
			if err != nil {
				return tunnel.Opening{}, err
			}
			l.release()
		case tunnel.Open:
			body, err := l.body(tunnel.OpeningSize)
			if err != nil {
				return tunnel.Opening{}, err
			}
			o := tunnel.ParseOpening(body)
			l.left = h.Length - tunnel.OpeningSize
			l.release()
			return o, nil
		default:
			return tunnel.Opening{}, errStreamReset
		}
	}
}

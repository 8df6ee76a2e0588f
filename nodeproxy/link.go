package nodeproxy

import (
	"errors"
	"fmt"
	"io"
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

// link is one end of a tunnel: its connection, the state of the protocol, and what was read and not used yet. It is the leg of the
// stream that is under way.
type link struct {
	channel
	session   *tunnel.Session
	peer      mtls.Peer
	born      time.Time
	handshake time.Duration // of TLS, if it is yet to be told with a stream

	ending func() // is called when the other side says that its instance ends; nil: it never does

	// Used by whoever reads.
	left int     // how much of a body is not returned yet, of OPEN and DATA
	part [1]span // what next returned, if it is a part of a record

	// Used by whoever writes.
	unconfirmed int // how much was sent that the other side is not known to have read

	watching, finished atomic.Bool
}

// sureToBeRead is what the other side reads whatever its application does: so much, headroom included for each write, always
// fits the socket to it.
const sureToBeRead = 4 << 10

// newLink takes over w, over which the handshake with peer was done.
func newLink(w *wire, peer *mtls.Secured, server bool) *link {
	// Nothing can have been sent by a client before its handshake was done, and a server sends nothing first.
	return &link{channel: newChannel(w, peer.Records), session: tunnel.NewSession(server), peer: peer.Peer, born: time.Now()}
}

// more waits for more bytes. A close_notify is no end that a stream may have.
func (l *link) more() error {
	err := l.channel.more()
	if errors.Is(err, io.EOF) {
		return errTunnelEnded
	}
	return err
}

// has says whether n bytes are unread.
func (l *link) has(n int) bool { return batch{l.in, l.opened}.size() >= n }

// need waits until n bytes are unread that lie together. n is small.
func (l *link) need(n int) error {
	for !l.has(n) {
		if err := l.more(); err != nil {
			return err
		}
	}
	l.join(n)
	return nil
}

// take takes the first n bytes that are unread, and lie together.
func (l *link) take(n int) []byte {
	first := &l.opened[0]
	p := l.in.bytes[first.from : first.from+n]
	if first.from += n; first.from == first.to {
		l.opened = l.opened[1:]
	}
	return p
}

// frame waits for a frame and takes its header.
func (l *link) frame() (h tunnel.Header, err error) {
	if err := l.need(tunnel.HeaderSize); err != nil {
		return h, err
	}
	if h, err = tunnel.ParseHeader(l.take(tunnel.HeaderSize)); err == nil {
		err = l.session.Receive(h)
	}
	if err == nil && h.Type == tunnel.Ending {
		if l.ending != nil {
			l.ending()
		}
		return h, errTunnelEnded
	}
	return h, err
}

// body takes n bytes of a body. They are valid until the next read.
func (l *link) body(n int) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	if err := l.need(n); err != nil {
		return nil, err
	}
	return l.take(n), nil
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

func (l *link) next() (batch, error) {
	for {
		if l.left > 0 {
			if err := l.need(1); err != nil {
				return batch{}, err
			}
			return l.data(), nil
		}
		h, err := l.frame()
		if err != nil {
			return batch{}, err
		}
		switch h.Type {
		case tunnel.Data:
			l.left = h.Length
		case tunnel.End:
			l.release()
			return batch{}, io.EOF
		default:
			return batch{}, errStreamReset
		}
	}
}

// data takes what is unread of the body, in whole records but for the last.
func (l *link) data() batch {
	n := 0
	for n < len(l.opened) && l.opened[n].to-l.opened[n].from <= l.left {
		l.left -= l.opened[n].to - l.opened[n].from
		n++
	}
	if n > 0 {
		b := batch{l.in, l.opened[:n]}
		l.opened = l.opened[n:]
		return b
	}
	first := &l.opened[0]
	l.part[0] = span{first.from, first.from + l.left}
	first.from += l.left
	l.left = 0
	return batch{l.in, l.part[:]}
}

func (l *link) write(b batch) error {
	for _, s := range b.spans {
		frame := b.buf.bytes[s.from-tunnel.HeaderSize : s.to]
		tunnel.Header{Type: tunnel.Data, Length: s.to - s.from, Stream: l.session.Send(tunnel.Data)}.Put(frame)
		l.unconfirmed += headroom + s.to - s.from
		if err := l.seal(frame); err != nil {
			return err
		}
	}
	return nil
}

// control sends a frame that carries nothing of the application's.
func (l *link) control(t tunnel.Type, body []byte) error {
	frame := make([]byte, tunnel.HeaderSize, tunnel.HeaderSize+tunnel.MaxReason+1)
	tunnel.Header{Type: t, Length: len(body), Stream: l.session.Send(t)}.Put(frame)
	return l.seal(append(frame, body...))
}

func (l *link) closeWrite() error { return l.control(tunnel.End, nil) }

// watch returns early when the stream is over; the OPEN of another may have been read by then.
func (l *link) watch() error {
	l.watching.Store(true)
	defer l.watching.Store(false)
	for !l.finished.Load() && !l.session.Idle() {
		if l.has(tunnel.HeaderSize) {
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
		_ = l.conn.SetReadDeadline(time.Unix(1, 0)) // it fails only when all is lost anyway
	}
}

// ready makes l ready for another stream. It returns false if that cannot be: the last one did not end in order.
func (l *link) ready() bool {
	l.finished.Store(false)
	l.release()
	return l.session.Idle() && !l.session.Exhausted() && l.writable() && l.conn.SetDeadline(time.Time{}) == nil
}

// Born implements tunnel.Conn.
func (l *link) Born() time.Time { return l.born }

// Alive implements tunnel.Conn.
func (l *link) Alive() bool {
	if l.unseal() == nil && l.in == nil && l.kept == nil && l.socket.quiet() {
		return time.Now().Before(l.peer.Until())
	}
	l.hearEnding()
	return false
}

// hearEnding takes the last word of a tunnel without a stream on which something has come.
func (l *link) hearEnding() {
	if l.in == nil && !l.socket.quiet() && l.fill() == nil {
		_ = l.unseal()
	}
	if l.has(tunnel.HeaderSize) {
		_, _ = l.frame()
	}
}

// Ping implements tunnel.Conn.
func (l *link) Ping(deadline time.Time) error {
	if err := l.conn.SetDeadline(deadline); err != nil {
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
	return l.conn.SetDeadline(time.Time{})
}

// caughtUp says whether the other side has read the last stream, and asks if that is not sure. An OPEN behind bytes that its
// application does not read would be in doubt until that does.
func (l *link) caughtUp() bool {
	return l.unconfirmed <= sureToBeRead || l.Ping(time.Now().Add(tunnel.PingTimeout)) == nil
}

// Close implements tunnel.Conn. What was sent still arrives. There is no close_notify, which might have to wait, and without
// a stream it says nothing more than a FIN.
func (l *link) Close() { _ = l.conn.Close() }

// open asks for a stream. first is what the application has sent already, empty if that is nothing.
func (l *link) open(o tunnel.Opening, first batch) error {
	frame := make([]byte, headroom, headroom+1)
	if first.buf != nil {
		s := first.spans[0]
		frame = first.buf.bytes[s.from-headroom : s.to]
	}
	tunnel.Header{Type: tunnel.Open, Length: len(frame) - tunnel.HeaderSize, Stream: l.session.Send(tunnel.Open)}.Put(frame)
	o.Put(frame[tunnel.HeaderSize:])
	l.unconfirmed = len(frame)
	if err := l.seal(frame); err != nil {
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

// begins waits for the beginning of a frame, or of its first record.
func (l *link) begins() error {
	for l.in == nil {
		if err := l.fill(); err != nil {
			return err
		}
		if err := l.unseal(); err != nil {
			return err
		}
	}
	return nil
}

// awaitOpening waits until a time for the OPEN of the next stream, answering pings. A frame that has begun has no more than
// whole to arrive: it takes a buffer, which an idle tunnel has not. The first bytes of the application follow from next.
func (l *link) awaitOpening(until time.Time, whole time.Duration) (tunnel.Opening, error) {
	for {
		if err := l.begins(); err != nil {
			return tunnel.Opening{}, err
		}
		if by := time.Now().Add(whole); by.Before(until) {
			if err := l.conn.SetDeadline(by); err != nil {
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
				err = errors.Join(l.control(tunnel.Pong, body), l.conn.SetDeadline(until))
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

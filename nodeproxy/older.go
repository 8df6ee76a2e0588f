package nodeproxy

import (
	"crypto/tls"
	"errors"
	"os"
)

// olderLeg is a connection to a peer over TLS 1.2, or of any version whose records crypto/tls protects; see mtls.Secured.
type olderLeg struct {
	tls     *tls.Conn
	wire    *wire
	held    *buffer
	drained bool // no whole record is left of what has arrived
}

// newOlderLeg takes over conn, whose handshake was done over w.
func newOlderLeg(conn *tls.Conn, w *wire) *olderLeg {
	w.polling = true
	return &olderLeg{tls: conn, wire: w}
}

func (l *olderLeg) next() (batch, error) {
	for {
		if l.drained {
			if err := l.wire.fill(); err != nil {
				return batch{}, err
			}
		}
		buf := l.wire.pool.get()
		n, err := l.drain(buf.bytes[headroom:])
		if n > 0 {
			l.held = buf
			buf.spans[0] = span{headroom, headroom + n}
			return batch{buf, buf.spans[:1]}, nil // an error comes again with the next call
		}
		l.wire.pool.put(buf)
		if !l.drained {
			return batch{}, err
		}
	}
}

// drain reads all records that have arrived whole, as long as buf has room.
func (l *olderLeg) drain(buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var got int
		got, err = l.tls.Read(buf[n:])
		n += got
	}
	l.drained = errors.Is(err, os.ErrDeadlineExceeded)
	return n, err
}

func (l *olderLeg) release() {
	if l.held != nil {
		l.wire.pool.put(l.held)
		l.held = nil
	}
}

func (l *olderLeg) write(b batch) error {
	for _, s := range b.spans {
		if err := l.wire.seal(l.tls, b.buf.bytes[s.from:s.to]); err != nil {
			return err
		}
	}
	return nil
}

// closeWrite sends a close_notify alone, as channel's.
func (l *olderLeg) closeWrite() error { return l.tls.CloseWrite() }
func (l *olderLeg) waits() *socket    { return nil }
func (l *olderLeg) watch() error      { return l.wire.socket.watch() }
func (l *olderLeg) close()            { _ = l.wire.Close() }
func (l *olderLeg) reset()            { abort(l.wire.TCPConn) }

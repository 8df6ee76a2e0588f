package nodeproxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// leg is one of the two connections that a relay joins. One goroutine calls next, release and watch, another write and
// closeWrite; close and reset may be called by any.
type leg interface {
	// next waits for bytes without holding a buffer, and returns as many as are there, after headroom that means nothing.
	// They are valid until release. io.EOF is an orderly half-close by the peer, any other error the end of the connection.
	next() ([]byte, error)
	release()
	// write sends what another leg's next returned. It may change the headroom.
	write(p []byte) error
	// closeWrite tells the peer that there will be no more bytes; it can still be read from.
	closeWrite() error
	// watch waits, after next returned io.EOF, until the connection fails or is closed here.
	watch() error

	close() // orderly: what was written still arrives
	reset() // the peer sees a reset, and no close_notify
}

// keepAlive is what all legs have that lead to another kernel: a peer that vanished from an idle connection is noticed within 90 s.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6}

// abort closes conn so that its peer sees a reset. A unix socket has none: its peer gets one only if it left bytes unread.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // it fails only when conn is closed already
	}
	_ = conn.Close()
}

// plainConn is what an application's connection can be.
type plainConn interface {
	net.Conn
	syscall.Conn
}

// plainLeg is a connection to an application: a *net.TCPConn or a *net.UnixConn.
type plainLeg struct {
	conn   plainConn
	socket *socket
	held   *buffer
	early  []byte // what first returned and next did not
	ended  error  // what first met: the kernel tells of a reset only once
}

func newPlainLeg(conn net.Conn, pool *buffers) (*plainLeg, error) {
	plain, ok := conn.(plainConn)
	if !ok {
		return nil, errors.New("the connection can not be half-closed")
	}
	socket, err := newSocket(plain, pool)
	if err != nil {
		return nil, err
	}
	return &plainLeg{conn: plain, socket: socket}, nil
}

func (l *plainLeg) next() ([]byte, error) {
	if p := l.early; p != nil {
		l.early = nil
		return p, nil
	}
	if l.ended != nil {
		return nil, l.ended
	}
	buf, n, err := l.socket.read(headroom, headroom+plainChunk)
	if err != nil {
		return nil, err
	}
	l.held = buf
	return buf[:headroom+n], nil
}

// first returns what next will, without waiting and no more than limit bytes: nil when there is nothing yet. What was
// passed on by other means is not for next any more after release.
func (l *plainLeg) first(limit int) []byte {
	if l.early != nil || l.ended != nil {
		return l.early
	}
	buf, n, err := l.socket.poll(headroom, headroom+limit)
	if err != nil || buf == nil {
		l.ended = err
		return nil
	}
	l.held, l.early = buf, buf[:headroom+n]
	return l.early
}

func (l *plainLeg) release() {
	if l.held != nil {
		l.socket.pool.put(l.held)
		l.held, l.early = nil, nil
	}
}

func (l *plainLeg) write(p []byte) error { return l.socket.write(p[headroom:]) }
func (l *plainLeg) closeWrite() error    { return l.socket.closeWrite() }
func (l *plainLeg) watch() error         { return l.socket.watch() }
func (l *plainLeg) close()               { _ = l.conn.Close() }
func (l *plainLeg) reset()               { abort(l.conn) }

// secureLeg is a connection to a peer over TLS, its handshake done.
type secureLeg struct {
	tls     *tls.Conn
	wire    *wire
	held    *buffer
	drained bool // no whole record is left of what has arrived
}

// newSecureLeg takes over conn, whose handshake was done over w.
func newSecureLeg(conn *tls.Conn, w *wire) *secureLeg {
	w.polling = true
	return &secureLeg{tls: conn, wire: w}
}

func (l *secureLeg) next() ([]byte, error) {
	for {
		if l.drained {
			if err := l.wire.fill(); err != nil {
				return nil, err
			}
		}
		buf := l.wire.pool.get()
		n, err := drain(l.tls, buf[headroom:], 1)
		l.drained = errors.Is(err, os.ErrDeadlineExceeded)
		if n > 0 {
			l.held = buf
			return buf[:headroom+n], nil // an error comes again with the next call
		}
		l.wire.pool.put(buf)
		if !l.drained {
			return nil, err
		}
	}
}

// drain reads all records that have arrived whole, as long as least bytes are free. os.ErrDeadlineExceeded means that there
// is no more.
func drain(conn *tls.Conn, buf []byte, least int) (n int, err error) {
	for len(buf)-n >= least && err == nil {
		var got int
		got, err = conn.Read(buf[n:])
		n += got
	}
	return n, err
}

func (l *secureLeg) release() {
	if l.held != nil {
		l.wire.pool.put(l.held)
		l.held = nil
	}
}

func (l *secureLeg) write(p []byte) error { return l.wire.seal(l.tls, p[headroom:]) }

// closeWrite sends a close_notify alone. A FIN after it would say nothing more, and make connection trackers on the way
// forget a half-closed connection within minutes.
func (l *secureLeg) closeWrite() error { return l.tls.CloseWrite() }
func (l *secureLeg) watch() error      { return l.wire.socket.watch() }
func (l *secureLeg) close()            { _ = l.wire.Close() }
func (l *secureLeg) reset()            { abort(l.wire.TCPConn) }

// splice copies between two applications' connections inside the kernel, until src ends.
func splice(dst, src *plainLeg) (int64, error) { return io.Copy(dst.conn, src.conn) }

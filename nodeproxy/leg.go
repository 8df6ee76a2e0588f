package nodeproxy

import (
	"errors"
	"io"
	"net"
	"syscall"
	"time"
)

// leg is one of the two connections that a relay joins. One goroutine calls next, release and watch, another write and
// closeWrite; close and reset may be called by any.
type leg interface {
	// next waits for bytes without holding a buffer, and returns as many as are there. They are valid until release. io.EOF is
	// an orderly half-close by the peer, any other error the end of the connection.
	next() (batch, error)
	release()
	// waits is the socket that next waits for and holds nothing else for meanwhile, so that it may be interrupted and called again; nil if there
	// is none such.
	waits() *socket
	// write sends what another leg's next returned. It may change the headroom, and the spans.
	write(b batch) error
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
	early  batch // what first returned and next did not
	ended  error // what first met: the kernel tells of a reset only once
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

func (l *plainLeg) next() (batch, error) {
	if b := l.early; b.buf != nil {
		l.early = batch{}
		return b, nil
	}
	if l.ended != nil {
		return batch{}, l.ended
	}
	buf, n, err := l.socket.read(nil, headroom, headroom+plainChunk)
	if err != nil {
		return batch{}, err
	}
	return l.hold(buf, n), nil
}

func (l *plainLeg) hold(buf *buffer, n int) batch {
	l.held = buf
	buf.spans[0] = span{headroom, headroom + n}
	return batch{buf, buf.spans[:1]}
}

// first returns what next will, without waiting and no more than limit bytes: an empty batch when there is nothing yet. What was
// passed on by other means is not for next any more after release.
func (l *plainLeg) first(limit int) batch {
	if l.early.buf != nil || l.ended != nil {
		return l.early
	}
	buf, n, err := l.socket.poll(nil, headroom, headroom+limit)
	if err != nil || buf == nil {
		l.ended = err
		return batch{}
	}
	l.early = l.hold(buf, n)
	return l.early
}

func (l *plainLeg) release() {
	if l.held != nil {
		l.socket.pool.put(l.held)
		l.held, l.early = nil, batch{}
	}
}

func (l *plainLeg) waits() *socket      { return l.socket }
func (l *plainLeg) write(b batch) error { return l.socket.write(b) }
func (l *plainLeg) closeWrite() error   { return l.socket.closeWrite() }
func (l *plainLeg) watch() error        { return l.socket.watch() }
func (l *plainLeg) close()              { _ = l.conn.Close() }
func (l *plainLeg) reset()              { abort(l.conn) }

// splice copies between two applications' connections inside the kernel, until src ends.
func splice(dst, src *plainLeg) (int64, error) { return io.Copy(dst.conn, src.conn) }

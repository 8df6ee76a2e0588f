package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// stream is a client's connection, and one to the name server that it asked once a query is not ours. Messages have a
// length before them (RFC 1035, 4.2.2). What the name server says is passed on as it comes, so that zone transfers and
// answers out of order work.
type stream struct {
	*space
	client   *net.TCPConn
	from     netip.Addr
	resolver netip.AddrPort

	writing sync.Mutex // of the client
	passing sync.WaitGroup

	mu       sync.Mutex
	upstream *net.TCPConn // nil: not needed yet
	asked    int          // queries on their way
	ended    bool
}

// serve reads queries until the client has no more or nothing has moved for streamIdle.
func (st *stream) serve() error {
	defer st.passing.Wait()
	for {
		query, err := st.read(st.client)
		if errors.Is(err, io.EOF) && st.upstream != nil {
			return st.upstream.CloseWrite() // its answers may still come
		}
		if err != nil {
			st.end()
			return ignoreIdle(err)
		}
		reply, verdict := st.zone.Load().Answer(query, true)
		if verdict == Foreign {
			err = st.pass(query)
		} else {
			st.count(verdict)
			err = st.write(reply)
		}
		if err != nil {
			st.end()
			return err
		}
	}
}

// ignoreIdle is nil for the ways in which a connection ends that nobody uses any more.
func ignoreIdle(err error) error {
	if timeout, ok := errors.AsType[net.Error](err); errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || ok && timeout.Timeout() {
		return nil
	}
	return err
}

// pass sends a query on to the name server.
func (st *stream) pass(query []byte) error {
	if st.upstream == nil {
		ctx, cancel := context.WithTimeout(st.ctx, forwardTimeout)
		defer cancel()
		conn, err := st.DialStream(ctx, st.from, st.resolver)
		if err != nil {
			return err
		}
		st.mu.Lock()
		st.upstream = conn
		ended := st.ended
		st.mu.Unlock()
		st.passing.Go(func() { st.passBack(conn) })
		if ended {
			st.end()
		}
	}
	st.await(1)
	return write(st.upstream, query)
}

// passBack passes the name server's answers on until it ends. The client would see the same end without us.
func (st *stream) passBack(conn *net.TCPConn) {
	defer st.protect()
	defer st.end()
	for {
		reply, err := st.read(conn)
		if err != nil {
			return
		}
		if st.write(reply) != nil {
			return
		}
		st.forwarded.Add(1)
		st.await(-1)
	}
}

// await counts the queries on their way. A zone comes in more answers than were asked for.
func (st *stream) await(more int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.asked = max(0, st.asked+more)
}

// end cuts both connections off.
func (st *stream) end() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.ended = true
	st.client.Close()
	if st.upstream != nil {
		st.upstream.Close()
	}
}

// read reads a message from one side. Both sides get time again: one may be busy while the other waits.
func (st *stream) read(conn *net.TCPConn) ([]byte, error) {
	st.extend()
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(conn, message)
	return message, err
}

func (st *stream) extend() {
	st.mu.Lock()
	defer st.mu.Unlock()
	idle := streamIdle
	switch {
	case st.leaving.Err() == nil:
	case st.asked > 0:
		idle = forwardTimeout
	default:
		idle = lastIdle
	}
	deadline := time.Now().Add(idle)
	_ = st.client.SetReadDeadline(deadline) // a connection that is closed says so when it is read
	if st.upstream != nil {
		_ = st.upstream.SetReadDeadline(deadline)
	}
}

// write answers the client.
func (st *stream) write(reply []byte) error {
	if reply == nil {
		return errors.New("the client sent what is no query")
	}
	st.writing.Lock()
	defer st.writing.Unlock()
	return write(st.client, reply)
}

func write(conn *net.TCPConn, message []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(forwardTimeout)); err != nil {
		return err
	}
	_, err := conn.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(message)), uint16(len(message))), message...))
	return err
}

// read receives one datagram without waiting; done is false when there is none.
func read(fd int, b []byte) (n int, done bool, err error) {
	for {
		n, err = syscall.Read(fd, b)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return 0, false, nil
		default:
			return max(n, 0), true, err
		}
	}
}

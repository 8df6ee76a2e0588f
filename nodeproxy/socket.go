package nodeproxy

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"nodeproxy.io/nodeproxy/tunnel"
)

// chunk is how much one system call writes: with TLS records of at most 16 KiB each, several per call.
const chunk = 64 << 10

// plainChunk is how much plaintext still fits one chunk when it is sealed: four records, with headers and tags. A frame of a
// tunnel carries as much.
const plainChunk = tunnel.MaxBody

// headroom is what a leg leaves free before the bytes that it read, for the header that another may write there.
const headroom = tunnel.HeaderSize + tunnel.OpeningSize

// maxSpans is how many records are opened at once.
const maxSpans = 64

// buffer is more than a chunk, so that a record's beginning behind one fits too, and notes on what is where.
type buffer struct {
	bytes [72<<10 - maxSpans*16]byte
	spans [maxSpans]span
}

// upTo is the first n bytes of b.
func (b *buffer) upTo(n int) batch {
	b.spans[0] = span{0, n}
	return batch{b, b.spans[:1]}
}

// span is a part of a buffer.
type span struct{ from, to int }

// batch is bytes of a connection in their order. The headroom before each span means nothing, once the spans before it are used.
type batch struct {
	buf   *buffer
	spans []span
}

func (b batch) size() (n int) {
	for _, s := range b.spans {
		n += s.to - s.from
	}
	return n
}

// buffers lends buffers. A connection holds one only while it has bytes in hand: ten thousand idle ones hold none.
type buffers struct{ pool sync.Pool }

func newBuffers() *buffers {
	return &buffers{pool: sync.Pool{New: func() any { return new(buffer) }}}
}

func (b *buffers) get() *buffer  { return b.pool.Get().(*buffer) }
func (b *buffers) put(p *buffer) { b.pool.Put(p) }

// socket reads and writes a connected socket of the runtime's poller, with no allocation for a call. One goroutine may
// read while another writes.
//
// The socket never blocks, so its system calls are not announced to the scheduler: that costs more than a small read.
type socket struct {
	conn pollable
	raw  syscall.RawConn
	pool *buffers

	reading reading
	writing writing
}

// reading and writing are the arguments and results of one call, and the function that the poller calls back, which
// would be an allocation each if they were made for the call.
type reading struct {
	from, to int // of the buffer
	poll     bool
	into     *buffer // nil for one of the pool
	buf      *buffer
	n        int
	err      error
	ready    func(fd uintptr) (done bool)
}

type writing struct {
	left  batch
	err   error
	ready func(fd uintptr) (done bool)
}

// pollable is a *net.TCPConn or a *net.UnixConn.
type pollable interface {
	syscall.Conn
	SetReadDeadline(t time.Time) error
}

func newSocket(conn pollable, pool *buffers) (*socket, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{conn: conn, raw: raw, pool: pool}
	s.reading.ready, s.writing.ready = s.readReady, s.writeReady
	return s, nil
}

// read waits until the socket is readable and reads into buf, from one place to another; if into is nil it takes a buffer, only then. The
// buffer is the caller's. The end of the stream is io.EOF.
func (s *socket) read(into *buffer, from, to int) (buf *buffer, n int, err error) {
	r := &s.reading
	r.into, r.from, r.to, r.poll = into, from, to, false
	return s.doRead()
}

// poll is read that does not wait: it returns no buffer and no error when there is nothing to read.
func (s *socket) poll(into *buffer, from, to int) (buf *buffer, n int, err error) {
	r := &s.reading
	r.into, r.from, r.to, r.poll = into, from, to, true
	return s.doRead()
}

func (s *socket) doRead() (buf *buffer, n int, err error) {
	r := &s.reading
	if err := s.raw.Read(r.ready); err != nil {
		r.into = nil
		return nil, 0, err
	}
	buf, n, err = r.buf, r.n, r.err
	r.into, r.buf = nil, nil
	return buf, n, err
}

func (s *socket) readReady(fd uintptr) (done bool) {
	r := &s.reading
	r.buf, r.n, r.err = r.into, 0, nil
	if r.into == nil {
		r.buf = s.pool.get()
	}
	n, errno := transferBytes(syscall.SYS_READ, fd, r.buf.bytes[r.from:r.to])
	if n > 0 {
		r.n = n
		return true
	}
	if r.into == nil {
		s.pool.put(r.buf)
	}
	r.buf = nil
	switch errno {
	case 0:
		r.err = io.EOF
	case syscall.EAGAIN:
		return r.poll
	default:
		r.err = os.NewSyscallError("read", errno)
	}
	return true
}

// interrupt has reads fail with os.ErrDeadlineExceeded, the one that waits too, until goOn.
func (s *socket) interrupt() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) } // it fails only when the socket is closed
func (s *socket) goOn()      { _ = s.conn.SetReadDeadline(time.Time{}) }

// quiet says whether the socket has nothing to read and is not closed, without waiting.
func (s *socket) quiet() bool {
	var errno syscall.Errno
	err := s.raw.Control(func(fd uintptr) {
		var b [1]byte
		const flags = syscall.MSG_PEEK | syscall.MSG_DONTWAIT
		_, _, errno = syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b)), 1, flags, 0, 0)
	})
	return err == nil && errno == syscall.EAGAIN
}

// write sends all of b, whose spans it changes.
func (s *socket) write(b batch) error {
	w := &s.writing
	w.left, w.err = b, nil
	waitErr := s.raw.Write(w.ready)
	w.left = batch{}
	return errors.Join(waitErr, w.err)
}

func (s *socket) writeReady(fd uintptr) (done bool) {
	w := &s.writing
	for len(w.left.spans) > 0 {
		n, errno := gather(fd, w.left)
		switch errno {
		case 0:
			w.left.skip(n)
		case syscall.EAGAIN:
			return false
		default:
			w.err = os.NewSyscallError("write", errno)
			return true
		}
	}
	return true
}

// skip takes the first n bytes from b.
func (b *batch) skip(n int) {
	for n > 0 {
		first := &b.spans[0]
		m := min(n, first.to-first.from)
		n -= m
		if first.from += m; first.from == first.to {
			b.spans = b.spans[1:]
		}
	}
}

// gather writes what it can of b, which must not be empty, with one system call.
func gather(fd uintptr, b batch) (n int, errno syscall.Errno) {
	first := b.spans[0]
	if len(b.spans) == 1 {
		return transferBytes(syscall.SYS_WRITE, fd, b.buf.bytes[first.from:first.to])
	}
	var parts [maxSpans]syscall.Iovec
	count := 0
	for _, s := range b.spans[:min(len(b.spans), len(parts))] {
		parts[count].Base = &b.buf.bytes[s.from]
		parts[count].SetLen(s.to - s.from)
		count++
	}
	for {
		r, _, errno := syscall.RawSyscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&parts)), uintptr(count))
		if errno != syscall.EINTR {
			return int(r), errno
		}
	}
}

// offer writes what it can of p without waiting.
func (s *socket) offer(p []byte) {
	_ = s.raw.Control(func(fd uintptr) { _, _ = transferBytes(syscall.SYS_WRITE, fd, p) }) // it fails only when the socket is closed
}

// closeWrite tells the peer that there will be no more bytes.
func (s *socket) closeWrite() error {
	var errno syscall.Errno
	err := s.raw.Control(func(fd uintptr) { _, _, errno = syscall.RawSyscall(syscall.SYS_SHUTDOWN, fd, syscall.SHUT_WR, 0) })
	if err == nil && errno != 0 {
		err = os.NewSyscallError("shutdown", errno)
	}
	return err
}

// watch returns when the socket has an error pending, or is closed here.
func (s *socket) watch() error {
	var failed syscall.Errno
	err := s.raw.Read(func(fd uintptr) bool {
		failed = pendingError(fd)
		return failed != 0 // else until the next event of the socket
	})
	if err == nil {
		err = failed
	}
	return err
}

// pendingError is SO_ERROR, or why it cannot be asked for.
func pendingError(fd uintptr) syscall.Errno {
	var pending int32
	size := uint32(unsafe.Sizeof(pending))
	_, _, errno := syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, syscall.SO_ERROR, uintptr(unsafe.Pointer(&pending)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return syscall.Errno(pending)
}

// transferBytes is read(2) or write(2) of p, which must not be empty.
func transferBytes(trap, fd uintptr, p []byte) (n int, errno syscall.Errno) {
	for {
		r, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		if errno != syscall.EINTR {
			return int(r), errno
		}
	}
}

package nodeproxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// chunk is how much one system call reads or writes: with TLS records of at most 16 KiB each, several per call.
const chunk = 64 << 10

// plainChunk is how much plaintext still fits one chunk when it is sealed: four records, with headers and tags.
const plainChunk = chunk - 512

// buffer is one chunk.
type buffer [chunk]byte

// buffers lends chunks. A connection holds one only while it has bytes in hand: ten thousand idle ones hold none.
type buffers struct{ pool sync.Pool }

func newBuffers() *buffers {
	return &buffers{pool: sync.Pool{New: func() any { return new(buffer) }}}
}

func (b *buffers) get() *buffer  { return b.pool.Get().(*buffer) }
func (b *buffers) put(p *buffer) { b.pool.Put(p) }

// read waits until raw is readable, and only then takes a buffer and reads up to limit bytes into it. The buffer is the
// caller's. The end of the stream is io.EOF.
func (b *buffers) read(raw syscall.RawConn, limit int) (buf *buffer, n int, err error) {
	waitErr := raw.Read(func(fd uintptr) (done bool) {
		buf = b.get()
		for {
			n, err = syscall.Read(int(fd), buf[:limit])
			if !errors.Is(err, syscall.EINTR) {
				break
			}
		}
		if n > 0 {
			return true
		}
		b.put(buf)
		buf = nil
		if errors.Is(err, syscall.EAGAIN) {
			return false
		}
		if err == nil {
			err = io.EOF
		}
		return true
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return buf, max(n, 0), err
}

// errTruncated is a peer that closed TCP without a close_notify: what it sent may not be all that it meant to send.
var errTruncated = errors.New("the peer closed the connection without a TLS close_notify")

// wire is the net.Conn below a tls.Conn. crypto/tls reads and writes a record at a time; wire makes one system call of
// many records, and holds a buffer only while there are bytes in it.
//
// One goroutine may read while others write.
type wire struct {
	*net.TCPConn
	raw  syscall.RawConn
	pool *buffers

	// Used by whoever reads.
	in      *buffer // nil when unread is empty
	unread  []byte
	polling bool // an empty Read returns os.ErrDeadlineExceeded instead of waiting: fill waits

	mu     sync.Mutex
	first  func() // called before the first Write, if not nil
	corked bool
	out    *buffer // nil when pending is 0
	queued int
}

func newWire(conn *net.TCPConn, pool *buffers) (*wire, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &wire{TCPConn: conn, raw: raw, pool: pool}, nil
}

// Read returns what was received. While polling it never waits: crypto/tls keeps its state when a read runs into a
// deadline, so it can be called again after fill.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.unread) == 0 {
		if w.polling {
			return 0, os.ErrDeadlineExceeded
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.unread)
	w.unread = w.unread[n:]
	if len(w.unread) == 0 {
		w.pool.put(w.in)
		w.in = nil
	}
	return n, nil
}

// fill waits for bytes and keeps them for Read, which must have returned all it had. The end of the stream is
// errTruncated, because crypto/tls takes an io.EOF between two records for an orderly end, which only a close_notify is.
func (w *wire) fill() error {
	buf, n, err := w.pool.read(w.raw, chunk)
	if errors.Is(err, io.EOF) {
		return errTruncated
	}
	if err != nil {
		return err
	}
	w.in, w.unread = buf, buf[:n]
	return nil
}

// SetWriteDeadline does nothing once the handshake is done. crypto/tls gives a close_notify five seconds and then fails,
// but a peer that reads slowly may take longer, and what it has not read yet must not be lost.
func (w *wire) SetWriteDeadline(t time.Time) error {
	if w.polling {
		return nil
	}
	return w.TCPConn.SetWriteDeadline(t)
}

// Write sends p, or keeps it until uncork.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first != nil {
		w.first()
		w.first = nil
	}
	if !w.corked {
		return w.TCPConn.Write(p)
	}
	if w.queued+len(p) > chunk {
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	if len(p) > chunk {
		return w.TCPConn.Write(p)
	}
	if w.out == nil {
		w.out = w.pool.get()
	}
	w.queued += copy(w.out[w.queued:], p)
	return len(p), nil
}

// cork keeps what is written until uncork.
func (w *wire) cork() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corked = true
}

// uncork sends all that was kept, with one system call.
func (w *wire) uncork() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corked = false
	return w.flush()
}

func (w *wire) flush() error {
	if w.out == nil {
		return nil
	}
	_, err := w.TCPConn.Write(w.out[:w.queued])
	w.pool.put(w.out)
	w.out, w.queued = nil, 0
	return err
}

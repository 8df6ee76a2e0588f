package nodeproxy

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/mtls"
)

// maxRecord is how much plaintext one TLS record carries.
const maxRecord = 16 << 10

// errTruncated is a peer that closed TCP without a close_notify: what it sent may not be all that it meant to send.
var errTruncated = errors.New("the peer closed the connection without a TLS close_notify")

// errNoKeyShare is a client whose hello has a key share of no group that we have. TLS 1.3 would ask it for another hello, which
// then would be answered whoever's turn it is.
var errNoKeyShare = errors.New("the hello has no key share of a supported group, and no HelloRetryRequest (RFC 8446, 4.1.4) is sent")

// retryRequest is the random of a HelloRetryRequest (RFC 8446, 4.1.3).
var retryRequest = sha256.Sum256([]byte("HelloRetryRequest"))

// isRetryRequest says whether a record begins with a HelloRetryRequest.
func isRetryRequest(record []byte) bool {
	const handshake, serverHello, random = 22, 2, 11
	return len(record) >= random+len(retryRequest) && record[0] == handshake && record[5] == serverHello && bytes.Equal(record[random:][:len(retryRequest)], retryRequest[:])
}

// wire is the net.Conn below a tls.Conn: during a handshake, and for TLS 1.2 after it too. crypto/tls reads and writes a record at
// a time; wire makes one system call of many records, and holds a buffer only while there are bytes in it.
//
// One goroutine may read while others write.
type wire struct {
	*net.TCPConn
	socket *socket
	pool   *buffers

	// Used by whoever reads.
	in       *buffer // nil when nothing is unread
	from, to int     // what is unread of in
	polling  bool    // an empty Read returns os.ErrDeadlineExceeded instead of waiting: fill waits

	mu     sync.Mutex
	first  func() // called before the first Write, if not nil
	corked bool
	out    *buffer // nil when pending is 0
	queued int
}

// leg is the connection to a peer whose handshake was done over w, without a tunnel.
func (w *wire) leg(peer *mtls.Secured) leg {
	if peer.Older != nil {
		return newOlderLeg(peer.Older, w)
	}
	return &secureLeg{newChannel(w, peer.Records)}
}

func newWire(conn *net.TCPConn, pool *buffers) (*wire, error) {
	socket, err := newSocket(conn, pool)
	if err != nil {
		return nil, err
	}
	return &wire{TCPConn: conn, socket: socket, pool: pool}, nil
}

// Read returns what was received. While polling it never waits: crypto/tls keeps its state when a read runs into a
// deadline, so it can be called again after fill.
func (w *wire) Read(p []byte) (int, error) {
	if w.in == nil {
		if w.polling {
			return 0, os.ErrDeadlineExceeded
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.in.bytes[w.from:w.to])
	if w.from += n; w.from == w.to {
		w.pool.put(w.in)
		w.in = nil
	}
	return n, nil
}

// fill waits for bytes and keeps them for Read, which must have returned all it had. The end of the stream is
// errTruncated, because crypto/tls takes an io.EOF between two records for an orderly end, which only a close_notify is.
func (w *wire) fill() error {
	buf, n, err := w.socket.read(nil, headroom, headroom+chunk)
	if errors.Is(err, io.EOF) {
		return errTruncated
	}
	if err != nil {
		return err
	}
	w.in, w.from, w.to = buf, headroom, headroom+n
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
		if isRetryRequest(p) {
			return 0, errNoKeyShare
		}
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
	if w.out == nil {
		w.out = w.pool.get()
	}
	w.queued += copy(w.out.bytes[w.queued:], p)
	return len(p), nil
}

// cork keeps what is written until uncork.
func (w *wire) cork() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corked = true
}

// seal sends p over conn, which writes to w: whatever its size, with one system call for a chunk.
func (w *wire) seal(conn *tls.Conn, p []byte) error {
	if len(p) <= maxRecord {
		_, err := conn.Write(p)
		return err
	}
	w.cork()
	_, err := conn.Write(p)
	return errors.Join(err, w.uncork())
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
	err := w.socket.write(w.out.upTo(w.queued))
	w.pool.put(w.out)
	w.out, w.queued = nil, 0
	return err
}

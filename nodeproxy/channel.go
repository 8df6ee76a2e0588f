package nodeproxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"nodeproxy.io/nodeproxy/mtls/record"
)

// channel is a connection to a peer whose TLS 1.3 handshake is done. Records are opened where they were received, and sealed from
// where they were read into what is sent. It holds a buffer only while it has bytes to go on with: what waits for the rest of a
// record, or of what is read at once, takes its own size.
//
// One goroutine may read while another writes.
type channel struct {
	conn    *net.TCPConn
	socket  *socket
	records *record.Layer

	// Used by whoever reads.
	in       *buffer // nil when nothing is in hand
	opened   []span  // of in, what is opened and not used: a part of in.spans
	from, to int     // of in, what was received and is not opened
	kept     []byte  // what was in hand when the wait for more began; in is nil then
	keptOpen int     // how much of kept is opened
	told     bool    // the peer was told of its violation

	mu     sync.Mutex // of who writes
	closed error      // why nothing may be written any more
}

// errClosedWrite is what follows a close_notify.
var errClosedWrite = errors.New("the connection was closed for writing")

// newChannel takes over w, with what it has received and not read.
func newChannel(w *wire, records *record.Layer) channel {
	return channel{conn: w.TCPConn, socket: w.socket, records: records, in: w.in, from: w.from, to: w.to}
}

// more opens records until there is more data than there was, and waits if it must.
func (c *channel) more() error {
	for had := c.unread(); ; {
		err := c.unseal()
		if c.unread() > had {
			return nil // an error comes again
		}
		if err == nil {
			err = c.fill()
		}
		if err != nil {
			return err
		}
	}
}

// unread is how many bytes are opened and not used.
func (c *channel) unread() int { return batch{c.in, c.opened}.size() + c.keptOpen }

// unseal opens the records that have arrived whole, as many as in has spans for.
func (c *channel) unseal() error {
	if c.in == nil {
		_, _, err := c.records.Open(nil) // an error comes again
		return err
	}
	c.opened = c.in.spans[:copy(c.in.spans[:], c.opened)]
	for len(c.opened) < maxSpans {
		n, size, err := c.records.Open(c.in.bytes[c.from:c.to])
		if err != nil {
			c.tell(err)
			c.from = c.to // nothing more is read
			c.release()
			return err
		}
		if n == 0 {
			break
		}
		if size > 0 {
			begin := c.from + record.HeaderSize
			c.opened = append(c.opened, span{begin, begin + size})
		}
		c.from += n
	}
	c.release()
	return nil
}

// fill waits for bytes. What is in hand moves to the front: less than a record of it is not opened. The end of the stream is
// errTruncated: an orderly one is a close_notify.
func (c *channel) fill() error {
	if c.in != nil {
		c.compact()
		buf, n, err := c.socket.poll(c.in, c.to, len(c.in.bytes))
		c.to += n
		if buf != nil || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return truncated(err)
		}
		c.park()
	}
	buf, n, err := c.socket.read(nil, headroom+len(c.kept), len(c.in.bytes))
	if err != nil {
		return truncated(err)
	}
	c.in, c.from, c.to = buf, headroom+c.keptOpen, headroom+len(c.kept)+n
	copy(buf.bytes[headroom:], c.kept)
	if c.keptOpen > 0 {
		c.opened = buf.spans[:1]
		c.opened[0] = span{headroom, c.from}
	}
	c.kept, c.keptOpen = nil, 0
	return nil
}

func truncated(err error) error {
	if errors.Is(err, io.EOF) {
		return errTruncated
	}
	return err
}

// park gives the buffer back, of which what is in hand was moved to the front.
func (c *channel) park() {
	c.kept, c.keptOpen = bytes.Clone(c.in.bytes[headroom:c.to]), c.from-headroom
	c.socket.pool.put(c.in)
	c.in, c.opened = nil, nil
}

func (c *channel) compact() {
	at := headroom
	for _, s := range c.opened {
		at += copy(c.in.bytes[at:], c.in.bytes[s.from:s.to])
	}
	if at > headroom {
		c.opened = c.in.spans[:1]
		c.opened[0] = span{headroom, at}
	}
	c.from, c.to = at, at+copy(c.in.bytes[at:], c.in.bytes[c.from:c.to])
}

// join makes the first n bytes that are opened lie together, of which there are as many; n is small.
func (c *channel) join(n int) {
	for first := c.opened[0]; first.to-first.from < n; first = c.opened[0] {
		size := first.to - first.from
		c.opened = c.opened[1:]
		c.opened[0].from -= size // where the end of the one record and the header of the other were
		copy(c.in.bytes[c.opened[0].from:], c.in.bytes[first.from:first.to])
	}
}

// release gives the buffer back if nothing is in hand.
func (c *channel) release() {
	if c.in != nil && len(c.opened) == 0 && c.from == c.to {
		c.socket.pool.put(c.in)
		c.in, c.opened = nil, nil
	}
}

// seal sends p, no more than one read of a leg, with one system call. p has a byte of capacity behind its end.
func (c *channel) seal(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.send(func(out []byte) (int, error) { return c.records.Seal(out, p) })
}

// closeWrite sends a close_notify alone. A FIN after it would say nothing more, and make connection trackers on the way
// forget a half-closed connection within minutes.
func (c *channel) closeWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.send(func(out []byte) (int, error) { return c.records.SealAlert(out, record.CloseNotify), nil })
	if err == nil {
		c.closed = errClosedWrite
	}
	return err
}

// send is for who holds mu. An error is for good: a record may have left in part.
func (c *channel) send(fill func(out []byte) (int, error)) error {
	if c.closed != nil {
		return c.closed
	}
	out := c.socket.pool.get()
	defer c.socket.pool.put(out)
	n, err := fill(out.bytes[:])
	if err == nil {
		err = c.socket.write(out.upTo(n))
	}
	c.closed = err
	return err
}

// writable says whether nothing has gone wrong with what was written.
func (c *channel) writable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed == nil
}

// tell sends a peer the alert for its violation, if that is possible without waiting: it may read nothing.
func (c *channel) tell(err error) {
	v, ok := errors.AsType[*record.Violation](err)
	if !ok || c.told || !c.mu.TryLock() {
		return
	}
	defer c.mu.Unlock()
	c.told = true
	if c.closed != nil {
		return
	}
	c.closed = err
	out := make([]byte, record.AlertSize)
	c.socket.offer(out[:c.records.SealAlert(out, v.Alert)])
}

func (c *channel) waits() *socket { return c.socket }
func (c *channel) reset()         { abort(c.conn) }

// secureLeg is a connection to a peer over TLS 1.3.
type secureLeg struct{ channel }

func (l *secureLeg) next() (batch, error) {
	if err := l.more(); err != nil {
		return batch{}, err
	}
	b := batch{l.in, l.opened}
	l.opened = nil
	return b, nil
}

func (l *secureLeg) write(b batch) error {
	for _, s := range b.spans {
		if err := l.seal(b.buf.bytes[s.from:s.to]); err != nil {
			return err
		}
	}
	return nil
}

func (l *secureLeg) watch() error { return l.socket.watch() }
func (l *secureLeg) close()       { _ = l.conn.Close() }

package nodeproxy

import (
	"errors"
	"io"
	"net"
	"sync"

	"nodeproxy.io/nodeproxy/mtls/record"
)

// channel is a connection to a peer whose TLS 1.3 handshake is done. Records are opened where they were received, and sealed from
// where they were read into what is sent. It holds a buffer only while there are bytes in it.
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
	told     bool    // the peer was told of its violation

	mu sync.Mutex // of who writes
}

// newChannel takes over w, with what it has received and not read.
func newChannel(w *wire, records *record.Layer) channel {
	return channel{conn: w.TCPConn, socket: w.socket, records: records, in: w.in, from: w.from, to: w.to}
}

// more opens records until there is more data than there was, and waits if it must.
func (c *channel) more() error {
	for had := len(c.opened); ; {
		err := c.unseal()
		if len(c.opened) > had {
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
func (c *channel) fill() (err error) {
	n := 0
	if c.in == nil {
		c.in, n, err = c.socket.read(nil, headroom, len(c.in.bytes))
		c.from, c.to = headroom, headroom
	} else {
		c.compact()
		_, n, err = c.socket.read(c.in, c.to, len(c.in.bytes))
	}
	c.to += n
	if errors.Is(err, io.EOF) {
		return errTruncated
	}
	return err
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
	return c.send(func(out []byte) (int, error) { return c.records.Seal(out, p) })
}

// closeWrite sends a close_notify alone. A FIN after it would say nothing more, and make connection trackers on the way
// forget a half-closed connection within minutes.
func (c *channel) closeWrite() error {
	return c.send(func(out []byte) (int, error) { return c.records.SealAlert(out, record.CloseNotify), nil })
}

func (c *channel) send(fill func(out []byte) (int, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.socket.pool.get()
	defer c.socket.pool.put(out)
	n, err := fill(out.bytes[:])
	if err != nil {
		return err
	}
	return c.socket.write(out.upTo(n))
}

// tell sends a peer the alert for its violation, if that is possible without waiting: it may read nothing.
func (c *channel) tell(err error) {
	v, ok := errors.AsType[*record.Violation](err)
	if !ok || c.told || !c.mu.TryLock() {
		return
	}
	defer c.mu.Unlock()
	c.told = true
	out := make([]byte, record.AlertSize)
	c.socket.offer(out[:c.records.SealAlert(out, v.Alert)])
}

func (c *channel) reset() { abort(c.conn) }

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

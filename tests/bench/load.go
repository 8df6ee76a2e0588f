package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The kinds of load.
const (
	upload    = "upload"    // bytes to the server
	download  = "download"  // bytes from the server
	roundTrip = "roundtrip" // one message there, one back, again
	connect   = "connect"   // connect, one round trip, close, again
	idle      = "idle"      // connections that were used once
)

// kinds are those that are compared.
func kinds() []string { return []string{upload, download, roundTrip, connect} }

// order says what a load process does.
type order struct {
	Kind        string         `json:"kind"`
	To          netip.AddrPort `json:"to"`
	Connections int            `json:"connections"` // at a time
	Duration    time.Duration  `json:"duration_ns"`
	Opens       int            `json:"opens"` // of connect: at most so many
}

// outcome is what it found.
type outcome struct {
	Opened     int       `json:"opened"`     // connections
	Operations int       `json:"operations"` // round trips
	Sent       uint64    `json:"sent"`       // bytes, with what came before the clock started
	Received   uint64    `json:"received"`
	Bulk       uint64    `json:"bulk"` // bytes of bulk transfers
	Seconds    float64   `json:"seconds"`
	Latency    latencies `json:"latency_us"`
}

// latencies are percentiles in microseconds; 0 where nothing was timed.
type latencies struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99_9"`
}

const (
	openers = 16 // threads that open idle connections
	warmups = 20 // round trips of a connection before the clock starts
)

// load opens the connections, says "ready", waits for a line, does the work, prints the outcome, and keeps the connections
// open until in ends, so that whoever gave the order can look at the proxies while nothing else changes.
func load(o order, in io.Reader, out io.Writer) error {
	runtime.GOMAXPROCS(min(o.Connections, serverThreads) + openers)
	l := &loader{order: o, workers: make([]worker, o.Connections)}
	defer l.close()
	if err := l.open(); err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	lines := bufio.NewScanner(in)
	if !lines.Scan() {
		return lines.Err()
	}
	if err := l.run(); err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(l.outcome()); err != nil {
		return err
	}
	lines.Scan()
	return lines.Err()
}

type loader struct {
	order
	workers []worker
	opens   atomic.Int64
	seconds float64
}

// worker is one connection, or one place for connections that follow each other.
type worker struct {
	conn    socket
	open    bool
	opened  int
	sent    uint64
	got     uint64
	bulk    uint64
	elapsed []time.Duration
}

func (l *loader) open() error {
	if l.Kind == connect {
		return nil
	}
	var next atomic.Int64
	return together(min(openers, l.Connections), func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= l.Connections {
				return nil
			}
			if err := l.workers[i].prepare(l.order); err != nil {
				return fmt.Errorf("open connection %d of %d: %w", i+1, l.Connections, err)
			}
		}
	})
}

func (l *loader) close() {
	for _, w := range l.workers {
		if w.open {
			w.conn.close()
		}
	}
}

// run does the work, with all workers at once.
func (l *loader) run() error {
	begin := time.Now()
	err := together(l.Connections, func(i int) error {
		w, deadline := &l.workers[i], begin.Add(l.Duration)
		switch l.Kind {
		case upload:
			return w.upload(deadline)
		case download:
			return w.download(l.Duration)
		case roundTrip:
			return w.roundTrips(deadline)
		case connect:
			return w.connects(l, deadline)
		}
		return fmt.Errorf("do %q: there is no such load", l.Kind)
	})
	l.seconds = time.Since(begin).Seconds()
	return err
}

// together calls do(0) to do(n-1) at once and waits for all.
func together(n int, do func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func (l *loader) outcome() outcome {
	o := outcome{Seconds: l.seconds}
	var times []time.Duration
	for _, w := range l.workers {
		o.Opened += w.opened
		o.Sent += w.sent
		o.Received += w.got
		o.Bulk += w.bulk
		times = append(times, w.elapsed...)
	}
	o.Operations = len(times)
	slices.Sort(times)
	o.Latency = latencies{P50: percentile(times, 0.5), P99: percentile(times, 0.99), P999: percentile(times, 0.999)}
	return o
}

// percentile is the smallest of the sorted times, in microseconds, that no less than the share p of them do not exceed.
func percentile(sorted []time.Duration, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(p*float64(len(sorted)) + 0.9999999)
	return float64(sorted[min(max(rank, 1), len(sorted))-1].Nanoseconds()) / 1e3
}

func (w *worker) dial(to netip.AddrPort) (err error) {
	w.conn, err = dial(to)
	w.open = err == nil
	if w.open {
		w.opened++
	}
	return err
}

// prepare opens the connection and warms it up: handshakes and slow start are over when the clock starts.
func (w *worker) prepare(o order) error {
	if err := w.dial(o.To); err != nil {
		return err
	}
	if o.Kind == idle {
		return w.exchange(park)
	}
	for range warmups {
		if err := w.exchange(echo); err != nil {
			return err
		}
	}
	return nil
}

// exchange is one round trip.
func (w *worker) exchange(mode byte) error {
	m := message{mode}
	if _, err := w.conn.Write(m[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(w.conn, m[:]); err != nil {
		return fmt.Errorf("wait for the answer: %w", err)
	}
	w.sent += messageSize
	w.got += messageSize
	return nil
}

func (w *worker) roundTrips(deadline time.Time) error {
	for begin := time.Now(); ; {
		if err := w.exchange(echo); err != nil {
			return err
		}
		end := time.Now()
		w.elapsed = append(w.elapsed, end.Sub(begin))
		if begin = end; end.After(deadline) {
			return nil
		}
	}
}

// connects times from connect to the answer.
func (w *worker) connects(l *loader, deadline time.Time) error {
	for l.opens.Add(1) <= int64(l.Opens) {
		begin := time.Now()
		if err := w.dial(l.To); err != nil {
			return err
		}
		if err := w.exchange(echo); err != nil {
			return err
		}
		end := time.Now()
		w.elapsed = append(w.elapsed, end.Sub(begin))
		w.conn.close()
		w.open = false
		if end.After(deadline) {
			break
		}
	}
	return nil
}

func (w *worker) upload(deadline time.Time) error {
	m := message{sink}
	if _, err := w.conn.Write(m[:]); err != nil {
		return err
	}
	buf := make([]byte, bulkSize)
	for buf[0] != lastBlock {
		if !time.Now().Before(deadline) {
			buf[0] = lastBlock
		}
		if _, err := w.conn.Write(buf); err != nil {
			return err
		}
		w.bulk += bulkSize
	}
	var count [countSize]byte
	if _, err := io.ReadFull(w.conn, count[:]); err != nil {
		return fmt.Errorf("wait for the server's count: %w", err)
	}
	w.sent += messageSize + w.bulk
	w.got += countSize
	return w.check(count[:])
}

func (w *worker) download(d time.Duration) error {
	m := message{pour}
	binary.BigEndian.PutUint64(m[1:], uint64(d))
	if _, err := w.conn.Write(m[:]); err != nil {
		return err
	}
	w.sent += messageSize
	buf := make([]byte, countSize+bulkSize) // the last bytes of the stream so far, and what comes next
	var total uint64
	for {
		n, err := w.conn.Read(buf[countSize:])
		total += uint64(n)
		copy(buf, buf[n:n+countSize])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if total < countSize {
		return fmt.Errorf("read the server's count: the stream ended after %d bytes", total)
	}
	w.got += total
	w.bulk = total - countSize
	return w.check(buf[:countSize])
}

func (w *worker) check(count []byte) error {
	if n := binary.BigEndian.Uint64(count); n != w.bulk {
		return fmt.Errorf("compare the counts of a bulk transfer: the server's is %d and the client's %d", n, w.bulk)
	}
	return nil
}

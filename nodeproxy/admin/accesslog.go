package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// AccessLevel says which connections get a line.
type AccessLevel string

const (
	AccessNone   AccessLevel = "none"
	AccessDenied AccessLevel = "denied" // refused and cut ones
	AccessAll    AccessLevel = "all"    // and every connection that ends
)

const (
	denialWindow   = time.Minute
	maxDenialPairs = 4096 // beyond it all denials of one reason share one line a minute
	accessQueue    = 4096 // lines; beyond it they are counted and lost
)

// AccessLog writes one line per connection, when it ends, is denied, or is let in as plaintext by the kernel, which does
// not tell when it ends. Of denials only the first per reason, source and destination each minute is written; the others
// are counted in the next line, or in one of their own once the minute is over. Memory is bounded: maxDenialPairs entries
// and accessQueue lines.
//
// Observe never waits for the log's writer: Run does. docs/access-log.md documents the fields.
type AccessLog struct {
	log   *slog.Logger
	level AccessLevel
	lines chan *Connection
	lost  atomic.Uint64

	mu      sync.Mutex
	denials map[denialKey]*denialCount
}

type denialKey struct {
	reason              catalog.Reason
	source, destination string
}

type denialCount struct {
	since    time.Time  // of the line that was written
	last     Connection // of those that were not
	repeated uint64
}

// NewAccessLog returns a log that writes to log. The caller runs Run.
func NewAccessLog(log *slog.Logger, level AccessLevel) (*AccessLog, error) {
	switch level {
	case AccessNone, AccessDenied, AccessAll:
	default:
		return nil, fmt.Errorf("log.access %q is not one of none, denied, all", level)
	}
	return &AccessLog{
		log:     log,
		level:   level,
		lines:   make(chan *Connection, accessQueue),
		denials: make(map[denialKey]*denialCount),
	}, nil
}

// Observe queues a line for c if it deserves one.
func (a *AccessLog) Observe(c Connection) {
	over := c.Event == EventClose || c.Event == EventDenied || c.Event == EventOpen && c.ID == 0
	switch {
	case a.level == AccessNone || !over:
		return
	case c.Verdict == Denied:
		if !a.first(&c) {
			return
		}
	case a.level != AccessAll:
		return
	}
	a.queue(c)
}

func (a *AccessLog) queue(c Connection) {
	select {
	case a.lines <- &c:
	default:
		a.lost.Add(1)
	}
}

// first says whether the denial c is to be written, and sets how many like it were not since the last one.
func (a *AccessLog) first(c *Connection) bool {
	key := denialKey{c.Reason, party(&c.Source), party(&c.Destination)}
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.denials[key]; !known && len(a.denials) >= maxDenialPairs {
		key = denialKey{reason: c.Reason}
	}
	d, known := a.denials[key]
	if known && now.Sub(d.since) < denialWindow {
		d.repeated++
		d.last = *c
		return false
	}
	if known {
		c.Repeated = d.repeated
	}
	a.denials[key] = &denialCount{since: now}
	return true
}

// party names one side of a denial: its service, else its IP, since the port changes with every attempt of a caller.
func party(e *Endpoint) string {
	if e.Service != "" {
		return e.Service
	}
	if at, err := netip.ParseAddrPort(e.Address); err == nil {
		return at.Addr().String()
	}
	return e.Address
}

// Run writes the lines until ctx ends, and then what is queued or still counted.
func (a *AccessLog) Run(ctx context.Context) {
	tick := time.NewTicker(denialWindow)
	defer tick.Stop()
	for {
		select {
		case c := <-a.lines:
			a.write(c)
		case now := <-tick.C:
			a.writeRepeated(now.Add(-denialWindow))
		case <-ctx.Done():
			for range len(a.lines) {
				c := <-a.lines
				a.write(c)
			}
			a.writeRepeated(time.Now())
			return
		}
	}
}

// writeRepeated forgets the denials last written at or before deadline, after a line for those that repeated.
func (a *AccessLog) writeRepeated(deadline time.Time) {
	var due []Connection
	a.mu.Lock()
	for key, d := range a.denials {
		if d.since.After(deadline) {
			continue
		}
		delete(a.denials, key)
		if d.repeated > 0 {
			d.last.Repeated = d.repeated - 1 // the line itself stands for one
			due = append(due, d.last)
		}
	}
	a.mu.Unlock()
	for i := range due {
		a.write(&due[i])
	}
}

func (a *AccessLog) write(c *Connection) {
	attrs := make([]slog.Attr, 0, 24)
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	text("direction", string(c.Direction))
	text("verdict", string(c.Verdict))
	text("reason", string(c.Reason))
	text("source_service", c.Source.Service)
	text("source_identity", c.Source.Identity)
	text("source_address", c.Source.Address)
	text("source_workload", c.Source.Workload)
	text("destination_service", c.Destination.Service)
	text("destination_target", c.Destination.Target)
	text("destination_instance", c.Destination.Instance)
	text("destination_gateway", c.Destination.Gateway)
	text("destination_identity", c.Destination.Identity)
	text("destination_address", c.Destination.Address)
	text("destination_peer", c.Destination.Peer)
	text("destination_workload", c.Destination.Workload)
	text("path", string(c.Path))
	text("intention", c.Intention)
	text("detail", c.Detail)
	text("comm", c.Source.Comm)
	if c.Source.PID != 0 {
		attrs = append(attrs, slog.Uint64("pid", uint64(c.Source.PID)))
	}
	attrs = append(attrs, slog.Uint64("id", c.ID), slog.Uint64("generation", c.Generation),
		slog.Uint64("sent", c.Sent), slog.Uint64("received", c.Received), slog.Duration("duration", c.Duration))
	if c.RTT > 0 {
		attrs = append(attrs, slog.Duration("rtt", c.RTT))
	}
	if c.Repeated > 0 {
		attrs = append(attrs, slog.Uint64("repeated", c.Repeated))
	}
	if n := a.lost.Swap(0); n > 0 {
		attrs = append(attrs, slog.Uint64("lost_lines", n))
	}
	message := "connection closed"
	switch {
	case c.Event == EventDenied:
		message = "connection denied"
	case c.Event == EventOpen:
		message = "connection let in"
	case c.Verdict == Denied:
		message = "connection cut"
	}
	a.log.LogAttrs(context.Background(), slog.LevelInfo, message, attrs...)
}

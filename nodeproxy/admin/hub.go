package admin

import (
	"strings"
	"sync"
	"sync/atomic"
)

// Filter selects connections; an empty field matches all.
type Filter struct {
	Service  string  // either side's
	Workload string  // either side's cgroup, or the end of its path: "web" matches /sys/fs/cgroup/demo/web
	Verdict  Verdict // as decided
}

// Match says whether c passes.
func (f Filter) Match(c *Connection) bool {
	if f.Service != "" && c.Source.Service != f.Service && c.Destination.Service != f.Service {
		return false
	}
	if f.Workload != "" && !isWorkload(c.Source.Workload, f.Workload) && !isWorkload(c.Destination.Workload, f.Workload) {
		return false
	}
	return f.Verdict == "" || c.Verdict == f.Verdict
}

func isWorkload(cgroup, name string) bool {
	return cgroup == name || strings.HasSuffix(cgroup, "/"+strings.TrimPrefix(name, "/"))
}

// Hub passes connection events on to any number of subscribers. Observe never waits for one: a subscriber whose queue
// is full loses the event, and learns how many it lost. A Hub holds no goroutine and needs no Close.
type Hub struct {
	mu          sync.RWMutex
	subscribers map[*Subscription]struct{}
}

// NewHub returns a Hub without subscribers.
func NewHub() *Hub { return &Hub{subscribers: make(map[*Subscription]struct{})} }

// Observe offers c to every subscriber whose filter it passes.
func (h *Hub) Observe(c Connection) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for s := range h.subscribers {
		s.offer(&c)
	}
}

// Subscribe starts a subscription with a queue of so many events. Its owner calls Close.
func (h *Hub) Subscribe(f Filter, queue int) *Subscription {
	s := &Subscription{hub: h, filter: f, events: make(chan Connection, queue)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subscribers[s] = struct{}{}
	return s
}

// Subscription is one reader of a Hub.
type Subscription struct {
	hub     *Hub
	filter  Filter
	events  chan Connection
	dropped atomic.Uint64
}

func (s *Subscription) offer(c *Connection) {
	if !s.filter.Match(c) {
		return
	}
	select {
	case s.events <- *c:
	default:
		s.dropped.Add(1)
	}
}

// Events is the queue. It is never closed.
func (s *Subscription) Events() <-chan Connection { return s.events }

// TakeDropped returns how many events were lost since the last call.
func (s *Subscription) TakeDropped() uint64 { return s.dropped.Swap(0) }

// Close ends the subscription; what is still queued may be read.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subscribers, s)
}

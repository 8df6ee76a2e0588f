package admin

import (
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	maxSeries = 4096    // pairs of services, per direction and path; beyond it they are counted under other
	other     = "other" // a service that the mesh does not know, or one too many
)

// handshakeBuckets are upper bounds in seconds.
var handshakeBuckets = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1, 5}

// Metrics counts connections per pair of services. A series lives as long as both services are in the mesh (and its
// connections are open); a service that the snapshot does not have is counted as "other", so that nobody who can
// connect can make series. There are never more than maxSeries of them.
type Metrics struct {
	status      func() Status
	connections func() []Connection

	mu       sync.Mutex
	series   map[seriesKey]*series
	live     map[uint64]*liveConnection
	services map[string]bool // in the snapshot
	ignored  map[string]int  // by service: HTTP-level configuration that is not honoured
}

type seriesKey struct {
	source, destination string
	direction           Direction
	path                Path
}

type series struct {
	opened, closed, bytes uint64
	active                int
	denied                map[catalog.Reason]uint64
	observed              map[catalog.Reason]uint64 // "": it would have been carried
	handshake             histogram
}

type histogram struct {
	count   uint64
	sum     float64
	buckets [len(handshakeBuckets)]uint64 // cumulative
}

func (h *histogram) observe(d time.Duration) {
	h.count++
	h.sum += d.Seconds()
	for i, bound := range handshakeBuckets {
		if d.Seconds() <= bound {
			h.buckets[i]++
		}
	}
}

// liveConnection is an open one: the series that it was opened in, and how much of it is counted there.
type liveConnection struct {
	key   seriesKey
	bytes uint64
}

// NewMetrics returns metrics without series. At every scrape status gives the gauges and connections the bytes of the
// live ones; both may be called concurrently.
func NewMetrics(status func() Status, connections func() []Connection) *Metrics {
	return &Metrics{
		status:      status,
		connections: connections,
		series:      make(map[seriesKey]*series),
		live:        make(map[uint64]*liveConnection),
	}
}

// Observe counts one event of a connection.
func (m *Metrics) Observe(c Connection) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch c.Event {
	case EventOpen:
		key, s := m.seriesOf(&c)
		s.opened++
		s.observe(&c)
		if c.ID == 0 { // let in by the kernel, which does not tell when it ends
			return
		}
		s.active++
		m.live[c.ID] = &liveConnection{key: key}
	case EventDenied:
		_, s := m.seriesOf(&c)
		s.observe(&c)
		s.deny(c.Reason)
	case EventObserved:
		_, s := m.seriesOf(&c)
		if s.observed == nil {
			s.observed = make(map[catalog.Reason]uint64)
		}
		s.observed[c.Reason]++
	case EventClose:
		m.close(&c)
	}
}

func (s *series) observe(c *Connection) {
	if c.Handshake > 0 {
		s.handshake.observe(c.Handshake)
	}
}

func (s *series) deny(r catalog.Reason) {
	if s.denied == nil {
		s.denied = make(map[catalog.Reason]uint64)
	}
	s.denied[r]++
}

func (m *Metrics) close(c *Connection) {
	l, ok := m.live[c.ID]
	if !ok {
		return
	}
	delete(m.live, c.ID)
	s := m.series[l.key]
	s.account(l, c)
	s.closed++
	s.active--
	if c.Verdict == Denied {
		s.deny(c.Reason)
	}
	m.prune(l.key)
}

// account counts those bytes of c that are not counted yet.
func (s *series) account(l *liveConnection, c *Connection) {
	if n := c.Sent + c.Received; n > l.bytes {
		s.bytes += n - l.bytes
		l.bytes = n
	}
}

func (m *Metrics) seriesOf(c *Connection) (seriesKey, *series) {
	key := seriesKey{m.label(c.Source.Service), m.label(c.Destination.Service), c.Direction, c.Path}
	if s, ok := m.series[key]; ok {
		return key, s
	}
	if len(m.series) >= maxSeries {
		// At most one per direction and path, so the cap is exceeded by a handful.
		key.source, key.destination = other, other
		if s, ok := m.series[key]; ok {
			return key, s
		}
	}
	s := &series{}
	m.series[key] = s
	return key, s
}

func (m *Metrics) label(service string) string {
	if service == "" || m.services[service] {
		return service
	}
	return other
}

// Apply takes the services of a snapshot and ends the series of those that are gone.
func (m *Metrics) Apply(snap *catalog.Snapshot) {
	services := make(map[string]bool, len(snap.Services))
	ignored := make(map[string]int)
	for name, svc := range snap.Services {
		services[name] = true
		if n := len(svc.IgnoredL7); n > 0 {
			ignored[name] = n
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.services, m.ignored = services, ignored
	for key := range m.series {
		m.prune(key)
	}
}

// prune ends the series of key if one of its services is gone and no connection is open in it.
func (m *Metrics) prune(key seriesKey) {
	if m.series[key].active == 0 && (!m.remains(key.source) || !m.remains(key.destination)) {
		delete(m.series, key)
	}
}

func (m *Metrics) remains(service string) bool {
	return service == "" || service == other || m.services[service]
}

// accountLive counts the bytes of the connections that are open now.
func (m *Metrics) accountLive() {
	connections := m.connections()
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range connections {
		// One that closed since the list was made is counted already, and not in live.
		if l, ok := m.live[connections[i].ID]; ok {
			m.series[l.key].account(l, &connections[i])
		}
	}
}

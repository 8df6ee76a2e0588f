package workload

import (
	"context"
	"fmt"
	"net/netip"
	"time"
)

// pathTest asks for the way from a namespace to a target.
type pathTest struct {
	routeKey
	workload uint32
}

type routeKey struct {
	from, to uint64 // cookies
	at       netip.AddrPort
}

// route is what is known of the way from one namespace to a target.
type route struct {
	source netip.Addr
	err    error
	asked  bool      // a test is under way
	used   bool      // by a pair that may connect
	until  time.Time // when to ask again after err
	tries  int
}

const (
	pathTesters   = 4
	minRouteRetry = 5 * time.Second
	maxRouteRetry = 10 * time.Minute
	mismatchRetry = time.Minute // after a connection that did not arrive
)

// route says whether e reaches t from s, and from which address. If it is not known it is found out. The caller holds
// m.direct.mu.
func (m *Manager) route(e *entry, s *space, t target) (netip.Addr, bool) {
	d := m.direct
	key := routeKey{s.Cookie, t.space.Cookie, t.address}
	r := d.routes[key]
	if r == nil {
		r = &route{}
		d.routes[key] = r
	}
	r.used = true
	if r.source.IsValid() {
		return r.source, true
	}
	if !r.asked && time.Now().After(r.until) {
		select {
		case d.tests <- pathTest{key, e.ID}:
			r.asked = true
		default: // later
		}
	}
	return netip.Addr{}, false
}

// testPaths finds out what route asks for, until ctx ends.
func (m *Manager) testPaths(ctx context.Context) {
	d := m.direct
	for {
		var p pathTest
		select {
		case <-ctx.Done():
			return
		case p = <-d.tests:
		}
		source, err := netip.Addr{}, error(nil)
		if s := m.view.Load().spaces[p.from]; s != nil {
			source, err = s.Probe(p.workload, p.to, p.at)
		} else {
			err = fmt.Errorf("network namespace %d is gone", p.from)
		}
		d.mu.Lock()
		d.found(p.routeKey, source, err)
		d.mu.Unlock()
		m.wake()
	}
}

func (d *direct) found(key routeKey, source netip.Addr, err error) {
	r := d.routes[key]
	if r == nil {
		return // the namespace is gone
	}
	r.asked, r.source, r.err = false, source, err
	d.changed++
	if err != nil {
		r.until = time.Now().Add(min(minRouteRetry<<min(r.tries, 10), maxRouteRetry))
		r.tries++
	}
}

// retryRoutes lets grants be made again when it is time to ask for a way again, and forgets ways of namespaces that are gone.
func (m *Manager) retryRoutes() {
	d := m.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	known := make(map[uint64]bool)
	for _, s := range m.namespaces {
		known[s.Cookie] = true
	}
	for key, r := range d.routes {
		switch {
		case !known[key.from] || !known[key.to]:
			delete(d.routes, key)
		case !r.source.IsValid() && !r.asked && time.Now().After(r.until):
			d.changed++
		}
	}
}

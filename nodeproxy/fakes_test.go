package nodeproxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// fakeKernel redirects nothing: each pair of workload and destination has an outbound listener of its own, and each
// instance an inbound one. Everything goes over loopback.
type fakeKernel struct {
	applied chan uint64

	// Overrides of what a test is about.
	dial    func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error)
	deliver func(ctx context.Context, s *workload.Served, client netip.AddrPort) (net.Conn, error)
	apply   func(*catalog.Snapshot) error
	revoke  func(*catalog.Snapshot) error
	owns    func(netip.Addr) bool
	err     error // what Run fails with

	mu        sync.Mutex
	handler   workload.Handler
	origins   map[uint64]*workload.Origin // by namespace cookie
	served    map[netip.AddrPort]*workload.Served
	apps      map[string]string // address by instance
	delivered int
	clients   []netip.AddrPort
	revoked   []uint64 // generations
	notDirect string
	listeners []net.Listener
	fromFiles bool // the listeners are made from files
	serving   sync.WaitGroup
	ready     chan struct{}
}

func (k *fakeKernel) Run(ctx context.Context, h workload.Handler) error {
	k.mu.Lock()
	k.handler = h
	k.mu.Unlock()
	close(k.ready)
	if k.err != nil {
		return k.err
	}
	<-ctx.Done()
	k.mu.Lock()
	for _, ln := range k.listeners {
		ln.Close()
	}
	k.mu.Unlock()
	k.serving.Wait()
	return nil
}

func (k *fakeKernel) Revoke(snap *catalog.Snapshot) error {
	if k.revoke != nil {
		if err := k.revoke(snap); err != nil {
			return err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.revoked = append(k.revoked, snap.Generation)
	return nil
}

func (k *fakeKernel) Direct(string, catalog.Destination) string { return k.notDirect }

func (k *fakeKernel) Apply(ctx context.Context, snap *catalog.Snapshot) error {
	if k.apply != nil {
		if err := k.apply(snap); err != nil {
			return err
		}
	}
	select {
	case k.applied <- snap.Generation:
	case <-ctx.Done():
	}
	return nil
}

func (k *fakeKernel) Probed(*net.TCPConn) bool { return false }

func (k *fakeKernel) Origin(ns *workload.Namespace, _ *net.TCPConn) (*workload.Origin, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if origin := k.origins[ns.Cookie]; origin != nil {
		return origin, nil
	}
	return nil, refuse(catalog.ReasonUnknownOrigin, "find the origin: none")
}

func (k *fakeKernel) Served(_ *workload.Namespace, at netip.AddrPort) (*workload.Served, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if served := k.served[at]; served != nil {
		return served, nil
	}
	return nil, refuse(catalog.ReasonUnknownWorkload, "find the instance at %s: none", at)
}

func (k *fakeKernel) Dial(ctx context.Context, _ *workload.Namespace, to netip.AddrPort) (*net.TCPConn, error) {
	if k.dial != nil {
		return k.dial(ctx, to)
	}
	return dialTCP(ctx, to.String())
}

func (k *fakeKernel) Owns(ip netip.Addr) bool { return k.owns != nil && k.owns(ip) }

func dialTCP(ctx context.Context, to string) (*net.TCPConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

func (k *fakeKernel) Deliver(ctx context.Context, s *workload.Served, client netip.AddrPort) (net.Conn, error) {
	k.mu.Lock()
	k.delivered++
	k.clients = append(k.clients, client)
	k.mu.Unlock()
	if k.deliver != nil {
		return k.deliver(ctx, s, client)
	}
	return dialTCP(ctx, k.app(s.Instance))
}

func (k *fakeKernel) app(instance string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.apps[instance]
}

// forget is what happens when all instances go.
func (k *fakeKernel) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.served)
}

func (k *fakeKernel) deliveries() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.delivered
}

func (k *fakeKernel) Applications() []workload.Application {
	return []workload.Application{{Service: "web", Instance: "web-1", Cgroup: "/cg/web", Target: "127.0.0.1:80", Err: errors.New("nothing listens")}}
}

func (k *fakeKernel) State() workload.State {
	return workload.State{Workloads: []workload.WorkloadState{{
		Workload: &workload.Workload{ID: 7, Service: "web", Cgroup: "/cg/web", Provider: "config"}, State: "protected",
		Namespaces: []*workload.Namespace{{Inode: 42}}, Processes: 1,
	}}, Pins: "/pins", Links: 3}
}

// fakeSource delivers what a test publishes.
type fakeSource struct {
	snapshots chan *catalog.Snapshot
	err       error

	mu     sync.Mutex
	needed []string
}

func (s *fakeSource) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	if s.err != nil {
		return s.err
	}
	for {
		select {
		case snap := <-s.snapshots:
			deliver(snap)
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *fakeSource) Need(services []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.needed = services
}

func (s *fakeSource) Health() catalog.Health {
	return catalog.Health{Kind: "file", Location: "/mesh.d", Err: errors.New("broken.hcl:3: no such key")}
}

// recorder keeps all events.
type recorder struct {
	mu     sync.Mutex
	events []admin.Connection
	more   chan struct{} // closed and replaced with every event
}

func (r *recorder) Observe(c admin.Connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, c)
	close(r.more)
	r.more = make(chan struct{})
}

func (r *recorder) all() ([]admin.Connection, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events), r.more
}

// wait returns the first event that match accepts, waiting for it.
func (r *recorder) wait(t testing.TB, what string, match func(admin.Connection) bool) admin.Connection {
	t.Helper()
	return r.waitN(t, what, 1, match)[0]
}

func (r *recorder) waitN(t testing.TB, what string, n int, match func(admin.Connection) bool) []admin.Connection {
	t.Helper()
	deadline := time.After(patience)
	for {
		events, more := r.all()
		var found []admin.Connection
		for _, e := range events {
			if match(e) {
				found = append(found, e)
			}
		}
		if len(found) >= n {
			return found
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("no event: %s; got %+v", what, events)
		}
	}
}

func is(event string, direction admin.Direction) func(admin.Connection) bool {
	return func(c admin.Connection) bool { return c.Event == event && c.Direction == direction }
}

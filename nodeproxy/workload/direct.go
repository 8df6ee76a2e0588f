package workload

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// direct is the way within the node that does not pass the proxy: which pairs of workload and instance may take it, written
// into the kernel ahead of their connections. A pair that is left out takes the proxy; nothing fails for it.
//
// mu keeps revocation and granting apart: once Revoke has a policy, no grant of an older one is written.
type direct struct {
	why string // nothing is granted on this node, and why; "" when it is

	mu      sync.Mutex
	policy  *catalog.Snapshot // whose intentions are in force
	last    directInput       // what granted was made of
	granted []grant
	targets []target
	routes  map[routeKey]*route
	changed uint64            // counts changes of routes
	sources map[uint32]owner  // by workload id, also of those that are gone
	places  map[place]*served // where instances are or were
	open    map[uint64]*openDirect
	cut     map[uint64]bool // connections that Revoke has ended, until their close is told
	tests   chan pathTest
}

// grant is one in force, with whose intention it stands on.
type grant struct {
	redirect.Grant
	source, destination string
}

// owner is whose a direct connection is.
type owner struct{ service, cgroup string }

// target is a local instance, and how it is reached directly.
type target struct {
	*served
	address netip.AddrPort
	closes  uint64
	why     string // it is not, and why
}

// place names an instance by where its connections arrive.
type place struct {
	namespace uint64 // cookie
	address   netip.AddrPort
}

// directInput is all that grants depend on: they are made again only when it changes.
type directInput struct {
	snap    *catalog.Snapshot
	changed uint64
	sources []directSource
	targets []directTarget
}

type directSource struct {
	workload  uint32
	namespace uint64
	instances string // that it serves: their upstreams are its own
}

type directTarget struct {
	place
	instance string
	closes   uint64
	why      string
}

func (in directInput) equal(other directInput) bool {
	return in.snap == other.snap && in.changed == other.changed && slices.Equal(in.sources, other.sources) && slices.Equal(in.targets, other.targets)
}

func newDirect(cfg Config) *direct {
	d := &direct{
		routes: make(map[routeKey]*route), sources: make(map[uint32]owner), places: make(map[place]*served),
		open: make(map[uint64]*openDirect), cut: make(map[uint64]bool), tests: make(chan pathTest, 1024),
	}
	if d.why = cfg.NotDirect; d.why == "" {
		if err := redirect.CanDestroy(); err != nil {
			d.why = fmt.Sprintf("the kernel cannot end connections that an intention comes to deny: %v", err)
			cfg.Log.Warn("connections within the node pass the proxy: the kernel's own path could not be revoked", "error", err)
		}
	}
	return d
}

// grantDirect brings the kernel's grants in line with v, which is indexed.
func (m *Manager) grantDirect(v *view) {
	d := m.direct
	if d.why != "" {
		return
	}
	targets := m.directTargets(v)
	entries := m.protected(nil)
	in := directInput{snap: v.snap}
	for _, e := range entries {
		for _, s := range m.spacesOf(e) {
			in.sources = append(in.sources, directSource{e.ID, s.Cookie, strings.Join(v.serves[e.ID], "\x00")})
		}
	}
	for _, t := range targets {
		in.targets = append(in.targets, directTarget{place{t.space.Cookie, t.address}, t.Instance, t.closes, t.why})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.targets = targets
	for _, e := range entries {
		d.sources[e.ID] = owner{e.Service, e.Cgroup}
	}
	for _, t := range targets {
		d.places[place{t.space.Cookie, t.address}] = t.served
	}
	if in.changed = d.changed; in.equal(d.last) {
		return
	}
	d.granted = nil
	for _, r := range d.routes {
		r.used = false
	}
	for _, e := range entries {
		for _, s := range m.spacesOf(e) {
			d.granted = append(d.granted, m.grantsOf(v, e, s, targets)...)
		}
	}
	maps.DeleteFunc(d.routes, func(_ routeKey, r *route) bool { return !r.used && !r.asked })
	d.last = in
	if err := d.write(m.redirect); err != nil {
		d.last = directInput{}
		m.log.Error("not all connections within the node that could go straight do", "error", err)
	}
}

// remember notes whose connections an earlier daemon granted to a workload.
func (d *direct) remember(workload uint32, of owner) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sources[workload] = of
}

// write puts what is granted, and not denied by now, into the kernel.
func (d *direct) write(r *redirect.Redirect) error {
	d.granted = slices.DeleteFunc(d.granted, func(g grant) bool { return !d.allows(g.source, g.destination) })
	all := make([]redirect.Grant, len(d.granted))
	for i, g := range d.granted {
		all[i] = g.Grant
	}
	return r.SetGrants(all)
}

// allows says whether the policy in force lets source connect to destination.
func (d *direct) allows(source, destination string) bool {
	return d.policy != nil && d.policy.Policy.Decide(d.policy.Identity(source), destination).Allowed
}

func (m *Manager) spacesOf(e *entry) []*space {
	var all []*space
	for _, inode := range e.inodes {
		if s := m.namespaces[inode]; s != nil {
			all = append(all, s)
		}
	}
	return all
}

// directTargets lists the local instances, by ID, with where their applications were seen to listen just now.
func (m *Manager) directTargets(v *view) []target {
	type seen struct {
		closes    uint64
		listeners []redirect.Socket
		err       error
	}
	spaces := make(map[uint64]seen)
	var all []target
	for _, s := range v.served {
		if len(s.Workloads) == 0 {
			continue
		}
		in, looked := spaces[s.space.Cookie]
		if !looked {
			in.closes, in.err = s.space.Closes() // before the look: what closes after it makes the grant rest
			if in.err == nil {
				in.listeners, in.err = s.space.Listeners(0)
			}
			spaces[s.space.Cookie] = in
		}
		t := target{served: s, closes: in.closes}
		switch t.address, t.why = s.directAddress(); {
		case t.why != "":
		case in.err != nil:
			t.why = in.err.Error()
		default:
			t.why = v.listens(s, in.listeners, t.address)
		}
		if svc := v.snap.Services[s.Service]; t.why == "" && svc != nil && svc.MaxInbound > 0 {
			t.why = "MaxInboundConnections is for the proxy to count"
		}
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.space.Cookie, b.space.Cookie))
	})
	return all
}

// directAddress is where others of this node reach the application of s.
func (s *served) directAddress() (at netip.AddrPort, why string) {
	ip, port := s.instance.Address.Addr(), cmp.Or(s.instance.Delivery.Port(), s.instance.Address.Port())
	if to := s.instance.Delivery.Addr(); to.IsValid() && !to.IsUnspecified() {
		ip = to
	}
	switch {
	case s.instance.DeliverySocket != "":
		return at, "its application listens on a unix socket"
	case ip.IsLoopback():
		return at, "its application is reached on loopback alone"
	case !s.space.has(ip):
		return at, fmt.Sprintf("address %s is not one of its network namespace", ip)
	}
	return netip.AddrPortFrom(ip, port), ""
}

// listens says why the application of s would not get a connection to at, or "".
func (v *view) listens(s *served, listeners []redirect.Socket, at netip.AddrPort) string {
	here := slices.DeleteFunc(slices.Clone(listeners), func(l redirect.Socket) bool { return l.Local.Port() != at.Port() })
	switch w, found := v.ownerOf(s, here, at.Addr()); {
	case !found:
		return fmt.Sprintf("nothing listens on %s", at)
	case w == nil:
		return fmt.Sprintf("what listens on %s is not in the workload's cgroup", at)
	}
	return ""
}

// grantsOf lists what workload e may dial directly from namespace s.
func (m *Manager) grantsOf(v *view, e *entry, s *space, targets []target) []grant {
	reached := make(map[string]map[*catalog.Instance]redirect.Target) // by service
	for _, t := range targets {
		if t.why != "" || !m.direct.allows(e.Service, t.Service) {
			continue
		}
		source, ok := m.route(e, s, t)
		if !ok {
			continue
		}
		if reached[t.Service] == nil {
			reached[t.Service] = make(map[*catalog.Instance]redirect.Target)
		}
		reached[t.Service][t.instance] = redirect.Target{Namespace: t.space.Cookie, Address: t.address, Source: source, Closes: t.closes, Group: m.group(t.Service)}
	}
	var all []grant
	for service, to := range reached {
		until, ok := validUntil(v.snap, e.Service, service)
		if !ok {
			continue
		}
		for dialled, targets := range m.dialled(v.snap, e.Service, service, to) {
			if v.isUpstream(e.ID, dialled) {
				continue
			}
			all = append(all, grant{source: e.Service, destination: service, Grant: redirect.Grant{
				Workload: e.ID, Namespace: s.Cookie, Dialled: dialled, NotAfter: until, Targets: targets,
			}})
		}
	}
	return all
}

// isUpstream says whether a workload reaches an upstream of its own at an address, or, without a port, on one of its ports.
func (v *view) isUpstream(workload uint32, at netip.AddrPort) bool {
	for _, id := range v.serves[workload] {
		for _, up := range v.snap.Upstreams[id] {
			if up.At.Addr() == at.Addr() && (at.Port() == 0 || up.At.Port() == at.Port()) {
				return true
			}
		}
	}
	return false
}

// dialled maps the addresses of a service that caller may dial directly to where they lead. A virtual address leads to the
// local instances where they go before others, or are all that there are.
func (m *Manager) dialled(snap *catalog.Snapshot, caller, service string, to map[*catalog.Instance]redirect.Target) map[netip.AddrPort][]redirect.Target {
	all := make(map[netip.AddrPort][]redirect.Target)
	add := func(dialled netip.AddrPort, t redirect.Target) {
		if dialled.Addr().Is4() == t.Address.Addr().Is4() {
			all[dialled] = append(all[dialled], t)
		}
	}
	svc := snap.Services[service]
	if svc == nil {
		return nil
	}
	every, one := true, func(inst *catalog.Instance) bool {
		return proxied(snap, caller, catalog.Destination{Service: svc, Instance: inst}) == ""
	}
	for _, inst := range svc.Instances { // in their order, so that the same is written again
		t, ok := to[inst]
		if ok && inst.Redirected() && one(inst) {
			add(inst.Address, t)
		}
		every = every && (ok || !inst.Healthy || !inst.Mesh.IsValid())
	}
	if !m.cfg.PreferLocal && !every || proxied(snap, caller, catalog.Destination{Service: svc}) != "" {
		return all
	}
	for _, inst := range svc.Instances {
		if t, ok := to[inst]; ok && inst.Healthy {
			for _, ip := range svc.Virtual {
				add(netip.AddrPortFrom(ip, 0), t)
			}
			for _, at := range svc.Ports {
				add(at, t)
			}
		}
	}
	return all
}

// proxied says why the proxy carries what caller sends to a destination, wherever its instances are, or "": what a choice at
// random among them would not honour, and what it counts or watches.
func proxied(snap *catalog.Snapshot, caller string, to catalog.Destination) string {
	switch c := snap.Call(caller, to); {
	case to.Upstream != nil:
		return "it is dialled at an upstream's own address"
	case c.MaxConnections > 0:
		return fmt.Sprintf("MaxConnections of %q to it is for the proxy to count", caller)
	case c.Ejection != nil:
		return fmt.Sprintf("PassiveHealthCheck of %q to it is for the proxy to watch", caller)
	case to.Instance != nil:
		return ""
	}
	route := to.Service.Route()
	switch target := route.Preferred(); {
	case !to.Service.IsWhole(target):
		return fmt.Sprintf("its service-resolver leads to %s, not to each of its instances", target)
	case route.Balance == catalog.RoundRobin || route.Balance == catalog.SourceHash:
		return fmt.Sprintf("its service-resolver balances by %s", route.Balance)
	}
	return ""
}

// validUntil is when the first certificate of the two services ends. ok: both are valid now.
func validUntil(snap *catalog.Snapshot, services ...string) (until time.Time, ok bool) {
	now := time.Now()
	for _, service := range services {
		leaf := snap.Leaves[service]
		if leaf == nil || leaf.Leaf == nil || now.Before(leaf.Leaf.NotBefore) || !now.Before(leaf.Leaf.NotAfter) {
			return time.Time{}, false
		}
		if end := leaf.Leaf.NotAfter; until.IsZero() || end.Before(until) {
			until = end
		}
	}
	return until, true
}

// passes is how often Revoke looks for connections that are left before it says that it cannot end them.
const passes = 10

// Revoke implements the proxy's Kernel.
func (m *Manager) Revoke(snap *catalog.Snapshot) error {
	d := m.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	d.policy = snap
	if slices.ContainsFunc(d.granted, func(g grant) bool { return !d.allows(g.source, g.destination) }) {
		if err := d.write(m.redirect); err != nil {
			return fmt.Errorf("revoke direct paths: %w", err)
		}
	}
	select {
	case <-m.ready:
		return m.endDenied()
	default: // whose the connections are is not known yet: see settleDirect
		return nil
	}
}

// endDenied resets the connections that the policy in force does not allow, until there are none. The caller holds
// m.direct.mu: none can be made meanwhile, because their grants are gone.
func (m *Manager) endDenied() error {
	d := m.direct
	for range passes {
		live, err := m.redirect.Granted()
		if err != nil {
			return err
		}
		live = slices.DeleteFunc(live, func(g redirect.Granted) bool {
			source, to := d.sources[g.Workload].service, d.places[place{g.To, g.Destination}]
			return source != "" && to != nil && d.allows(source, to.Service)
		})
		if len(live) == 0 {
			return nil
		}
		var failed []string
		for _, g := range live {
			d.cut[g.Cookie] = true
			if err := m.redirect.Destroy(g); err != nil {
				failed = append(failed, err.Error())
			}
		}
		if len(failed) == len(live) {
			return fmt.Errorf("end denied connections: %s", strings.Join(failed[:min(3, len(failed))], "; "))
		}
	}
	return fmt.Errorf("end denied connections: some are left after %d passes", passes)
}

// settleDirect takes over the connections of an earlier daemon, once it is known whose they are.
func (m *Manager) settleDirect(h Handler) {
	d := m.direct
	d.mu.Lock()
	err := m.endDenied()
	d.mu.Unlock()
	live, errLive := m.redirect.Granted()
	if err == nil {
		err = errLive
	}
	for _, g := range live {
		if !g.Opened.IsZero() {
			m.directEvent(redirect.GrantEvent{Granted: g, Stage: redirect.GrantOpened}, h)
		}
	}
	if err != nil {
		m.log.Error("connections within the node that an earlier daemon granted", "error", err)
	}
}

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

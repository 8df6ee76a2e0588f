package workload

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// direct is the way within the node that does not pass the proxy: which pairs of workload and instance may take it, written
// into the kernel ahead of their connections. A pair that is left out takes the proxy; nothing fails for it.
//
// mu keeps revocation and granting apart: once Revoke has a policy, no grant of an older one is written.
type direct struct {
	why    string // nothing is granted on this node, and why; "" when it is
	kernel granter

	mu      sync.Mutex
	policy  *catalog.Snapshot // whose intentions are in force
	last    directInput       // what granted was made of
	granted []grant
	targets []target
	routes  map[routeKey]*route
	proxied map[string]bool   // services of workloads whose label says mtls
	changed uint64            // counts changes of routes
	sources map[uint32]owner  // by workload id, also of those that are gone
	places  map[place]*served // where instances are or were
	open    map[uint64]*openDirect
	cut     map[uint64]bool // connections that Revoke has ended, until their close is told
	tests   chan pathTest

	unsettled error // why the connections of an earlier daemon are not all taken over yet; nil: they are
}

// granter is the kernel's part.
type granter interface {
	SetGrants(grants []redirect.Grant) error
	Granted() ([]redirect.Granted, error)
	Ended() ([]redirect.Granted, error)
	Destroy(g redirect.Granted) error
}

var errUnsettled = errors.New("connections within the node that an earlier daemon granted are not looked at yet")

// grant is one in force, with whose intention it stands on.
type grant struct {
	redirect.Grant
	source, destination string
}

// owner is whose a direct connection is.
type owner struct{ service, cgroup string }

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
	ends    []string // instances of which every workload is being stopped
}

type directSource struct {
	workload  uint32
	namespace uint64
	callers   string // the instances whose upstreams are its own
}

type directTarget struct {
	place
	instance string
	closes   uint64
	why      string
}

func (in directInput) equal(other directInput) bool {
	return in.snap == other.snap && in.changed == other.changed && slices.Equal(in.sources, other.sources) && slices.Equal(in.targets, other.targets) && slices.Equal(in.ends, other.ends)
}

func newDirect(cfg Config, kernel granter) *direct {
	d := &direct{
		kernel: kernel, unsettled: errUnsettled,
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
	in := directInput{snap: v.snap, ends: m.ends}
	for _, e := range entries {
		if e.Proxied {
			continue
		}
		for _, s := range m.spacesOf(e) {
			in.sources = append(in.sources, directSource{e.ID, s.Cookie, strings.Join(v.callers[e.ID], "\x00")})
		}
	}
	for _, t := range targets {
		in.targets = append(in.targets, directTarget{place{t.space.Cookie, t.address}, t.Instance, t.closes, t.why})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.targets, d.proxied = targets, make(map[string]bool)
	for _, e := range entries {
		for _, service := range e.Services() {
			d.proxied[service] = d.proxied[service] || e.Proxied
		}
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
		if e.Proxied {
			continue
		}
		for _, s := range m.spacesOf(e) {
			d.granted = append(d.granted, m.grantsOf(v, e, s, targets)...)
		}
	}
	maps.DeleteFunc(d.routes, func(_ routeKey, r *route) bool { return !r.used && !r.asked })
	d.last = in
	if err := d.write(); err != nil {
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
func (d *direct) write() error {
	d.granted = slices.DeleteFunc(d.granted, func(g grant) bool { return !d.allows(g.source, g.destination) })
	all := make([]redirect.Grant, len(d.granted))
	for i, g := range d.granted {
		all[i] = g.Grant
	}
	return d.kernel.SetGrants(all)
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

// passes is how often Revoke looks for connections that are left before it says that it cannot end them.
const passes = 10

// Revoke implements the proxy's Kernel.
func (m *Manager) Revoke(snap *catalog.Snapshot) error {
	select {
	case <-m.yielded: // what does not pass a proxy is the next daemon's
		return nil
	default:
		return m.pen.write(func() error { return m.revoke(snap) })
	}
}

func (m *Manager) revoke(snap *catalog.Snapshot) error {
	d := m.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	d.policy = snap
	if slices.ContainsFunc(d.granted, func(g grant) bool { return !d.allows(g.source, g.destination) }) {
		if err := d.write(); err != nil {
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
		live, err := d.kernel.Granted()
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
			if err := d.kernel.Destroy(g); err != nil {
				failed = append(failed, err.Error())
			}
		}
		if len(failed) == len(live) {
			return fmt.Errorf("end denied connections: %s", strings.Join(failed[:min(3, len(failed))], "; "))
		}
	}
	return fmt.Errorf("end denied connections: some are left after %d passes", passes)
}

// settleDirect takes over the connections of an earlier daemon, once it is known whose they are. What fails is done again
// at the next reconciliation: what was denied while no daemon ran must not live on.
func (m *Manager) settleDirect(h Handler) {
	d := m.direct
	d.mu.Lock()
	last := d.unsettled
	if last == nil {
		d.mu.Unlock()
		return
	}
	err := m.endDenied()
	d.mu.Unlock()
	live, errLive := d.kernel.Granted()
	err = errors.Join(err, errLive, m.endStrangers(live))
	for _, g := range live {
		if !g.Opened.IsZero() {
			m.directEvent(redirect.GrantEvent{Granted: g, Stage: redirect.GrantOpened}, h)
		}
	}
	d.mu.Lock()
	d.unsettled = err
	d.mu.Unlock()
	if err != nil && err.Error() != last.Error() {
		m.log.Error("connections within the node that an earlier daemon granted: it is tried again", "error", err)
	}
}

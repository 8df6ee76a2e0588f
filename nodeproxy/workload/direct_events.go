package workload

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// Stage says what became of a direct connection.
type Stage uint8

// The stages. A connection that was opened is closed once; one that failed was never open.
const (
	DirectOpened Stage = iota
	DirectClosed
	DirectFailed
)

// DirectConnection is a connection between two workloads of this node that does not pass the proxy.
type DirectConnection struct {
	Stage       Stage
	ID          uint64 // of the client's socket; unique while the node is up
	Source      string // service
	Workload    string // cgroup of the client's, which may be gone
	Destination string // service
	Instance    string
	Client      netip.AddrPort
	Dialled     netip.AddrPort
	Peer        netip.AddrPort // the instance's application
	PID         uint32
	Comm        string
	Opened      time.Time
	Sent        uint64 // by the client, once it is closed
	Received    uint64
	RTT         time.Duration
	Cut         bool           // Revoke ended it
	Reason      catalog.Reason // of one that failed
}

// openDirect is a connection that the Handler was told of.
type openDirect struct {
	DirectConnection
	missed int // looks at which the kernel did not have it any more
}

// directEvent tells the handler, so that every connection is opened once and closed once.
func (m *Manager) directEvent(e redirect.GrantEvent, h Handler) {
	select {
	case <-m.ready:
	default:
		return // settleDirect will tell
	}
	if e.Stage == redirect.GrantImpostor || e.Stage == redirect.GrantOpened && e.Impostor && m.strangerAt(e.Granted) {
		if err := m.direct.kernel.Destroy(e.Granted); err != nil {
			m.log.Error("a connection that a stranger to the workload accepted is not reset yet", "error", err)
		}
	}
	if e.Stage == redirect.GrantImpostor {
		return // it was never open: its failure will be told
	}
	d := m.direct
	d.mu.Lock()
	c := d.describe(e)
	open := d.open[c.ID]
	tellOpen := false
	switch c.Stage {
	case DirectOpened:
		if open == nil {
			d.open[c.ID] = &openDirect{DirectConnection: c}
		}
	case DirectClosed:
		tellOpen = open == nil // its opening was lost
		c.Cut = d.cut[c.ID]
		delete(d.open, c.ID)
		delete(d.cut, c.ID)
	case DirectFailed:
		delete(d.cut, c.ID)
		m.learn(e)
	}
	d.mu.Unlock()
	switch {
	case c.Stage == DirectOpened && open != nil:
	case tellOpen:
		opened := c
		opened.Stage = DirectOpened
		h.Direct(opened)
		fallthrough
	default:
		h.Direct(c)
	}
}

func (d *direct) describe(e redirect.GrantEvent) DirectConnection {
	of := d.sources[e.Workload]
	c := DirectConnection{
		ID: e.Cookie, Source: of.service, Workload: of.cgroup, Client: e.Client, Dialled: e.Dialled, Peer: e.Destination,
		PID: e.PID, Comm: e.Comm, Opened: e.Opened, Sent: e.Sent, Received: e.Received, RTT: e.RTT,
	}
	if to := d.places[place{e.To, e.Destination}]; to != nil {
		c.Destination, c.Instance = to.Service, to.Instance
	}
	switch e.Stage {
	case redirect.GrantOpened:
		c.Stage = DirectOpened
	case redirect.GrantClosed:
		c.Stage = DirectClosed
	case redirect.GrantFailed:
		c.Stage, c.Reason = DirectFailed, catalog.ReasonConnectFailed
		switch {
		case e.Impostor:
			c.Reason = catalog.ReasonNotTheWorkloads
		case mismatch(e):
			c.Reason = catalog.ReasonGrantMismatch
		}
	}
	return c
}

// learn sends a pair back to the proxy whose connection did not arrive as it left, and looks at a listener again that did
// not accept. The caller holds m.direct.mu.
func (m *Manager) learn(e redirect.GrantEvent) {
	d := m.direct
	if mismatch(e) {
		if r := d.routes[routeKey{e.From, e.To, e.Destination}]; r != nil {
			*r = route{err: redirect.ErrNoWay, until: time.Now().Add(mismatchRetry)}
			d.changed++
		}
	}
	m.wake()
}

// endStrangers resets what others than the workload have accepted, also where no event told of it because the ring was full.
func (m *Manager) endStrangers(live []redirect.Granted) error {
	var errs []error
	for _, g := range live {
		if g.Muzzled || !g.Opened.IsZero() && !g.Accepted && m.strangerAt(g) {
			errs = append(errs, m.direct.kernel.Destroy(g))
		}
	}
	return errors.Join(errs...)
}

// strangerAt says whether what accepted g is not the workload's, or, where that is not known, whether what listens there
// is not, or not any more.
func (m *Manager) strangerAt(g redirect.Granted) bool {
	d := m.direct
	d.mu.Lock()
	to := d.places[place{g.To, g.Destination}]
	d.mu.Unlock()
	if to == nil {
		return true
	}
	if s, err := to.space.Accepted(g.Client, g.Destination); err == nil && !s.Listening && s.Cgroup != 0 {
		return m.view.Load().owner(to, s.Cgroup) == nil
	}
	listeners, err := to.space.Listeners(g.Destination.Port())
	return err != nil || m.view.Load().listens(to, listeners, g.Destination) != ""
}

// mismatch says whether the SYN of a connection that failed never arrived as it left.
func mismatch(e redirect.GrantEvent) bool { return !e.Admitted && !e.Refused && !e.Impostor }

// reapDirect closes what the kernel has no more and what nobody saw closing, as when the ring of events was full, and ends
// what a stranger has.
func (m *Manager) reapDirect(h Handler) error {
	ended, err := m.direct.kernel.Ended()
	if err != nil {
		return err
	}
	for _, g := range ended {
		m.directEvent(redirect.GrantEvent{Granted: g, Stage: redirect.GrantClosed}, h)
	}
	live, err := m.direct.kernel.Granted()
	if err != nil {
		return err
	}
	for _, c := range m.direct.missing(live) {
		c.Stage = DirectClosed
		h.Direct(c)
	}
	select {
	case <-m.ready:
		return m.endStrangers(live)
	default: // whose the connections are is not known yet: see settleDirect
		return nil
	}
}

// missing removes what was told to be open and is not live, at two looks, and returns it. It forgets where instances
// were that nobody is connected to.
func (d *direct) missing(live []redirect.Granted) []DirectConnection {
	d.mu.Lock()
	defer d.mu.Unlock()
	lives, places := make(map[uint64]bool, len(live)), make(map[place]bool)
	for _, g := range live {
		lives[g.Cookie] = true
		places[place{g.To, g.Destination}] = true
	}
	for _, t := range d.targets {
		places[place{t.space.Cookie, t.address}] = true
	}
	var gone []DirectConnection
	for id, c := range d.open {
		if lives[id] {
			c.missed = 0
			continue
		}
		if c.missed++; c.missed > 1 {
			c.Cut = d.cut[id]
			gone = append(gone, c.DirectConnection)
			delete(d.open, id)
			delete(d.cut, id)
		}
	}
	maps.DeleteFunc(d.places, func(at place, _ *served) bool { return !places[at] })
	return gone
}

// DirectState is the direct path for status.
type DirectState struct {
	Why      string // there is none on this node, and why
	Grants   int    // pairs of a workload's namespace and an address
	Live     int    // connections
	Settling bool   // not all pairs have been looked at yet
}

func (d *direct) state() DirectState {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := DirectState{Why: d.why, Grants: len(d.granted), Live: len(d.open)}
	s.Settling = d.why == "" && (d.last.snap == nil || d.last.snap != d.policy || d.last.changed != d.changed)
	for _, r := range d.routes {
		s.Settling = s.Settling || r.asked || !r.source.IsValid() && r.err == nil
	}
	return s
}

// Direct implements the proxy's Kernel.
func (m *Manager) Direct(source string, to catalog.Destination) (why string) {
	d := m.direct
	if d.why != "" {
		return d.why
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.policy != nil {
		if why := proxied(d.policy, source, to); why != "" {
			return why
		}
	}
	for _, g := range d.granted {
		if g.source != source || g.destination != to.Service.Name {
			continue
		}
		if to.Instance == nil && isVirtual(to.Service, g.Dialled) || to.Instance != nil && g.Dialled == to.Instance.Address {
			return ""
		}
	}
	if d.proxied[source] {
		return labelledMTLS
	}
	return d.whyNot(m.cfg.PreferLocal, to)
}

// isVirtual says whether at stands for all of a service, which has no port in the grants of a virtual IP.
func isVirtual(svc *catalog.Service, at netip.AddrPort) bool {
	return at.Port() == 0 || slices.Contains(svc.Ports, at)
}

// whyNot finds what keeps a pair without a grant from having one.
func (d *direct) whyNot(preferLocal bool, to catalog.Destination) string {
	why := "no instance of it is served on this node"
	for _, t := range d.targets {
		if t.Service != to.Service.Name || to.Instance != nil && t.Instance != to.Instance.ID {
			continue
		}
		if t.why != "" {
			return t.why
		}
		for key, r := range d.routes {
			if key.to == t.space.Cookie && key.at == t.address && r.err != nil {
				return r.err.Error()
			}
		}
		why = "it is being made ready"
		if !preferLocal && to.Instance == nil {
			why = "prefer_local is false, and not every healthy instance is on this node and reached directly"
		}
	}
	return why
}

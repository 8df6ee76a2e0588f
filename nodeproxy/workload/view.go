package workload

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// view is what the data path reads: immutable, replaced whole by reconcile.
type view struct {
	snap    *catalog.Snapshot
	byID    map[uint32]*Workload
	callers map[uint32][]string        // IDs of the instances whose upstreams are each workload's own, in order
	subtree map[uint32]map[uint64]bool // cgroup ids by workload
	spaces  map[uint64]*space          // by cookie
	host    []netip.Addr               // of the node, also where no workload is in its namespace
	served  map[servedKey]*served
	former  map[servedKey]*served // served a moment ago
	states  []WorkloadState
	refused []RefusedClaim

	problems []catalog.Problem
}

type servedKey struct {
	namespace uint64 // cookie
	mesh      netip.AddrPort
}

// served is a Served with what delivery needs. Its Namespace is where the instance's mesh address is.
type served struct {
	Served
	instance *catalog.Instance
	space    *space         // where the application listens
	mapped   netip.AddrPort // and at which address, if a port of the node leads there; zero: at the instance's own
}

func (v *view) hasLeaf(service string) bool {
	return v.snap != nil && v.snap.Leaves[service] != nil
}

// watchHost reads the node's own addresses.
func (m *Manager) watchHost() {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		m.log.Error("cannot see the node's addresses; keeping the last", "error", err)
		return
	}
	var all []netip.Addr
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, prefix.Addr().Unmap())
		}
	}
	m.host = all
}

// assign finds, for each local instance, the workloads and the namespace that serve it.
func (m *Manager) assign() *view {
	m.mu.Lock()
	v := &view{snap: m.snap, host: m.host, spaces: make(map[uint64]*space), served: make(map[servedKey]*served)}
	m.mu.Unlock()
	for _, s := range m.namespaces {
		v.spaces[s.Cookie] = s
	}
	for _, e := range m.workloads {
		e.instances, e.callers, e.misplaced, e.contested = nil, nil, nil, nil
	}
	if v.snap == nil {
		return v
	}
	for _, inst := range v.snap.LocalInstances() {
		for _, e := range m.workloads {
			if e.Mesh != Enabled || !slices.Contains(e.Services(), inst.Service) {
				continue
			}
			served := inst.Mesh.IsValid() && m.assignTo(v, e, inst)
			if inst.Service == e.Service && (served || !inst.Mesh.IsValid()) { // without a mesh address it only calls others
				e.callers = append(e.callers, inst.ID)
			}
		}
	}
	return v
}

// assignTo makes e serve inst from each of its namespaces that has the instance's address, or from the node's if that leads to
// one of them, and says whether there is such.
func (m *Manager) assignTo(v *view, e *entry, inst *catalog.Instance) (found bool) {
	serve := func(at, s *space, mapped netip.AddrPort) {
		found = true
		if inst.Native {
			return // it speaks mTLS itself
		}
		key := servedKey{at.Cookie, inst.Mesh}
		sv := v.served[key]
		if sv == nil {
			sv = &served{instance: inst, space: s, mapped: mapped, Served: Served{Instance: inst.ID, Service: inst.Service, Namespace: at.public}}
			v.served[key] = sv
		}
		if sv.space == s {
			sv.Workloads = append(sv.Workloads, &e.Workload)
		}
	}
	host, to := m.hostSpace(), e.mapping(inst.Address)
	for _, s := range m.spacesOf(e) {
		switch {
		case s.has(inst.Mesh.Addr()):
			serve(s, s, netip.AddrPort{})
		case host != nil && host.has(inst.Mesh.Addr()) && s.has(to.Addr()):
			serve(host, s, to)
		}
	}
	if found {
		e.instances = append(e.instances, inst.ID)
	} else if e.processes > 0 {
		e.misplaced = append(e.misplaced, fmt.Sprintf("address %s of instance %s is in none of its network namespaces", inst.Mesh.Addr(), inst.ID))
	}
	return found
}

// index fills what depends on workload ids, and freezes the workloads that the view shows.
func (v *view) index(workloads map[string]*entry) {
	v.byID = make(map[uint32]*Workload)
	v.callers = make(map[uint32][]string)
	v.subtree = make(map[uint32]map[uint64]bool)
	frozen := make(map[*Workload]*Workload)
	for _, e := range workloads {
		w := e.Workload
		frozen[&e.Workload] = &w
		if w.ID != 0 {
			v.byID[w.ID] = &w
			v.callers[w.ID] = slices.Sorted(slices.Values(e.callers))
			v.subtree[w.ID] = e.subtree
		}
	}
	for _, s := range v.served {
		for i, w := range s.Workloads {
			s.Workloads[i] = frozen[w]
		}
		s.Workloads = slices.DeleteFunc(s.Workloads, func(w *Workload) bool { return w.ID == 0 })
		slices.SortFunc(s.Workloads, func(a, b *Workload) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	}
}

// destinations lists what is redirected: virtual IPs and canaries on every port, and instances by their exact address.
func destinations(snap *catalog.Snapshot) []redirect.Destination {
	var all []redirect.Destination
	for _, ip := range snap.Canaries() {
		all = append(all, redirect.Destination{Addr: ip})
	}
	for _, at := range snap.Contested { // the proxy refuses what is sent there
		all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port()})
	}
	if snap.MeshOnly {
		for _, at := range snap.Outside {
			all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port(), Pass: true})
		}
	}
	for _, svc := range snap.Services {
		for _, ip := range svc.Virtual {
			all = append(all, redirect.Destination{Addr: ip})
		}
		for _, at := range svc.Ports {
			all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port()})
		}
		for _, inst := range svc.Instances {
			if inst.Redirected() {
				all = append(all, redirect.Destination{Addr: inst.Address.Addr(), Port: inst.Address.Port(), Instance: true})
			}
		}
	}
	return all
}

// own lists what holds for single workloads: the addresses of their upstreams, and, where only the mesh is open, what their
// network namespaces have.
func (m *Manager) own(v *view, workloads []*entry) []redirect.Destination {
	var all []redirect.Destination
	for _, e := range workloads {
		for _, id := range v.callers[e.ID] {
			for _, up := range v.snap.Upstreams[id] {
				if up.Socket != "" {
					continue
				}
				all = append(all, redirect.Destination{Addr: up.At.Addr(), Port: up.At.Port(), Workload: e.ID})
			}
		}
		for _, inode := range e.inodes {
			if s := m.namespaces[inode]; s != nil && v.snap.MeshOnly {
				for _, ip := range s.addrs {
					all = append(all, redirect.Destination{Addr: ip, Workload: e.ID, Pass: true})
				}
			}
		}
	}
	return all
}

// Origin implements the proxy's Kernel.
func (m *Manager) Origin(ns *Namespace, conn *net.TCPConn) (*Origin, error) {
	o, err := m.redirect.Origin(conn)
	if err != nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownOrigin, Err: err}
	}
	v := m.view.Load()
	w := v.byID[o.Workload]
	if w == nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownWorkload, Err: fmt.Errorf("workload %d of process %d (%s) is not enrolled any more", o.Workload, o.PID, o.Comm)}
	}
	client, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownOrigin, Err: err}
	}
	if s := v.spaces[o.Namespace]; s != nil {
		ns = s.public // ns is the destination's if a grant ended while the SYN was under way
	}
	return &Origin{
		Workload: w, Instances: v.callers[w.ID], Namespace: ns, Client: client, Destination: o.Destination, PID: o.PID, Comm: o.Comm, Cookie: o.Cookie,
	}, nil
}

// Served implements the proxy's Kernel.
func (m *Manager) Served(ns *Namespace, at netip.AddrPort) (*Served, error) {
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	s := m.view.Load().servedAt(servedKey{ns.Cookie, at})
	if s == nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownService, Err: fmt.Errorf("no instance of this node is served at %s in network namespace %d", at, ns.Inode)}
	}
	if len(s.Workloads) == 0 {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownWorkload, Err: fmt.Errorf("no enrolled workload serves instance %s", s.Instance)}
	}
	return &s.Served, nil
}

func (v *view) servedAt(key servedKey) *served {
	if s := v.served[key]; s != nil {
		return s
	}
	return v.former[key]
}

// Workloads are those of State, without what it takes to read the kernel's maps.
func (m *Manager) Workloads() []WorkloadState { return m.view.Load().states }

// State implements the proxy's Kernel.
func (m *Manager) State() State {
	v := m.view.Load()
	state := State{Workloads: v.states, Refused: v.refused, Problems: v.problems, Providers: m.problems(), Pins: m.redirect.Dir(), Repairs: m.repairs.Load(), Direct: m.direct.state()}
	fills, err := m.redirect.Fills()
	if err != nil {
		m.log.Error("cannot read the maps for status", "error", err)
	}
	for _, f := range fills {
		state.Maps = append(state.Maps, MapFill(f))
	}
	if state.Counters, err = m.redirect.Counters(); err != nil {
		m.log.Error("cannot read the counters for status", "error", err)
	}
	state.Heartbeat, state.Links = m.redirect.Pulse()
	if m.cfg.DNS != nil {
		counts := m.cfg.DNS.Counts()
		state.Queries = &counts
	}
	return state
}

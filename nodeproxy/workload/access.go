package workload

import (
	"cmp"
	"net/netip"
	"slices"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// Access says whether a workload may ask Consul's agents, which hand out identities.
type Access string

// The default lets native services ask, which must, and everybody where ACLs are on, which decide then.
const (
	AccessDefault Access = ""
	AccessAllow   Access = "allow"
	AccessRefuse  Access = "refuse"
)

// ownReach is all that decides what single workloads reach and do not reach.
type ownReach struct {
	own      []redirect.Destination
	refusing []refusing
	agents   []netip.AddrPort
	meshOnly bool
	pruned   bool // nothing of an earlier daemon's is left in the kernel
}

// refusing is a workload that must not ask agents. An address on loopback is the agent's only for one of the node's own network
// namespace.
type refusing struct {
	workload uint32
	onNode   bool
}

func (o *ownReach) equal(other *ownReach) bool {
	return other != nil && o.meshOnly == other.meshOnly && o.pruned && other.pruned && slices.Equal(o.own, other.own) &&
		slices.Equal(o.refusing, other.refusing) && slices.Equal(o.agents, other.agents)
}

// reach tells the kernel what single workloads reach and do not reach, if that has changed: each may have all agents of the mesh refused.
func (m *Manager) reach(next *view, ready []*entry) {
	now := &ownReach{own: m.own(next, m.protected(ready)), refusing: m.refusing(next.snap), agents: next.snap.Agents, meshOnly: next.snap.MeshOnly, pruned: m.pruned}
	if now.equal(m.reached) {
		return
	}
	m.reached = now
	if m.unreached = m.redirect.SetOwn(append(slices.Clone(now.own), now.refusals()...), now.meshOnly); m.unreached != nil {
		m.reached = nil
		m.log.Error("what single workloads reach and do not reach is incomplete", "error", m.unreached)
	}
}

// refusing lists the workloads that must not ask agents, in a stable order.
func (m *Manager) refusing(snap *catalog.Snapshot) []refusing {
	var all []refusing
	for _, e := range m.workloads {
		if e.ID != 0 && e.refusesConsul(snap) {
			all = append(all, refusing{e.ID, m.isOnNode(e)})
		}
	}
	slices.SortFunc(all, func(a, b refusing) int { return cmp.Compare(a.workload, b.workload) })
	return all
}

// refusals lists the agents' addresses for each workload that must not ask them, in a stable order.
func (o *ownReach) refusals() []redirect.Destination {
	all := make([]redirect.Destination, 0, len(o.refusing)*len(o.agents))
	for _, w := range o.refusing {
		for _, at := range o.agents {
			if w.onNode || !at.Addr().IsLoopback() {
				all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port(), Workload: w.workload, Refuse: true})
			}
		}
	}
	return all
}

// isOnNode says whether all processes of e are in the node's own network namespace.
func (m *Manager) isOnNode(e *entry) bool {
	return len(e.inodes) > 0 && !slices.ContainsFunc(e.inodes, func(inode uint64) bool {
		return m.namespaces[inode] == nil || !m.namespaces[inode].Host
	})
}

func (e *entry) refusesConsul(snap *catalog.Snapshot) bool {
	if e.access != AccessDefault {
		return e.access == AccessRefuse
	}
	return !snap.ACLs && !slices.ContainsFunc(e.instancesIn(snap), func(i *catalog.Instance) bool { return i.Local && i.Native })
}

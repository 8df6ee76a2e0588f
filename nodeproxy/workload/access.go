package workload

import (
	"cmp"
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

// agentRefusals lists the agents' addresses for each workload that must not ask them, in a stable order. An address on
// loopback is the agent's only for a workload of the node's own network namespace.
func (m *Manager) agentRefusals(snap *catalog.Snapshot) []redirect.Destination {
	var refused []*entry
	for _, e := range m.workloads {
		if e.ID != 0 && e.refusesConsul(snap) {
			refused = append(refused, e)
		}
	}
	slices.SortFunc(refused, func(a, b *entry) int { return cmp.Compare(a.ID, b.ID) })
	var all []redirect.Destination
	for _, e := range refused {
		onNode := m.isOnNode(e)
		for _, at := range snap.Agents {
			if onNode || !at.Addr().IsLoopback() {
				all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port(), Workload: e.ID, Refuse: true})
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

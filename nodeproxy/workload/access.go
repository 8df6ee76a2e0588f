package workload

import (
	"net/netip"
	"slices"
	"strings"

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

// agentRefusals lists the agents' addresses for each workload that must not ask them. An address on loopback is the agent's only for
// a workload of the node's own network namespace.
func (m *Manager) agentRefusals(snap *catalog.Snapshot) []redirect.Destination {
	var all []redirect.Destination
	for _, e := range m.workloads {
		if e.ID == 0 || !e.refusesConsul(snap) {
			continue
		}
		onNode := len(e.inodes) > 0 && !slices.ContainsFunc(e.inodes, func(inode uint64) bool { return m.namespaces[inode] == nil || !m.namespaces[inode].Host })
		for _, at := range snap.Agents {
			if onNode || !at.Addr().IsLoopback() {
				all = append(all, redirect.Destination{Addr: at.Addr(), Port: at.Port(), Workload: e.ID, Refuse: true})
			}
		}
	}
	slices.SortFunc(all, func(a, b redirect.Destination) int {
		if a.Workload != b.Workload {
			return int(a.Workload) - int(b.Workload)
		}
		return strings.Compare(netip.AddrPortFrom(a.Addr, a.Port).String(), netip.AddrPortFrom(b.Addr, b.Port).String())
	})
	return all
}

func (e *entry) refusesConsul(snap *catalog.Snapshot) bool {
	if e.access != AccessDefault {
		return e.access == AccessRefuse
	}
	svc := snap.Services[e.Service]
	return !snap.ACLs && (svc == nil || !slices.ContainsFunc(svc.Instances, func(i *catalog.Instance) bool { return i.Local && i.Native }))
}

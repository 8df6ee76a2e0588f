package workload

import (
	"maps"
	"slices"
	"strings"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// guard is a place that rules protect: a port of a namespace, or all of them.
type guard struct {
	namespace uint64 // cookie
	port      uint16 // 0: every port
}

// rules lists what inbound connections meet. Guards come from what is claimed and defined, not from what is seen of
// addresses and processes at this moment: a port that was strict must not open because an application restarts.
func (m *Manager) rules(v *view, ready []*entry) []redirect.Rule {
	guards := make(map[guard]redirect.Rule)
	for _, e := range m.protected(ready) {
		for _, inode := range e.inodes {
			if s := m.namespaces[inode]; s != nil {
				m.guardWorkload(guards, v.snap, e, s)
			}
		}
	}
	all := slices.Collect(maps.Values(guards))
	for _, s := range v.served {
		if len(s.Workloads) > 0 {
			all = append(all, redirect.Rule{Namespace: s.space.Cookie, Addr: s.instance.Mesh.Addr(), Port: s.instance.Mesh.Port(),
				Action: redirect.Steer, Workload: s.Workloads[0].ID})
			all = append(all, probeRules(s)...)
		}
	}
	return all
}

// protected lists the workloads that are enrolled or about to be, in a stable order.
func (m *Manager) protected(ready []*entry) []*entry {
	var all []*entry
	for _, e := range m.workloads {
		if e.ID != 0 && (e.enrolled || slices.Contains(ready, e)) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b *entry) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	return all
}

// guardWorkload guards what e has in s: every port of a private namespace, and the ports of its service's local instances.
func (m *Manager) guardWorkload(guards map[guard]redirect.Rule, snap *catalog.Snapshot, e *entry, s *space) {
	add := func(port uint16, action redirect.Action) {
		at := guard{s.Cookie, port}
		if old, taken := guards[at]; taken && old.Action <= action {
			return // the stricter one holds
		}
		guards[at] = redirect.Rule{Namespace: s.Cookie, Port: port, Action: action, Workload: e.ID, Group: m.group(e.Service)}
	}
	mode := redirect.Strict
	if e.Mode == Permissive {
		mode = redirect.Permissive
	}
	if !s.Host {
		add(0, mode)
	}
	svc := snap.Services[e.Service]
	if svc == nil {
		return
	}
	for _, inst := range svc.Instances {
		switch {
		case !inst.Local:
		case inst.Native:
			add(inst.Mesh.Port(), redirect.Untouched)
		default:
			action := mode
			if inst.Permissive {
				action = redirect.Permissive
			}
			for _, port := range []uint16{inst.Address.Port(), inst.Delivery.Port()} {
				if port != 0 {
					add(port, action)
				}
			}
		}
	}
}

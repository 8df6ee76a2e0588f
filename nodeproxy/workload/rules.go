package workload

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
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
			all = append(all, redirect.Rule{Namespace: s.Namespace.Cookie, Addr: s.instance.Mesh.Addr(), Port: s.instance.Mesh.Port(),
				Action: redirect.Steer, Workload: s.Workloads[0].ID})
			all = append(all, probeRules(s)...)
		}
	}
	return all
}

// protected lists the workloads that are enrolled or about to be, in the order in which contested ports are theirs: by
// provider, then by cgroup.
func (m *Manager) protected(ready []*entry) []*entry {
	var all []*entry
	for _, e := range m.workloads {
		if e.ID != 0 && e.Mesh != Disabled && (e.enrolled || slices.Contains(ready, e)) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(m.precedence(a.Provider), m.precedence(b.Provider)), strings.Compare(a.Cgroup, b.Cgroup))
	})
	return all
}

func (m *Manager) precedence(provider string) int {
	return slices.IndexFunc(m.cfg.Providers, func(p Provider) bool { return p.Name() == provider })
}

// guardWorkload guards what e has in s: every port of a private namespace, the ports of its services' local instances and
// those that its labels name, less those that its labels exclude.
func (m *Manager) guardWorkload(guards map[guard]redirect.Rule, snap *catalog.Snapshot, e *entry, s *space) {
	add := func(port uint16, action redirect.Action) {
		if port != 0 && slices.Contains(e.claim.Exclude.InboundPorts, port) {
			action = redirect.Untouched
		}
		rule := redirect.Rule{Namespace: s.Cookie, Port: port, Action: action, Workload: e.ID, Group: m.group(&e.Workload)}
		if first, taken := guards[guard{s.Cookie, port}]; taken {
			if s.Host && first.Group != rule.Group {
				e.contests(port, m.servicesOf(first.Group))
			}
			rule = first
			rule.Action = min(rule.Action, action) // the stricter one holds
		}
		guards[guard{s.Cookie, port}] = rule
	}
	mode := redirect.Strict
	switch {
	case e.Mesh == Observe:
		mode = redirect.Observe
	case e.Mode == Permissive:
		mode = redirect.Permissive
	}
	if !s.Host {
		add(0, mode)
	}
	for _, port := range e.claim.Ports {
		add(port, mode)
	}
	for _, port := range e.claim.Exclude.InboundPorts {
		add(port, redirect.Untouched)
	}
	for _, inst := range e.instancesIn(snap) {
		switch {
		case !inst.Local:
		case inst.Native:
			add(e.inside(inst.Mesh), redirect.Untouched)
		default:
			action := mode
			if inst.Permissive && e.Mesh == Enabled {
				action = redirect.Permissive
			}
			for _, port := range []uint16{e.inside(inst.Address), inst.Delivery.Port()} {
				if port != 0 {
					add(port, action)
				}
			}
		}
	}
}

// inside is the port in e's namespaces that connections to an instance's address reach.
func (e *entry) inside(at netip.AddrPort) uint16 {
	if to := e.mapping(at); to.IsValid() {
		return to.Port()
	}
	return at.Port()
}

// mapping is where the node leads connections to one of its addresses, if that is into e.
func (e *entry) mapping(at netip.AddrPort) netip.AddrPort {
	for _, m := range e.claim.Mapped {
		every := m.Node.Addr().IsUnspecified() && m.Node.Addr().Is4() == at.Addr().Is4()
		if m.Node.Port() == at.Port() && (every || m.Node.Addr() == at.Addr()) {
			return m.To
		}
	}
	return netip.AddrPort{}
}

// instancesIn lists the instances of e's services.
func (e *entry) instancesIn(snap *catalog.Snapshot) []*catalog.Instance {
	var all []*catalog.Instance
	for _, name := range e.Services() {
		if svc := snap.Services[name]; svc != nil {
			all = append(all, svc.Instances...)
		}
	}
	return all
}

func (e *entry) contests(port uint16, holder string) {
	text := fmt.Sprintf("port %d of the node is guarded for service %q, whose own calls alone pass: give one of the two another port or a network namespace", port, holder)
	if !slices.Contains(e.contested, text) {
		e.contested = append(e.contested, text)
	}
}

func (m *Manager) servicesOf(group uint32) string {
	for services, g := range m.groups {
		if g == group {
			return services
		}
	}
	return ""
}

package workload

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// labelledMTLS is why a workload whose label says so takes the proxy.
const labelledMTLS = "the label same-node of a workload is mtls"

// target is a local instance, and how it is reached directly.
type target struct {
	*served
	address netip.AddrPort
	closes  uint64
	group   uint32
	why     string // it is not, and why
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
		t := target{served: s, closes: in.closes, group: m.group(s.Workloads[0])}
		switch t.address, t.why = s.directAddress(in.listeners); {
		case t.why != "":
		case slices.ContainsFunc(s.Workloads, func(w *Workload) bool { return w.Proxied }):
			t.why = labelledMTLS
		case slices.ContainsFunc(s.Workloads, func(w *Workload) bool { return m.group(w) != t.group }):
			t.why = "workloads that do not have all services in common serve it"
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

// directAddress is where others of this node reach the application of s. One that is delivered to on loopback, as Consul has it
// unless told otherwise, is reached at the instance's own address if it is the same listener that is there.
func (s *served) directAddress(listeners []redirect.Socket) (at netip.AddrPort, why string) {
	ip, port := s.address(), s.port()
	if to := s.instance.Delivery.Addr(); to.IsLoopback() && (to.Is4() != ip.Is4() || !onEveryAddress(listeners, port)) {
		return at, "its application is reached on loopback alone"
	} else if to.IsValid() && !to.IsUnspecified() && !to.IsLoopback() {
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

// onEveryAddress says whether who listens on a port does so on every address.
func onEveryAddress(listeners []redirect.Socket, port uint16) bool {
	found := false
	for _, l := range listeners {
		if l.Local.Port() != port {
			continue
		}
		if !l.Local.Addr().IsUnspecified() {
			return false
		}
		found = true
	}
	return found
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
		reached[t.Service][t.instance] = redirect.Target{Namespace: t.space.Cookie, Address: t.address, Source: source, Closes: t.closes, Group: t.group}
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
	for _, id := range v.callers[workload] {
		for _, up := range v.snap.Upstreams[id] {
			if up.At.Addr() == at.Addr() && (at.Port() == 0 || up.At.Port() == at.Port()) {
				return true
			}
		}
	}
	return false
}

// dialled maps the addresses of a service that caller may dial directly to where they lead. A virtual address leads to the
// local instances where they go before others, or are all that there are; to those that are about to end only if nothing else is.
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
	ends := func(inst *catalog.Instance) bool { return inst.Local && slices.Contains(m.ends, inst.ID) }
	others := slices.ContainsFunc(svc.Instances, func(inst *catalog.Instance) bool { return inst.Usable() && !ends(inst) })
	for _, inst := range svc.Instances {
		if t, ok := to[inst]; ok && inst.Healthy && !(others && ends(inst)) {
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

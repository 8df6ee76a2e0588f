package redirect

import (
	"net/netip"
)

// Bypass is a workload's connection that would not be what it is if it was made now.
type Bypass struct {
	Socket
	Accepted bool // else the workload dialled it
}

// Bypasses lists the connections of a workload in this namespace that its redirects and rules would not let be made as they
// are: dialled, and now redirected or refused; accepted, and now refused as plaintext, which its own calls and what the daemon
// delivers would not be. mine says which cgroups' sockets are the workload's.
func (ns *Namespace) Bypasses(workload uint32, mine func(cgroup uint64) bool) ([]Bypass, error) {
	own, err := CgroupID(ns.r.cgroup)
	if err != nil {
		return nil, err
	}
	sockets, err := ns.sockets()
	if err != nil {
		return nil, err
	}
	listens := make(map[uint16]bool)
	trusted := make(map[[2]netip.AddrPort]bool) // from, to
	for _, s := range sockets {
		if s.Listening && mine(s.Cgroup) {
			listens[s.Local.Port()] = true
		}
		if s.Cgroup == own || mine(s.Cgroup) {
			trusted[[2]netip.AddrPort{s.Local, s.Remote}] = true
		}
	}
	ns.r.mu.Lock()
	defer ns.r.mu.Unlock()
	rules := ns.r.rulesOf(workload)
	var found []Bypass
	for _, s := range sockets {
		accepted := listens[s.Local.Port()]
		switch {
		case s.Listening || !mine(s.Cgroup) && !(s.Handshaking && accepted):
		case accepted:
			if !trusted[[2]netip.AddrPort{s.Remote, s.Local}] && ns.refuses(s) {
				found = append(found, Bypass{Socket: s, Accepted: true})
			}
		case rules.diverts(s.Remote) && !ns.r.isGranted(s.Cookie):
			found = append(found, Bypass{Socket: s})
		}
	}
	return found, nil
}

// isGranted says whether a connection is on a grant: it goes to an instance's own address, as if it was dialled past the mesh.
func (r *Redirect) isGranted(cookie uint64) bool {
	var g outboundGranted
	return r.obj.Granted.Lookup(cookie, &g) == nil
}

// refuses says what lookup in bpf/inbound.c would: whether the connection that s accepted is plaintext to a strict port.
func (ns *Namespace) refuses(s Socket) bool {
	if !ns.Host && s.Local.Addr().IsLoopback() {
		return false
	}
	key := outboundRuleKey{Netns: ns.Cookie, Ip: toAddr(s.Local.Addr()), Port: s.Local.Port()}
	rule, found := ns.r.rules[key]
	if !found {
		key.Ip = outboundAddr{}
		rule, found = ns.r.rules[key]
	}
	if !found {
		key.Port = 0
		rule = ns.r.rules[key]
	}
	_, plaintext := longest(ns.r.plaintext, s.Remote.Addr())
	return rule.Action == uint32(outboundRuleActionRULE_STRICT) && !plaintext
}

// outbound is what the connects of one workload meet.
type outbound struct {
	workload uint32
	r        *Redirect
	ports    map[uint16]bool // excluded
	networks map[outboundRangeKey]uint32
}

func (r *Redirect) rulesOf(workload uint32) outbound {
	o := outbound{workload: workload, r: r, ports: make(map[uint16]bool), networks: make(map[outboundRangeKey]uint32)}
	for k := range r.exclusions {
		switch {
		case k.Workload != workload:
		case k.Port != 0:
			o.ports[swap(k.Port)] = true
		default:
			o.networks[outboundRangeKey{Prefixlen: k.Prefixlen - uint32(outboundExclusionBitsEXCLUDED_PORT), Ip: k.Ip}] = 1
		}
	}
	return o
}

// diverts says what decide in bpf/outbound.c would: whether a connection to that address is redirected or refused.
func (o outbound) diverts(to netip.AddrPort) bool {
	if _, excluded := longest(o.networks, to.Addr()); excluded || o.ports[to.Port()] {
		return false
	}
	key := outboundDestinationKey{Ip: toAddr(to.Addr()), Port: swap(to.Port()), Workload: o.workload}
	dest, found := o.r.single[key]
	if !found {
		key.Workload = 0
		dest, found = o.r.dests[key]
	}
	if !found {
		key.Port = 0
		dest, found = o.r.dests[key]
	}
	if found {
		return dest.Flags&uint32(outboundDestFlagDEST_PASS) == 0
	}
	if _, virtual := longest(o.r.ranges, to.Addr()); virtual {
		return true
	}
	kind, _ := longest(o.r.outside, to.Addr())
	_, own := o.r.single[outboundDestinationKey{Ip: toAddr(to.Addr()), Workload: o.workload}]
	return kind == uint32(outboundRangeKindRANGE_OUTSIDE) && to.Port() != 53 && !own
}

// longest is the value of the longest prefix that ip is in.
func longest(ranges map[outboundRangeKey]uint32, ip netip.Addr) (value uint32, found bool) {
	var best uint32
	for k, v := range ranges {
		if (!found || k.Prefixlen > best) && netip.PrefixFrom(mapped(k.Ip), int(k.Prefixlen)).Contains(netip.AddrFrom16(ip.As16())) {
			best, value, found = k.Prefixlen, v, true
		}
	}
	return value, found
}

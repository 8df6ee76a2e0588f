package consul

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// giveVirtual gives services their virtual IPs. One that two services have belongs to none, and connections to it are refused.
func (b *builder) giveVirtual() {
	owners := make(map[netip.Addr]map[string]bool)
	own := func(ip netip.Addr, name string) {
		if owners[ip] == nil {
			owners[ip] = make(map[string]bool)
		}
		owners[ip][name] = true
	}
	tagged, manual := make(map[string]bool), make(map[netip.Addr]bool)
	for name, known := range b.data.services {
		for _, e := range known.instances {
			if e.virtual.IsValid() && b.services[name] != nil {
				own(e.virtual, name)
				tagged[name] = true
			}
		}
	}
	for k, c := range b.data.chains {
		if k.datacenter != "" {
			continue
		}
		if !tagged[k.service] { // instances say it sooner
			for _, ip := range c.virtual {
				own(ip, k.service)
			}
		}
		for _, ip := range c.manual {
			own(ip, k.service)
			manual[ip] = true
		}
	}
	for _, ip := range slices.SortedFunc(maps.Keys(owners), netip.Addr.Compare) {
		names := slices.Sorted(maps.Keys(owners[ip]))
		svc := b.services[names[0]]
		switch {
		case len(names) > 1:
			b.problem(names[0], "refused", "virtual IP %s belongs to %q and %q: connections to it are refused", ip, names[0], names[1])
		case b.isVirtual(ip), manual[ip] && b.inCIDRs(ip):
			svc.Virtual = append(svc.Virtual, ip)
		case manual[ip]:
			b.problem(names[0], "refused", "virtual IP %s of %q, which was assigned by hand, is outside virtual_ips %v and virtual_cidrs %v: add its network to virtual_cidrs", ip, names[0], b.virtualRanges(), b.cfg.VirtualCIDRs)
		default:
			b.problem(names[0], "refused", "virtual IP %s of %q is outside virtual_ips %v: correct virtual_ips", ip, names[0], b.virtualRanges())
		}
	}
}

// giveTagged gives services the addresses that their instances are tagged "virtual" with. Whoever can write a service can
// write that tag: it counts inside virtual_cidrs only, where no instance can be.
func (b *builder) giveTagged() {
	owners := make(map[netip.AddrPort]map[string]bool)
	for _, name := range slices.Sorted(maps.Keys(b.data.services)) {
		if b.services[name] == nil {
			continue
		}
		for _, at := range b.tagged(name) {
			if owners[at] == nil {
				owners[at] = make(map[string]bool)
			}
			owners[at][name] = true
		}
	}
	for _, at := range slices.SortedFunc(maps.Keys(owners), netip.AddrPort.Compare) {
		names := slices.Sorted(maps.Keys(owners[at]))
		if len(names) > 1 {
			b.problem(names[0], "refused", "virtual address %s belongs to %q and %q: connections to it are refused", at, names[0], names[1])
			b.contested = append(b.contested, at)
			continue
		}
		b.services[names[0]].Ports = append(b.services[names[0]].Ports, at)
	}
}

// tagged lists the addresses that a service's instances are tagged with, but for those that do not count.
func (b *builder) tagged(name string) []netip.AddrPort {
	var all []netip.AddrPort
	var refused []place
	for _, e := range b.data.services[name].instances {
		if e.tagged == (place{}) {
			continue
		}
		ip, err := netip.ParseAddr(e.tagged.host)
		ip = ip.Unmap()
		switch {
		case err != nil || e.tagged.port < 1 || e.tagged.port > 65535 || !b.inCIDRs(ip) || b.isVirtual(ip):
			refused = append(refused, e.tagged)
		default:
			all = append(all, netip.AddrPortFrom(ip, uint16(e.tagged.port)))
		}
	}
	slices.SortFunc(refused, func(x, y place) int { return cmp.Or(cmp.Compare(x.host, y.host), cmp.Compare(x.port, y.port)) })
	for _, at := range slices.Compact(refused) {
		b.problem(name, "refused", "address %q port %d, which %q is tagged \"virtual\" with, is ignored: it is outside virtual_cidrs %v; add its network if calls to it are to be redirected", at.host, at.port, name, b.cfg.VirtualCIDRs)
	}
	return all
}

func (b *builder) inCIDRs(ip netip.Addr) bool {
	return slices.ContainsFunc(b.cfg.VirtualCIDRs, func(p netip.Prefix) bool { return p.Contains(ip) })
}

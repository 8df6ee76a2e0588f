package consul

import (
	"net/netip"
	"slices"
)

// nodesTopic are the nodes of the datacenter: each has an agent, or is registered as if it had.
func (r *run) nodesTopic() topic {
	return topic{what: "the nodes", every: look, ask: fixed("/v1/catalog/nodes"), apply: func(a *answer) error {
		var list []struct {
			Address         string
			TaggedAddresses map[string]string
		}
		if err := decode(a, &list); err != nil {
			return err
		}
		nodes := []netip.Addr{}
		add := func(text string) {
			if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" && !ip.IsUnspecified() {
				nodes = append(nodes, ip.Unmap())
			}
		}
		for _, node := range list {
			add(node.Address)
			for _, tag := range []string{"lan", "wan", "lan_ipv4", "lan_ipv6", "wan_ipv4", "wan_ipv6"} {
				add(node.TaggedAddresses[tag])
			}
		}
		slices.SortFunc(nodes, netip.Addr.Compare)
		nodes = slices.Compact(nodes)
		r.world.update(func(d *data) bool {
			changed := d.nodes == nil || !slices.Equal(d.nodes, nodes)
			d.nodes = nodes
			return changed
		})
		return nil
	}}
}

// agents are where the agents of the datacenter answer. The ports of others are not in the catalog: this node's agent's are
// taken for theirs.
func (d *data) agents() []netip.AddrPort {
	all := slices.Clone(d.agent.own)
	for _, ip := range append([]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, d.nodes...) {
		for _, port := range d.agent.ports {
			all = append(all, netip.AddrPortFrom(ip, port))
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}

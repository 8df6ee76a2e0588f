package netlab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Join connects two namespaces by a veth pair, up at both ends, called nameA in a and nameB in b. The pair goes with
// either namespace.
func Join(a *Namespace, nameA string, b *Namespace, nameB string) error {
	err := a.handle.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: nameA},
		PeerName:      nameB,
		PeerNamespace: netlink.NsFd(b.file.Fd()),
	})
	if err != nil {
		return fmt.Errorf("make veth pair %s-%s: %w", nameA, nameB, err)
	}
	if err := a.Up(nameA); err != nil {
		return err
	}
	return b.Up(nameB)
}

// Bridge makes a bridge, up, and puts the named links under it.
func (n *Namespace) Bridge(name string, ports ...string) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := n.handle.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make bridge %s: %w", name, err)
	}
	for _, port := range ports {
		link, err := n.link(port)
		if err != nil {
			return err
		}
		if err := n.handle.LinkSetMaster(link, bridge); err != nil {
			return fmt.Errorf("put %s under bridge %s: %w", port, name, err)
		}
	}
	return n.Up(name)
}

// Up sets a link up.
func (n *Namespace) Up(name string) error {
	link, err := n.link(name)
	if err != nil {
		return err
	}
	if err := n.handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

// Down sets a link down.
func (n *Namespace) Down(name string) error {
	link, err := n.link(name)
	if err != nil {
		return err
	}
	if err := n.handle.LinkSetDown(link); err != nil {
		return fmt.Errorf("set link %s down: %w", name, err)
	}
	return nil
}

// Remove deletes a link, with its peer if it has one.
func (n *Namespace) Remove(name string) error {
	link, err := n.link(name)
	if err != nil {
		return err
	}
	if err := n.handle.LinkDel(link); err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// Address gives a link an address, usable at once.
func (n *Namespace) Address(name string, prefix netip.Prefix) error {
	link, err := n.link(name)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := n.handle.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to %s: %w", prefix, name, err)
	}
	return nil
}

// Route sends to by way of the router via.
func (n *Namespace) Route(to netip.Prefix, via netip.Addr) error {
	if err := n.handle.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("add route to %s via %s: %w", to, via, err)
	}
	return nil
}

// Forward lets the namespace forward packets, of both families.
func (n *Namespace) Forward() error {
	if err := n.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return n.Sysctl("net/ipv6/conf/all/forwarding", "1")
}

// Links names the namespace's links.
func (n *Namespace) Links() ([]string, error) {
	links, err := n.handle.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make([]string, len(links))
	for i, link := range links {
		names[i] = link.Attrs().Name
	}
	return names, nil
}

func (n *Namespace) link(name string) (netlink.Link, error) {
	link, err := n.handle.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", name, err)
	}
	return link, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

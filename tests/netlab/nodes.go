package netlab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// Wire is the name of the link between the two nodes, in the namespace of either.
const Wire = "wire"

// Uplink is the name of a workload's link, in its own namespace.
const Uplink = "eth0"

// TwoNodes is a Lab of two nodes, joined by a link named Wire. Every workload reaches every other by its own address,
// without any translation.
//
//	node-1  192.0.2.1  2001:db8::1       node-2  192.0.2.2  2001:db8::2
//	  workloads 10.1.K.2, fd00:1:K::2      workloads 10.2.K.2, fd00:2:K::2
type TwoNodes struct {
	*Lab
	Nodes [2]*Node
}

// Node is one node: a network namespace that forwards, a cgroup for its workloads, and a directory.
type Node struct {
	Name      string
	Namespace *Namespace
	Cgroup    *Cgroup // of everything on the node; a daemon gets a child of its own
	Dir       string
	IPv4      netip.Addr
	IPv6      netip.Addr

	lab       *Lab
	number    byte
	workloads serial
}

// Workload is a place for an application: a cgroup on a node, and a network namespace of its own or the node's.
type Workload struct {
	Name      string
	Node      *Node
	Namespace *Namespace
	Cgroup    *Cgroup
	IPv4      netip.Addr
	IPv6      netip.Addr
}

// NewTwoNodes makes the topology. On error nothing of it remains.
func NewTwoNodes() (*TwoNodes, error) {
	lab, err := New()
	if err != nil {
		return nil, err
	}
	t := &TwoNodes{Lab: lab}
	if err := t.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("build two nodes: %w", err), lab.Close())
	}
	return t, nil
}

func (t *TwoNodes) build() error {
	for i := range t.Nodes {
		node, err := t.node(byte(i + 1))
		if err != nil {
			return err
		}
		t.Nodes[i] = node
	}
	a, b := t.Nodes[0], t.Nodes[1]
	if err := Join(a.Namespace, Wire, b.Namespace, Wire); err != nil {
		return err
	}
	for i, node := range t.Nodes {
		if err := errors.Join(
			node.Namespace.Address(Wire, netip.PrefixFrom(node.IPv4, 24)),
			node.Namespace.Address(Wire, netip.PrefixFrom(node.IPv6, 64)),
		); err != nil {
			return err
		}
		if err := node.Namespace.routeTo(t.Nodes[1-i]); err != nil {
			return err
		}
	}
	return nil
}

func (t *TwoNodes) node(number byte) (*Node, error) {
	n := &Node{
		Name:   fmt.Sprintf("node-%d", number),
		IPv4:   netip.AddrFrom4([4]byte{192, 0, 2, number}),
		IPv6:   netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: number}),
		lab:    t.Lab,
		number: number,
	}
	n.Dir = filepath.Join(t.Dir(), n.Name)
	if err := os.Mkdir(n.Dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if n.Cgroup, err = t.Cgroup().Child(n.Name); err != nil {
		return nil, err
	}
	if n.Namespace, err = t.Namespace(); err != nil {
		return nil, err
	}
	return n, n.Namespace.Forward()
}

// Lone makes a third node, which is joined to neither of the two.
func (t *TwoNodes) Lone() (*Node, error) { return t.node(3) }

// routeTo routes the workloads of the other node by way of its end of the wire.
func (n *Namespace) routeTo(other *Node) error {
	v4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, other.number}), 16)
	v6 := netip.PrefixFrom(workloadIPv6(other.number, 0, 0), 32)
	return errors.Join(n.Route(v4, other.IPv4), n.Route(v6, other.IPv6))
}

func workloadIPv4(node, workload, host byte) netip.Addr {
	return netip.AddrFrom4([4]byte{10, node, workload, host})
}

func workloadIPv6(node, workload, host byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0, 0, node, 0, workload, 15: host})
}

// HostWorkload makes a workload in the node's own network namespace, with the node's addresses.
func (n *Node) HostWorkload(name string) (*Workload, error) {
	cgroup, err := n.Cgroup.Child(name)
	if err != nil {
		return nil, err
	}
	return &Workload{Name: name, Node: n, Namespace: n.Namespace, Cgroup: cgroup, IPv4: n.IPv4, IPv6: n.IPv6}, nil
}

// Workload makes a workload in a network namespace of its own, whose Uplink leads to the node. The address with host part
// 3 of the same subnets is free for a second one.
func (n *Node) Workload(name string) (*Workload, error) {
	cgroup, err := n.Cgroup.Child(name)
	if err != nil {
		return nil, err
	}
	w := &Workload{Name: name, Node: n, Cgroup: cgroup}
	w.Namespace, w.IPv4, w.IPv6, err = n.Pod()
	if err != nil {
		return nil, fmt.Errorf("make workload %s: %w", name, err)
	}
	return w, nil
}

// Pod makes a network namespace with addresses of its own, connected to the node, and no cgroup.
func (n *Node) Pod() (*Namespace, netip.Addr, netip.Addr, error) {
	ns, err := n.lab.Namespace()
	if err != nil {
		return nil, netip.Addr{}, netip.Addr{}, err
	}
	k := n.workloads.next()
	if k > 255 {
		return nil, netip.Addr{}, netip.Addr{}, fmt.Errorf("number the workloads of %s: more than 255", n.Name)
	}
	v4, v6 := workloadIPv4(n.number, byte(k), 2), workloadIPv6(n.number, byte(k), 2)
	return ns, v4, v6, n.plug(ns, byte(k))
}

// plug connects ns to the node as its k-th workload.
func (n *Node) plug(ns *Namespace, k byte) error {
	link := fmt.Sprintf("w%d", k)
	if err := Join(n.Namespace, link, ns, Uplink); err != nil {
		return err
	}
	gateway4, gateway6 := workloadIPv4(n.number, k, 1), workloadIPv6(n.number, k, 1)
	if err := errors.Join(
		n.Namespace.Address(link, netip.PrefixFrom(gateway4, 24)),
		n.Namespace.Address(link, netip.PrefixFrom(gateway6, 64)),
		ns.Address(Uplink, netip.PrefixFrom(workloadIPv4(n.number, k, 2), 24)),
		ns.Address(Uplink, netip.PrefixFrom(workloadIPv6(n.number, k, 2), 64)),
	); err != nil {
		return err
	}
	return errors.Join(
		ns.Route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway4),
		ns.Route(netip.PrefixFrom(netip.IPv6Unspecified(), 0), gateway6),
	)
}

// Start starts c in the workload's cgroup and network namespace.
func (w *Workload) Start(c Command) (*Process, error) {
	c.Namespace, c.Cgroup = w.Namespace, w.Cgroup
	return w.Node.lab.Start(c)
}

// Capture records what crosses the link between the nodes.
func (t *TwoNodes) Capture() (*Capture, error) { return t.Nodes[0].Namespace.Capture(Wire) }

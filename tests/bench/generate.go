package main

import (
	"fmt"
	"net/netip"

	"nodeproxy.io/tests/meshlab"
)

// size is how large a mesh is, of which one node is measured.
type size struct {
	Workloads  int `json:"workloads"` // of the node, each in a network namespace of its own, as a service of its own
	Services   int `json:"services"`
	Endpoints  int `json:"endpoints"`
	Intentions int `json:"intentions"` // beside the one that denies what no other matches
}

func fullSize() size {
	return size{Workloads: 250, Services: 5000, Endpoints: 20000, Intentions: 10000}
}

// times is the size by a factor.
func (s size) times(factor float64) size {
	scaled := func(n int) int { return int(float64(n)*factor + 0.5) }
	return size{scaled(s.Workloads), scaled(s.Services), scaled(s.Endpoints), scaled(s.Intentions)}
}

// perNode is how many endpoints a node has where no daemon runs.
const perNode = 100

// endpoint is one instance of a service, on a node where no daemon runs.
type endpoint struct {
	service, id string
	node        int // counted from 0
	address     netip.Addr
}

func serviceName(i int) string { return fmt.Sprintf("service-%d", i) }

// remote lists the endpoints of s on other nodes, node by node. The first endpoint of each of the first services is the node's own.
func (s size) remote() []endpoint {
	var all []endpoint
	address := netip.AddrFrom4([4]byte{10, 64})
	for i := s.Workloads; i < s.Endpoints; i++ {
		address = address.Next()
		service := serviceName(i % s.Services)
		all = append(all, endpoint{service: service, id: fmt.Sprintf("%s-%d", service, 1+i/s.Services), node: len(all) / perNode, address: address})
	}
	return all
}

func nodeName(node int) string { return fmt.Sprintf("other-%d", node) }

// nodeAddress is that of a node where no daemon runs.
func nodeAddress(node int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 200, byte(node >> 8), byte(node)})
}

// sources are those of the intentions of the i-th service: every other one is allowed, the first if allowed says so.
func (s size) sources(i int, allowed bool) []meshlab.Source {
	var all []meshlab.Source
	for j := range s.Intentions / s.Services {
		source := meshlab.Allow(serviceName((i + 1 + j) % s.Services))
		if j%2 == 1 || j == 0 && !allowed {
			source.Action = "deny"
		}
		all = append(all, source)
	}
	return all
}

package consul

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/resolver"
)

// endpoints names a question for instances. With a service alone it is all of them in this datacenter.
type endpoints struct {
	service     string
	datacenter  string // "" is this one
	peer        string // "" is this cluster
	filter      string // of a resolver's subset
	onlyPassing bool   // a warning counts as unhealthy
	gateways    bool   // the instances of service, which are mesh gateways, and not those behind its proxies
}

func (e endpoints) isPlain() bool { return e == endpoints{service: e.service} }

// fault names the question where it is not answered.
func (e endpoints) fault() string {
	text := serviceFault(e.service)
	if e.datacenter != "" {
		text += " in datacenter " + e.datacenter
	}
	if e.peer != "" {
		text += " of peer " + e.peer
	}
	if e.filter != "" {
		text += " where " + e.filter
	}
	return text
}

// chainKey names a discovery chain: that of a service, as evaluated in a datacenter; "" is this one.
type chainKey struct{ service, datacenter string }

func (k chainKey) fault() string {
	return "the discovery chain of " + (&catalog.Target{Service: k.service, Datacenter: k.datacenter}).String()
}

// chain is a compiled discovery chain, as far as it concerns connections.
type chain struct {
	read            time.Time
	virtual, manual []netip.Addr
	balance         catalog.Balance
	targets         []target // the first is the primary one
	ignored         []string // sentences: what of it is not honoured
}

// target is one of a chain's.
type target struct {
	endpoints
	subset      string
	gateway     catalog.GatewayMode
	unreachable string // why, and what to do; "" it is not
}

// compiled chains as /v1/discovery-chain answers them (agent/structs/discovery_chain.go): the library's struct leaves
// out virtual IPs, partitions and peers.
type compiledChain struct {
	StartNode string
	Nodes     map[string]struct {
		Type     string
		Resolver *struct {
			Target   string
			Failover *struct {
				Targets []string
				Policy  *struct{ Mode string }
			}
		}
		LoadBalancer *api.LoadBalancer
	}
	Targets                          map[string]compiledTarget
	AutoVirtualIPs, ManualVirtualIPs []string
}

type compiledTarget struct {
	Service, ServiceSubset, Namespace, Partition, Datacenter, Peer string

	MeshGateway struct{ Mode api.MeshGatewayMode }
	Subset      api.ServiceResolverSubset
}

// parseChain reads the chain of an agent in datacenter here.
func parseChain(a *answer, here string) (*chain, error) {
	var got struct{ Chain compiledChain }
	if err := decode(a, &got); err != nil {
		return nil, err
	}
	node, found := got.Chain.Nodes[got.Chain.StartNode]
	if !found || node.Resolver == nil {
		return nil, fmt.Errorf("read the answer: the chain begins with %q, which is no resolver", got.Chain.StartNode)
	}
	c := &chain{virtual: addrs(got.Chain.AutoVirtualIPs), manual: addrs(got.Chain.ManualVirtualIPs)}
	ids := []string{node.Resolver.Target}
	if f := node.Resolver.Failover; f != nil {
		ids = append(ids, f.Targets...)
		if f.Policy != nil && resolver.Unordered(f.Policy.Mode) != "" {
			c.ignored = append(c.ignored, resolver.Unordered(f.Policy.Mode))
		}
	}
	for _, id := range ids {
		t, known := got.Chain.Targets[id]
		if !known {
			return nil, fmt.Errorf("read the answer: the chain has no target %q", id)
		}
		c.targets = append(c.targets, t.resolve(here))
	}
	balance, ignored := resolver.Balance(node.LoadBalancer)
	c.balance, c.ignored = balance, append(c.ignored, ignored...)
	return c, nil
}

func addrs(texts []string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil {
			all = append(all, ip.Unmap())
		}
	}
	return all
}

func (t *compiledTarget) resolve(here string) target {
	r := target{
		endpoints: endpoints{service: t.Service, filter: t.Subset.Filter, onlyPassing: t.Subset.OnlyPassing},
		subset:    t.ServiceSubset,
	}
	if t.Datacenter != here {
		r.datacenter, r.gateway = t.Datacenter, catalog.GatewayMode(t.MeshGateway.Mode)
	}
	switch {
	case t.Peer != "":
		r.endpoints, r.gateway = endpoints{service: t.Service, peer: t.Peer}, catalog.GatewayMode(t.MeshGateway.Mode)
	case !isDefault(t.Namespace) || !isDefault(t.Partition):
		r.unreachable = fmt.Sprintf("%q is in namespace %q and partition %q: those of Consul Enterprise are untested and refused", t.Service, t.Namespace, t.Partition)
	}
	return r
}

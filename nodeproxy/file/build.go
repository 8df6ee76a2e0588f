package file

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/hclfile"
	"nodeproxy.io/nodeproxy/resolver"
	"nodeproxy.io/policy"
)

// world is all that a snapshot is made of. What it points to is not changed any more.
type world struct {
	mesh      *mesh
	state     *state
	authority *authority
	policy    *policy.Policy
}

// equal says whether w and o make the same snapshots, but for leaves and health.
func (w *world) equal(o *world) bool {
	return w.state.equal(o.state) && w.authority.equal(o.authority) && reflect.DeepEqual(w.mesh, o.mesh)
}

// sameButIntentions says whether w and o differ in nothing but intentions.
func (w *world) sameButIntentions(o *world) bool {
	a, b := *w.mesh, *o.mesh
	a.entries.intentions, b.entries.intentions = nil, nil
	return w.state.equal(o.state) && w.authority.equal(o.authority) && reflect.DeepEqual(a, b)
}

// local lists the instances of node.
func (w *world) local(node string) []*instance {
	return slices.DeleteFunc(slices.Clone(w.mesh.instances), func(i *instance) bool { return i.node != node })
}

// builder makes snapshots of a world.
type builder struct {
	cfg *Config
	*world
	healthy  func(*instance) bool
	services map[string]*catalog.Service
	problems []catalog.Problem
	places   map[netip.AddrPort]*instance // who has an address, application's or mesh
	errs     []error
}

// build makes a snapshot. Errors name file and line.
func build(cfg *Config, w *world, leaves map[string]*tls.Certificate, healthy func(*instance) bool, generation uint64, now time.Time) (*catalog.Snapshot, error) {
	b := &builder{
		cfg: cfg, world: w, healthy: healthy, problems: slices.Clone(w.mesh.problems),
		services: make(map[string]*catalog.Service), places: make(map[netip.AddrPort]*instance),
	}
	for _, inst := range w.mesh.instances {
		b.add(inst)
	}
	if err := hclfile.Join(b.errs...); err != nil {
		return nil, err
	}
	b.addChains()
	if len(w.mesh.instances) > 0 && len(w.local(cfg.Node)) == 0 {
		b.problems = append(b.problems, catalog.Problem{Kind: "unknown-node",
			Text: fmt.Sprintf("%s/%s defines no service, so this node has none: check node { name }", nodesDir, cfg.Node)})
	}
	for _, name := range slices.Sorted(maps.Keys(leaves)) {
		if b.services[name] == nil {
			b.problems = append(b.problems, catalog.Problem{Service: name, Kind: "unknown-service",
				Text: fmt.Sprintf("a workload of this node runs as %q, which no node defines: it can call others, and nobody can call it; define it below %s/", name, nodesDir)})
		}
	}
	return catalog.New(catalog.Snapshot{
		Generation: generation, Taken: now, Node: cfg.Node, TrustDomain: w.authority.trustDomain, Datacenter: cfg.Datacenter,
		Roots: slices.Clone(w.authority.roots), Leaves: maps.Clone(leaves),
		Services: b.services, Policy: w.policy, VirtualRanges: []netip.Prefix{cfg.VirtualRange}, Problems: b.problems,
		TLS: w.mesh.entries.tls, MeshOnly: w.mesh.entries.mesh != nil && w.mesh.entries.mesh.TransparentProxy.MeshDestinationsOnly,
	})
}

// add makes the catalog's instance of one definition.
func (b *builder) add(inst *instance) {
	svc := b.service(inst.service)
	local := inst.node == b.cfg.Node
	_, served := b.state.Nodes[inst.node] // a daemon has been there
	out := &catalog.Instance{
		ID: inst.id, Service: inst.service, Node: inst.node, Local: local, Healthy: !local || b.healthy(inst),
		Delivery: inst.delivery, DeliverySocket: inst.socket, Native: inst.native, Tunnels: served && !local && !inst.native,
		Permissive: b.mesh.entries.isPermissive(inst.service, b.cfg.Permissive),
		Tags:       slices.Clone(inst.tags), Meta: maps.Clone(inst.meta),
	}
	address := inst.address
	if !address.IsValid() {
		address = b.state.Nodes[inst.node]
	}
	if !address.IsValid() {
		b.waiting(inst, "the address of node %q is not known yet: start its daemon, or set address", inst.node)
	} else {
		b.place(inst, out, address)
	}
	svc.Instances = append(svc.Instances, out)
}

// place sets the addresses of out.
func (b *builder) place(inst *instance, out *catalog.Instance, address netip.Addr) {
	switch {
	case inst.native: // its port speaks TLS: never in plaintext, and so never the application's Address
		out.Mesh = netip.AddrPortFrom(address, inst.port)
	case inst.listens():
		if inst.port != 0 {
			out.Address = netip.AddrPortFrom(address, inst.port)
		}
		if inst.meshAddress.IsValid() {
			address = inst.meshAddress
		}
		port := inst.meshPort
		if port == 0 {
			port = b.state.Ports[inst.node][inst.id]
		}
		if port == 0 {
			b.waiting(inst, "node %q has not given it a mesh port yet: start its daemon", inst.node)
			break
		}
		out.Mesh = netip.AddrPortFrom(address, port)
	}
	for _, at := range []netip.AddrPort{out.Address, out.Mesh} {
		if at.IsValid() {
			b.occupy(inst, at)
		}
	}
}

func (b *builder) waiting(inst *instance, format string, args ...any) {
	b.problems = append(b.problems, catalog.Problem{Service: inst.service, Kind: "unreachable",
		Text: fmt.Sprintf("instance %q of %q cannot be dialled: %s (%s)", inst.id, inst.service, fmt.Sprintf(format, args...), inst.pos)})
}

func (b *builder) occupy(inst *instance, at netip.AddrPort) {
	if first := b.places[at]; first != nil {
		b.errs = append(b.errs, inst.pos.Errorf("service %q is at %s, as is service %q at %s: give one of them another address or port",
			inst.service, at, first.service, first.pos))
		return
	}
	b.places[at] = inst
	if b.cfg.VirtualRange.Contains(at.Addr()) {
		b.errs = append(b.errs, inst.pos.Errorf("service %q is at %s, inside virtual_ips %s: give it another address, or the mesh another range",
			inst.service, at, b.cfg.VirtualRange))
	}
}

func (b *builder) service(name string) *catalog.Service {
	if svc := b.services[name]; svc != nil {
		return svc
	}
	e := &b.mesh.entries
	svc := &catalog.Service{Name: name, Protocol: e.protocol(name), IgnoredL7: slices.Clone(e.ignoredL7[name])}
	if ip, ok := b.state.Virtual[name]; ok {
		svc.Virtual = []netip.Addr{ip}
	}
	if d := e.defaults[name]; d != nil {
		svc.MaxInbound = d.MaxInboundConnections
	}
	if res := e.resolvers[name]; res != nil {
		svc.ConnectTimeout = res.ConnectTimeout
		svc.Subsets = slices.Sorted(maps.Keys(res.Subsets))
	}
	b.services[name] = svc
	return svc
}

// addChains gives the services that have a service-resolver their chain.
func (b *builder) addChains() {
	for name, chain := range b.mesh.entries.chains {
		route := &catalog.Route{Balance: chain.Balance}
		for _, t := range chain.Targets {
			target := &catalog.Target{Service: t.Service, Subset: t.Subset}
			if svc := b.services[t.Service]; svc != nil {
				target.Instances = b.matching(t.Filter, svc.Instances)
			}
			if res := b.mesh.entries.resolvers[t.Service]; res != nil {
				target.ConnectTimeout = res.ConnectTimeout
			}
			route.Targets = append(route.Targets, target)
		}
		b.service(name).Chain = route
	}
}

// matching are the instances of a subset. Its filter was checked when it was read.
func (b *builder) matching(filter string, instances []*catalog.Instance) []*catalog.Instance {
	f, err := resolver.ParseFilter(filter)
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(instances), func(inst *catalog.Instance) bool { return !f.Matches(inst, b.cfg.Datacenter) })
}

// compile makes the policy of m.
func compile(cfg *Config, m *mesh, trustDomain string, generation uint64) (*policy.Policy, error) {
	httpLike := make(map[string]bool)
	for _, inst := range m.instances {
		if isHTTP(m.entries.protocol(inst.service)) {
			httpLike[inst.service] = true
		}
	}
	def := policy.Deny
	if cfg.DefaultAllow {
		def = policy.Allow
	}
	return policy.Compile(generation, def, policy.Identity{TrustDomain: trustDomain}, httpLike, m.entries.intentions)
}

// demandOf is what this node wants state.json to hold for m.
func demandOf(cfg *Config, m *mesh) demand {
	d := demand{node: cfg.Node, address: cfg.NodeAddress, taken: make(map[uint16]bool), virtual: cfg.VirtualRange, ports: cfg.Ports}
	services := make(map[string]bool)
	for _, inst := range m.instances {
		services[inst.service] = true
		if inst.node != cfg.Node {
			continue
		}
		d.taken[inst.port], d.taken[inst.meshPort] = true, true
		if inst.listens() && !inst.native && inst.meshPort == 0 {
			d.mesh = append(d.mesh, inst.id)
		}
	}
	for name := range m.entries.chains {
		services[name] = true
	}
	d.services = slices.Collect(maps.Keys(services))
	return d
}

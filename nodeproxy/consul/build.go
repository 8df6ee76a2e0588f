package consul

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// maxProblems bounds what a snapshot says is wrong: a datacenter has more config entries than a person reads.
const maxProblems = 500

// builder makes one snapshot.
type builder struct {
	cfg    *Config
	data   *data
	certs  map[string]*tls.Certificate
	needed []string          // services that workloads of this node run as
	given  map[string]uint16 // mesh ports of instances that have no sidecar of the operator's, by ID
	last   *policy.Policy    // nil: none
	*settings
	services  map[string]*catalog.Service
	upstreams map[string][]*catalog.Upstream // by the ID of an instance of this node
	contested []netip.AddrPort
	labelled  []catalog.Registered
	peers     []catalog.Peer
	agentless map[*catalog.Instance]bool // unhealthy because of their agents
	ending    map[*catalog.Instance]bool // unhealthy because their workloads are being stopped

	destinations []string // of which intentions count, sorted
	httpLike     map[string]bool
	reported     []rule // of those intentions
}

func (r *run) builder(d *data, needed []string, given map[string]uint16) *builder {
	return &builder{
		cfg: &r.cfg, data: d, certs: r.leaves.certificates(needed), needed: needed, given: given, last: r.lastPolicy(),
		settings: d.entries.settings(), services: make(map[string]*catalog.Service), upstreams: make(map[string][]*catalog.Upstream),
	}
}

func (r *run) lastPolicy() *policy.Policy {
	if r.snap == nil {
		return nil
	}
	return r.snap.Policy
}

func (b *builder) build(generation uint64, now time.Time) (*catalog.Snapshot, error) {
	b.agentless, b.ending = make(map[*catalog.Instance]bool), make(map[*catalog.Instance]bool)
	b.addPeers()
	b.addLocal()
	for _, name := range slices.Sorted(maps.Keys(b.data.services)) {
		for _, e := range b.data.services[name].instances {
			if e.node != b.data.agent.node || e.gateway { // the agent itself knows those of its node better
				b.addRemote(name, e)
			}
		}
	}
	b.callLast()
	b.agentless, b.ending = nil, nil
	b.refuseContested()
	b.addChains()
	b.markProbed()
	b.giveVirtual()
	b.giveTagged()
	b.addUpstreams()
	for _, name := range b.needed {
		if b.services[name] == nil {
			b.problem(name, "unknown-service", "a workload of this node runs as %q, which is not registered %s: it can call others, and nobody can call it; register it", name, b.cfg.registrar())
		}
	}
	p, err := b.policy(generation)
	if err != nil {
		return nil, err
	}
	b.reportDefinitions()
	if b.data.filtered {
		b.problem("", "unsupported", "the token may not see every service, so those it does not see cannot be called: see docs/consul.md")
	}
	return catalog.New(catalog.Snapshot{
		Generation: generation, Taken: now, Node: b.cfg.Node,
		TrustDomain: b.data.roots.trustDomain, Datacenter: b.data.agent.datacenter,
		Roots: slices.Clone(b.data.roots.all), Leaves: b.certs, Services: b.services, Policy: p,
		VirtualRanges: b.virtualRanges(), Calls: b.calls(), Upstreams: b.upstreams, TLS: b.tls(), Gateways: b.gateways(), Peers: b.peers,
		Contested: b.contested, Labelled: b.labelled, MeshOnly: b.mesh.TransparentProxy.MeshDestinationsOnly, Outside: b.data.agent.dns,
		Problems: b.sortedProblems(),
		Agents:   b.data.agents(), ACLs: b.data.agent.acls,
	})
}

func (b *builder) sortedProblems() []catalog.Problem {
	all := b.problems
	slices.SortFunc(all, func(x, y catalog.Problem) int {
		return cmp.Or(cmp.Compare(x.Service, y.Service), cmp.Compare(x.Kind, y.Kind), cmp.Compare(x.Text, y.Text))
	})
	all = slices.Compact(all)
	if more := len(all) - maxProblems; more > 0 {
		all = append(all[:maxProblems:maxProblems], catalog.Problem{Kind: "unsupported", Text: fmt.Sprintf("%d more are not listed", more)})
	}
	return all
}

func (b *builder) service(name string) *catalog.Service {
	if svc := b.services[name]; svc != nil {
		return svc
	}
	svc := &catalog.Service{Name: name, Protocol: b.protocol(name), IgnoredL7: slices.Clone(b.ignoredL7[name])}
	if d := b.defaults[name]; d != nil {
		svc.MaxInbound = max(d.MaxInboundConnections, 0)
	}
	if res := b.resolvers[name]; res != nil {
		svc.ConnectTimeout = max(res.ConnectTimeout, 0)
		svc.Subsets = slices.Sorted(maps.Keys(res.Subsets))
	}
	b.services[name] = svc
	return svc
}

// addRemote adds an instance of another node. Its application's own address is the mesh's only where a nodeproxy serves
// it: elsewhere whoever dials it means just that.
func (b *builder) addRemote(name string, e endpoint) {
	inst := &catalog.Instance{
		ID: e.id, Service: name, Node: e.node, Healthy: e.healthy, Native: e.native, Gateway: e.gateway,
		Permissive: b.permissive(name, b.cfg.Permissive), Tags: e.tags, Meta: e.meta,
	}
	b.agentless[inst], b.ending[inst] = e.agentless, e.ending
	inst.Mesh = b.place(inst, e.mesh, e.nodeAddress)
	isServed := slices.ContainsFunc(b.data.proxies[e.node], func(p Ports) bool { return p.contains(inst.Mesh.Port()) })
	inst.Tunnels = isServed && !inst.Native && !inst.Gateway
	if e.app.port != 0 && isServed {
		inst.Address = b.place(inst, e.app, e.nodeAddress)
	}
	svc := b.service(name)
	svc.Instances = append(svc.Instances, inst)
}

// addLocal adds the instances that are registered with this node's agent.
func (b *builder) addLocal() {
	served := make(map[string]bool) // instances that have a proxy
	for _, id := range slices.Sorted(maps.Keys(b.data.local)) {
		s := b.data.local[id]
		switch {
		case !isDefault(s.Namespace) || !isDefault(s.Partition):
			b.problem(s.Service, "unsupported", "%q is registered in namespace %q and partition %q: only \"default\" is supported", id, s.Namespace, s.Partition)
		case s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && !isOurs(s):
			b.adopt(s, served)
		case s.Kind == api.ServiceKindTypical && s.Connect != nil && s.Connect.Native:
			b.addNative(s)
			served[id] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(b.data.local)) {
		s := b.data.local[id]
		if s.Kind != api.ServiceKindTypical {
			continue
		}
		if !served[id] && slices.Contains(b.needed, s.Service) {
			b.addUnserved(s)
		}
		if s.Meta[catalog.MetaMesh] != "" && s.Service != proxyService && isDefault(s.Namespace) && isDefault(s.Partition) {
			b.labelled = append(b.labelled, catalog.Registered{ID: id, Service: s.Service, Address: b.applicationPlace(b.localInstance(s, s.Service), s), Meta: s.Meta})
		}
	}
}

func isDefault(name string) bool { return name == "" || name == "default" }

// adopt adds the instance behind a registered sidecar.
func (b *builder) adopt(s *api.AgentService, served map[string]bool) {
	name := s.Proxy.DestinationServiceName
	app := b.data.application(s)
	inst := b.localInstance(s, name)
	if app != nil {
		inst.Tags, inst.Meta = app.Tags, app.Meta
		if !served[app.ID] { // of two sidecars of one instance, the second keeps its own name
			inst.ID = app.ID
			inst.Address = b.applicationPlace(inst, app)
		}
		served[app.ID] = true
	}
	inst.Mesh = b.place(inst, place{s.Address, s.Port}, b.data.agent.address)
	switch {
	case s.Proxy.LocalServiceSocketPath != "":
		inst.DeliverySocket = s.Proxy.LocalServiceSocketPath
	case s.Proxy.LocalServicePort != 0:
		at := cmp.Or(s.Proxy.LocalServiceAddress, "127.0.0.1") // Consul's default
		ip, err := netip.ParseAddr(at)
		if err != nil || ip.Zone() != "" {
			b.problem(name, "refused", "sidecar %q has local_service_address %q: it must be an IP address of the workload", s.ID, at)
			inst.Mesh = netip.AddrPort{}
			break
		}
		inst.Delivery = netip.AddrPortFrom(ip.Unmap(), uint16(s.Proxy.LocalServicePort))
	}
	svc := b.service(name)
	svc.Instances = append(svc.Instances, inst)
}

func (b *builder) addNative(s *api.AgentService) {
	inst := b.localInstance(s, s.Service)
	inst.Native = true
	inst.Mesh = b.place(inst, place{s.Address, s.Port}, b.data.agent.address)
	svc := b.service(s.Service)
	svc.Instances = append(svc.Instances, inst)
}

// addUnserved adds an instance that has no sidecar of the operator's: one of ours is registered, if it has a port for it.
// It is delivered to wherever the workload listens.
func (b *builder) addUnserved(s *api.AgentService) {
	inst := b.localInstance(s, s.Service)
	inst.Address = b.applicationPlace(inst, s)
	inst.DeliverySocket = s.SocketPath
	if def := b.data.definition(s.ID); def != nil {
		inst.Delivery = def.Delivery
	}
	svc := b.service(s.Service)
	svc.Instances = append(svc.Instances, inst)
	port, other := b.given[s.ID], b.data.namesake(s)
	switch {
	case other != nil:
		b.problem(s.Service, "unreachable", "instance %q of %q has no sidecar and gets none: %q, as it would be called, is the ID of an instance of %q already; rename one of the two", s.ID, s.Service, other.ID, other.Service)
	case port != 0:
		inst.Mesh = b.place(inst, place{s.Address, int(port)}, b.data.agent.address)
	case s.Port != 0 || s.SocketPath != "":
		b.problem(s.Service, "unreachable", "instance %q of %q has no sidecar, and no mesh port is left for it: add connect { sidecar_service {} } to its definition, or widen inbound.ports", s.ID, s.Service)
	}
}

func (b *builder) localInstance(s *api.AgentService, name string) *catalog.Instance {
	inst := &catalog.Instance{
		ID: s.ID, Service: name, Node: b.data.agent.node, Local: true, Healthy: true,
		Permissive: b.permissive(name, b.cfg.Permissive), Tags: s.Tags, Meta: s.Meta,
	}
	if def := b.data.definition(s.ID); def != nil {
		inst.Healthy, b.ending[inst] = def.Healthy(), b.data.ends(def.ID, def.ID+sidecarSuffix)
	} else if known := b.data.services[name]; known != nil {
		for _, e := range known.instances {
			if e.node == inst.Node && (e.proxyID == s.ID || e.proxyID == s.ID+sidecarSuffix) {
				inst.Healthy, b.ending[inst] = e.healthy, e.ending
			}
		}
	}
	return inst
}

func (b *builder) applicationPlace(inst *catalog.Instance, app *api.AgentService) netip.AddrPort {
	if app.Port == 0 {
		return netip.AddrPort{}
	}
	return b.place(inst, place{app.Address, app.Port}, b.data.agent.address)
}

// place is where inst is reached. What could not be one host's address is refused: it would lead to somebody else.
func (b *builder) place(inst *catalog.Instance, at place, nodeAddress string) netip.AddrPort {
	refuse := func(why string) netip.AddrPort {
		b.problem(inst.Service, "refused", "instance %q of %q on node %q is registered at %q port %d, which is refused: %s",
			inst.ID, inst.Service, inst.Node, cmp.Or(at.host, nodeAddress), at.port, why)
		return netip.AddrPort{}
	}
	ip, err := netip.ParseAddr(cmp.Or(at.host, nodeAddress))
	if err != nil {
		return refuse("it is not an IP address, and names are not looked up")
	}
	ip = ip.Unmap()
	if inst.Local && (ip.IsLoopback() || ip.IsUnspecified()) {
		ip = b.cfg.NodeAddress
	}
	switch {
	case ip.IsUnspecified(), ip.IsMulticast(), ip.IsLinkLocalUnicast(), ip.Zone() != "", ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return refuse("it is not the address of one host")
	case ip.IsLoopback():
		return refuse("it is a loopback address, which on this node is this node")
	case at.port < 1 || at.port > 65535:
		return refuse("it is not a port")
	case b.isVirtual(ip), b.inCIDRs(ip):
		return refuse("it is in virtual_ips or virtual_cidrs, where services are and not instances")
	}
	return netip.AddrPortFrom(ip, uint16(at.port))
}

func (b *builder) virtualRanges() []netip.Prefix {
	if len(b.data.agent.virtual) > 0 {
		return b.data.agent.virtual
	}
	return b.cfg.VirtualRanges
}

func (b *builder) isVirtual(ip netip.Addr) bool {
	return slices.ContainsFunc(b.virtualRanges(), func(p netip.Prefix) bool { return p.Contains(ip) })
}

// claim is an instance's address, in its place.
type claim struct {
	inst *catalog.Instance
	at   *netip.AddrPort
}

// refuseContested takes an address that several instances claim from all of them, so that nobody's traffic can be drawn
// elsewhere by registering at its address.
func (b *builder) refuseContested() {
	first, claims := make(map[netip.AddrPort]claim, 2*len(b.services)), make(map[netip.AddrPort][]claim)
	for _, name := range slices.Sorted(maps.Keys(b.services)) {
		for _, inst := range b.services[name].Instances {
			for _, at := range []*netip.AddrPort{&inst.Address, &inst.Mesh} {
				if !at.IsValid() {
					continue
				}
				one, taken := first[*at]
				switch {
				case !taken:
					first[*at] = claim{inst, at}
				case claims[*at] == nil:
					claims[*at] = []claim{one, {inst, at}}
				default:
					claims[*at] = append(claims[*at], claim{inst, at})
				}
			}
		}
	}
	for at, all := range claims {
		if isOneGateway(all) {
			continue
		}
		keep := keeper(all)
		for i, c := range all {
			if i == keep {
				continue
			}
			other := all[0].inst
			if i == 0 {
				other = all[1].inst
			}
			*c.at = netip.AddrPort{}
			b.problem(c.inst.Service, "refused", "instance %q of %q on node %q is registered at %s, which instance %q of %q on node %q claims too: give one of them another address or port",
				c.inst.ID, c.inst.Service, c.inst.Node, at, other.ID, other.Service, other.Node)
		}
	}
}

// isOneGateway says whether all claims are those of one gateway, for the services that it stands for.
func isOneGateway(all []claim) bool {
	first := all[0].inst
	return !slices.ContainsFunc(all, func(c claim) bool { return !c.inst.Gateway || c.inst.Node != first.Node || c.inst.ID != first.ID })
}

// keeper says which of several claims to one address holds, or -1: the only one of this node, whose own agent knows best,
// or the first where all are of one service on one node, which is one instance registered twice.
func keeper(all []claim) int {
	local, locals, twins := -1, 0, true
	for i, c := range all {
		if c.inst.Local {
			local = i
			locals++
		}
		twins = twins && c.inst.Service == all[0].inst.Service && c.inst.Node == all[0].inst.Node
	}
	switch {
	case locals == 1:
		return local
	case locals == 0 && twins:
		return 0
	}
	return -1
}

package consul

import (
	"slices"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// route is where a chain leads.
func (b *builder) route(c *chain) *catalog.Route {
	r := &catalog.Route{Balance: c.balance}
	for _, t := range c.targets {
		known := b.data.targets[t.endpoints]
		switch {
		case t.unreachable != "":
			r.Targets = append(r.Targets, b.target(t.endpoints, nil))
			r.Targets[len(r.Targets)-1].Unreachable = t.unreachable
		case t.isPlain():
			r.Targets = append(r.Targets, b.target(t.endpoints, nil))
			if svc := b.services[t.service]; svc != nil {
				r.Targets[len(r.Targets)-1].Instances = svc.Instances
			}
		case known == nil || known.read.IsZero():
			r.Targets = append(r.Targets, b.target(t.endpoints, nil))
			r.Targets[len(r.Targets)-1].Unreachable = t.fault() + " could not be read yet"
		default:
			r.Targets = append(r.Targets, b.target(t.endpoints, known.instances))
		}
		b.setPeer(r.Targets[len(r.Targets)-1], t.endpoints)
		r.Targets[len(r.Targets)-1].Subset, r.Targets[len(r.Targets)-1].Gateway = t.subset, t.gateway
	}
	return r
}

// target is the instances found for a question, those of this datacenter as the service has them.
func (b *builder) target(of endpoints, found []endpoint) *catalog.Target {
	t := &catalog.Target{Service: of.service, Datacenter: of.datacenter}
	if res := b.resolvers[of.service]; res != nil && of.peer == "" {
		t.ConnectTimeout = max(res.ConnectTimeout, 0)
	}
	for _, e := range found {
		inst := b.find(of.service, e)
		if of.datacenter != "" || of.peer != "" {
			inst = b.abroad(of, e)
		}
		if inst != nil && inst.Healthy && !e.healthy && !e.ending {
			inst = new(*inst) // healthy enough for the service, not for this subset
			inst.Healthy = false
		}
		if inst != nil {
			t.Instances = append(t.Instances, inst)
		}
	}
	return t
}

// find is the instance of this datacenter that e is an entry of, or nil.
func (b *builder) find(name string, e endpoint) *catalog.Instance {
	svc := b.services[name]
	if svc == nil {
		return nil
	}
	ids := []string{e.id, e.proxyID}
	if known := b.data.services[name]; known != nil {
		for _, k := range known.instances {
			if k.node == e.node && k.proxyID == e.proxyID {
				ids = append(ids, k.id)
			}
		}
	}
	for _, inst := range svc.Instances {
		if inst.Node == e.node && slices.Contains(ids, inst.ID) {
			return inst
		}
	}
	return nil
}

// abroad is an instance of another datacenter.
func (b *builder) abroad(of endpoints, e endpoint) *catalog.Instance {
	inst := &catalog.Instance{
		ID: e.id, Service: of.service, Node: e.node, Datacenter: of.datacenter, Peer: of.peer, Healthy: e.healthy, Native: e.native, Gateway: e.gateway, Tags: e.tags, Meta: e.meta,
	}
	inst.Mesh = b.place(inst, e.mesh, e.nodeAddress)
	return inst
}

// addChains gives the services that have one their chain.
func (b *builder) addChains() {
	for _, entry := range b.data.entries.byKind[api.ServiceResolver] {
		name := entry.GetName()
		c := b.data.chains[chainKey{service: name}]
		if c == nil { // nothing is known of where its calls should go, so they go nowhere
			b.service(name).Chain = &catalog.Route{Targets: []*catalog.Target{{Service: name, Unreachable: chainKey{service: name}.fault() + " could not be read yet: see the source in nodeproxy status"}}}
			continue
		}
		b.service(name).Chain = b.route(c)
		for _, text := range c.ignored {
			b.problem(name, "unsupported", "service-resolver of %q: %s", name, text)
		}
		for _, t := range c.targets {
			if t.unreachable != "" {
				b.problem(name, "unsupported", "service-resolver of %q: %s", name, t.unreachable)
			}
		}
	}
}

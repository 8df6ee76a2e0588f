package nodeproxy

import (
	"fmt"
	"net/netip"
	"slices"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// Explain says what would become of a connection from source to destination now: which intention decides, and what is
// missing. destination is a service, or an address as an application would dial it. The error wraps admin.ErrNotFound
// when there is no such destination.
func (p *Proxy) Explain(source, destination string) (admin.Explanation, error) {
	now := p.gate.current()
	if now == nil {
		return admin.Explanation{}, notReady()
	}
	to, err := resolve(now.snap, source, destination)
	if err != nil {
		return admin.Explanation{}, err
	}
	route := now.snap.RouteOf(source, to)
	target := route.Preferred()
	why := now.snap.Policy.Explain(now.snap.Identity(source), target.Service)
	if p := target.Peered; p != nil {
		why = policy.Explanation{Verdict: policy.Verdict{Allowed: true, Generation: now.snap.Policy.Generation()}, Sentence: fmt.Sprintf("the intentions of peer %q decide, on its side", p.Peer)}
	}
	e := admin.Explanation{
		Source: source, Destination: to.Name(),
		Allowed: why.Allowed, Why: why.Sentence, Considered: []string{}, Generation: why.Generation,
		Path: p.pathTo(now.snap, target.Instances), Virtual: []string{}, Instances: p.instances(target.Instances),
		Missing: p.missing(now, source, to), Ignored: []string{}, Balance: string(route.Balance),
	}
	if i := slices.IndexFunc(target.Instances, func(inst *catalog.Instance) bool { return inst.Gateway && inst.Usable() }); i >= 0 {
		e.Gateway = target.Instances[i].ID
	}
	if to.Service != nil {
		e.Virtual, e.Ignored = texts(to.Service.Virtual), append(e.Ignored, to.Service.IgnoredL7...)
	}
	if len(route.Targets) > 1 || target.String() != to.Name() {
		e.Targets = p.targets(now.snap, route)
	}
	if why.Intention != nil {
		e.Intention = why.Intention.String()
	}
	for _, intention := range why.Considered {
		e.Considered = append(e.Considered, intention.String())
	}
	switch {
	case !e.Allowed:
		e.Path = admin.PathNone
	case to.Service != nil && slices.ContainsFunc(to.Service.Instances, func(inst *catalog.Instance) bool { return inst.Local && (to.Instance == nil || inst == to.Instance) }):
		if e.NotDirect = p.cfg.Kernel.Direct(source, to); e.NotDirect == "" {
			e.Path = admin.PathDirect
		}
	}
	return e, nil
}

// resolve finds what destination stands for where a workload of source dials it.
func resolve(snap *catalog.Snapshot, source, destination string) (catalog.Destination, error) {
	if svc := snap.Services[destination]; svc != nil {
		return catalog.Destination{Service: svc}, nil
	}
	at, err := netip.ParseAddrPort(destination)
	if err != nil {
		addr, addrErr := netip.ParseAddr(destination)
		if addrErr != nil {
			return catalog.Destination{}, admin.Classify(fmt.Errorf("explain the way to %q: the mesh has no such service: \"nodeproxy status\" lists them", destination), admin.ErrNotFound)
		}
		at = netip.AddrPortFrom(addr, 0)
	}
	var own []string
	for _, inst := range snap.LocalInstances() {
		if inst.Service == source {
			own = append(own, inst.ID)
		}
	}
	if to, ok := snap.Upstream(own, at); ok {
		return to, nil
	}
	if to, ok := snap.Resolve(at); ok {
		return to, nil
	}
	return catalog.Destination{}, admin.Classify(fmt.Errorf("explain the way to %s: it is neither a virtual IP, nor an upstream of %q, nor the address and port of an instance, so nodeproxy would not touch it", destination, source), admin.ErrNotFound)
}

func usable(inst *catalog.Instance) bool { return inst.Healthy && inst.Mesh.IsValid() }

// missing lists what would make an allowed connection fail now.
func (p *Proxy) missing(now *state, source string, to catalog.Destination) []string {
	missing := []string{}
	add := func(format string, args ...any) { missing = append(missing, fmt.Sprintf(format, args...)) }
	local := false
	for _, w := range p.cfg.Kernel.State().Workloads {
		if slices.Contains(w.Workload.Also, source) {
			add("workload %s is reached as %q and calls others as %q: explain the way from that", w.Workload.Cgroup, source, w.Workload.Service)
		}
		if w.Workload.Service != source {
			continue
		}
		local = true
		if w.State != "protected" {
			add("workload %s of %q is %s: %s", w.Workload.Cgroup, source, w.State, w.Detail)
		}
	}
	if !local {
		add("no workload of %q is enrolled on this node: enroll one, or ask on the node where it runs", source)
	} else if _, err := now.credentials.Leaf(source); err != nil {
		missing = append(missing, err.Error())
	}
	return append(append(missing, missingOf(to, now.snap.RouteOf(source, to))...), p.deaf(to)...)
}

// deaf lists the instances of this node that may be chosen and whose applications delivery would not reach.
func (p *Proxy) deaf(to catalog.Destination) []string {
	var missing []string
	for _, a := range p.cfg.Kernel.Applications() {
		if a.Err != nil && slices.ContainsFunc(to.Route().Preferred().Instances, func(inst *catalog.Instance) bool { return inst.Local && inst.ID == a.Instance }) {
			missing = append(missing, a.Err.Error())
		}
	}
	return missing
}

// missingOf lists what would make a connection to a destination fail, whoever makes it.
func missingOf(to catalog.Destination, route *catalog.Route) []string {
	var missing []string
	switch target := route.Preferred(); {
	case target.Usable():
	case len(route.Targets) > 1 || target.Unreachable != "" || target.Gateway.Through():
		missing = append(missing, whyUnusable(route)...)
	case len(target.Instances) == 0:
		missing = append(missing, fmt.Sprintf("%q has no instance: register one", target.Service))
	default:
		missing = append(missing, fmt.Sprintf("no instance of %q is healthy and speaks mTLS: see its checks, and whether it is enrolled on its node", target.Service))
	}
	if to.Instance == nil && to.Upstream == nil && len(to.Service.Virtual) == 0 && len(to.Service.Ports) == 0 {
		missing = append(missing, fmt.Sprintf("%q has no virtual IP: dial the address of an instance", to.Service.Name))
	}
	return missing
}

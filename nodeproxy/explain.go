package nodeproxy

import (
	"fmt"
	"net/netip"
	"slices"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

// Explain says what would become of a connection from source to destination now: which intention decides, and what is
// missing. destination is a service, or an address as an application would dial it. The error wraps admin.ErrNotFound
// when there is no such destination.
func (p *Proxy) Explain(source, destination string) (admin.Explanation, error) {
	now := p.gate.current()
	if now == nil {
		return admin.Explanation{}, notReady()
	}
	to, err := resolve(now.snap, destination)
	if err != nil {
		return admin.Explanation{}, err
	}
	why := now.snap.Policy.Explain(now.snap.Identity(source), to.Service.Name)
	e := admin.Explanation{
		Source: source, Destination: to.Service.Name,
		Allowed: why.Allowed, Why: why.Sentence, Considered: []string{}, Generation: why.Generation,
		Path: admin.PathMTLS, Virtual: texts(to.Service.Virtual), Instances: p.instances(to.Service.Instances),
		Missing: p.missing(now, source, to), Ignored: append([]string{}, to.Service.IgnoredL7...),
	}
	if to.Instance != nil {
		e.Instances = p.instances([]*catalog.Instance{to.Instance})
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
	case slices.ContainsFunc(to.Service.Instances, func(inst *catalog.Instance) bool { return inst.Local && (to.Instance == nil || inst == to.Instance) }):
		if e.NotDirect = p.cfg.Kernel.Direct(source, to); e.NotDirect == "" {
			e.Path = admin.PathDirect
		}
	}
	return e, nil
}

func resolve(snap *catalog.Snapshot, destination string) (catalog.Destination, error) {
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
	if to, ok := snap.Resolve(at); ok {
		return to, nil
	}
	return catalog.Destination{}, admin.Classify(fmt.Errorf("explain the way to %s: it is neither a virtual IP nor the address and port of an instance, so nodeproxy would not touch it", destination), admin.ErrNotFound)
}

// missing lists what would make an allowed connection fail now.
func (p *Proxy) missing(now *state, source string, to catalog.Destination) []string {
	missing := []string{}
	add := func(format string, args ...any) { missing = append(missing, fmt.Sprintf(format, args...)) }
	local := false
	for _, w := range p.cfg.Kernel.State().Workloads {
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
	candidates := to.Service.Instances
	if to.Instance != nil {
		candidates = []*catalog.Instance{to.Instance}
	}
	usable := func(inst *catalog.Instance) bool { return inst.Healthy && inst.Mesh.IsValid() }
	switch {
	case len(candidates) == 0:
		add("%q has no instance: register one", to.Service.Name)
	case !slices.ContainsFunc(candidates, usable):
		add("no instance of %q is healthy and speaks mTLS: see its checks, and whether it is enrolled on its node", to.Service.Name)
	}
	if len(to.Service.Virtual) == 0 && to.Instance == nil {
		add("%q has no virtual IP: dial the address of an instance", to.Service.Name)
	}
	return missing
}

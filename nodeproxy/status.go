package nodeproxy

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// Verdict implements workload.Handler: what the kernel decided is told like what was decided here.
func (p *Proxy) Verdict(v workload.KernelVerdict) {
	e := admin.Connection{
		Event: admin.EventOpen, Time: time.Now(), Direction: admin.Outbound,
		Source:      admin.Endpoint{PID: v.PID, Comm: v.Comm},
		Destination: admin.Endpoint{Address: v.Destination.String()},
		Path:        admin.PathPlaintext, Verdict: admin.Allowed, Reason: v.Reason, Detail: v.Reason.Sentence(),
	}
	if v.Source.Port() != 0 { // at the time of a connect the source is not known yet
		e.Source.Address = v.Source.String()
	}
	own := &e.Source
	if v.Inbound {
		e.Direction, own = admin.Inbound, &e.Destination
	}
	if v.Workload != nil {
		own.Service, own.Workload = v.Workload.Service, v.Workload.Cgroup
	}
	if now := p.gate.current(); now != nil && v.Inbound && v.Workload != nil {
		own.Service = serviceAt(now.snap, v.Workload, v.Destination.Port())
	} else if now != nil && !v.Inbound {
		if to, ok := now.snap.Resolve(v.Destination); ok {
			e.Destination.Service = to.Service.Name
		}
	}
	switch {
	case v.Observed:
		p.foresee(v, &e)
	case !v.Allowed:
		e.Event, e.Verdict = admin.EventDenied, admin.Denied
		if !v.Inbound && v.Reason != catalog.ReasonExisting { // which had a way until now
			e.Path = admin.PathNone
		}
		p.denied.Add(1)
	}
	p.cfg.Observer.Observe(e)
}

// serviceAt is which of w's services a port is of, its first one for ports of none.
func serviceAt(snap *catalog.Snapshot, w *workload.Workload, port uint16) string {
	for _, name := range w.Also {
		svc := snap.Services[name]
		if svc != nil && slices.ContainsFunc(svc.Instances, func(inst *catalog.Instance) bool {
			return inst.Local && (inst.Address.Port() == port || inst.Delivery.Port() == port)
		}) {
			return name
		}
	}
	return w.Service
}

// Connections lists the open connections as "open" events with the bytes so far, by ID.
func (p *Proxy) Connections() []admin.Connection {
	open := []admin.Connection{}
	for _, c := range slices.Concat(p.live.all(), p.direct.all()) {
		if line, ok := c.line(); ok {
			open = append(open, line)
		}
	}
	slices.SortFunc(open, func(a, b admin.Connection) int { return int(a.ID) - int(b.ID) })
	return open
}

// Applications is what GET /v1/applications shows.
func (p *Proxy) Applications() []admin.Application {
	list := []admin.Application{}
	for _, a := range p.cfg.Kernel.Applications() {
		s := admin.Application{Service: a.Service, Instance: a.Instance, Workload: a.Cgroup, Target: a.Target}
		if a.Err != nil {
			s.Error = a.Err.Error()
		}
		list = append(list, s)
	}
	return list
}

// Status is everything that GET /v1/status shows. Its lists are empty, never nil, and sorted.
func (p *Proxy) Status() admin.Status {
	kernel := p.cfg.Kernel.State()
	s := admin.Status{
		Version: p.cfg.Version, MapABI: p.cfg.MapABI, Node: p.cfg.Node, Started: p.started, PID: os.Getpid(),
		Source:    p.sourceStatus(),
		Workloads: []admin.Workload{}, Refused: []admin.Refused{}, Services: []admin.Service{},
		Kernel: admin.Kernel{Pins: kernel.Pins, Heartbeat: kernel.Heartbeat, Links: kernel.Links, Repairs: kernel.Repairs, Maps: []admin.KernelMap{}, Counters: kernel.Counters},
		Connections: admin.Connections{
			Active: p.live.len() + p.direct.len(), Max: p.cfg.Limits.Connections, Opened: p.opened.Load(), Denied: p.denied.Load(),
			SourceAddressRejected: p.tunnels.rejected.Load(),
		},
		SameNode: sameNode(kernel.Direct),
		Problems: []admin.Problem{}, Canaries: []string{}, Observed: p.observed.list(), Goroutines: runtime.NumGoroutine(), Stopping: p.stopping.Load(),
	}
	s.Connections.Tunnels.Outbound, s.Connections.Tunnels.Inbound = p.tunnels.idle()
	for _, w := range kernel.Workloads {
		s.Workloads = append(s.Workloads, workloadStatus(w))
	}
	for _, r := range kernel.Refused {
		s.Refused = append(s.Refused, admin.Refused{Cgroup: r.Claim.Cgroup, Name: r.Claim.Name, Service: r.Claim.Service, Also: r.Claim.Also, Provider: r.Claim.Provider, Why: r.Why})
	}
	for _, p := range kernel.Providers {
		s.Problems = append(s.Problems, admin.Problem{Kind: p.Provider, Text: fmt.Sprintf("workloads labelled there may not be seen: %v", p.Err)})
	}
	for _, m := range kernel.Maps {
		s.Kernel.Maps = append(s.Kernel.Maps, admin.KernelMap{Name: m.Name, Entries: m.Entries, Max: m.Max})
	}
	for _, problem := range kernel.Problems {
		s.Problems = append(s.Problems, admin.Problem(problem))
	}
	if q := kernel.Queries; q != nil {
		s.DNS = &admin.Queries{Answered: q.Answered, Forwarded: q.Forwarded, Failed: q.Failed}
	}
	now := p.gate.current()
	s.Certificates = p.certificates(now)
	if err := p.applyError(); err != nil {
		s.Problems = append(s.Problems, admin.Problem{Kind: "kernel", Text: fmt.Sprintf("the newest snapshot is not wholly applied to the kernel, which is tried again: %v", err)})
	}
	if now == nil {
		return s
	}
	s.Canaries = texts(now.snap.Canaries())
	s.Policy = p.policyStatus()
	for _, name := range slices.Sorted(maps.Keys(now.snap.Services)) {
		svc := now.snap.Services[name]
		line := admin.Service{Name: name, Virtual: texts(svc.Virtual), Instances: p.instances(svc.Instances)}
		for _, at := range svc.Ports {
			line.Ports = append(line.Ports, at.String())
		}
		if svc.Chain != nil {
			line.Balance, line.Targets = string(svc.Chain.Balance), p.targets(now.snap, now.snap.RouteOf("", catalog.Destination{Service: svc}))
		}
		s.Services = append(s.Services, line)
	}
	for _, problem := range now.snap.Problems {
		s.Problems = append(s.Problems, admin.Problem(problem))
	}
	return s
}

func sameNode(d workload.DirectState) admin.SameNode {
	s := admin.SameNode{Path: admin.PathDirect, NotDirect: d.Why, Grants: d.Grants, Active: d.Live, Settling: d.Settling}
	if d.Why != "" {
		s.Path = admin.PathMTLS
	}
	return s
}

func (p *Proxy) applyError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.applying
}

func (p *Proxy) policyStatus() admin.PolicyStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.revoked == nil {
		return admin.PolicyStatus{}
	}
	return admin.PolicyStatus{Generation: p.revoked.Generation(), Default: p.revoked.Default().String(), Intentions: p.revoked.Len()}
}

// SourceError is what Status shows of the source as its error.
func (p *Proxy) SourceError() string { return p.sourceStatus().Error }

func (p *Proxy) sourceStatus() admin.SourceStatus {
	health := p.cfg.Source.Health()
	s := admin.SourceStatus{Kind: health.Kind, Location: health.Location, Updated: health.Updated, Restored: health.Restored}
	if health.Err != nil {
		s.Error = health.Err.Error()
	}
	if now := p.gate.current(); now != nil {
		s.Generation = now.snap.Generation
	}
	return s
}

func workloadStatus(w workload.WorkloadState) admin.Workload {
	s := admin.Workload{
		ID: w.Workload.ID, Service: w.Workload.Service, Also: w.Workload.Also, Cgroup: w.Workload.Cgroup, Name: w.Workload.Name, Provider: w.Workload.Provider,
		Mesh: w.Workload.Mesh.String(), Mode: w.Workload.Mode.String(), State: w.State, Detail: w.Detail, Processes: w.Processes,
		Namespaces: []uint64{}, Instances: append([]string{}, w.Instances...), DNS: w.DNS, Foreign: w.Foreign,
	}
	for _, ns := range w.Namespaces {
		s.Namespaces = append(s.Namespaces, ns.Inode)
	}
	return s
}

// certificates lists the leaves of all services that have one or need one.
func (p *Proxy) certificates(now *state) []admin.Certificate {
	p.mu.Lock()
	services := slices.Clone(p.needed)
	p.mu.Unlock()
	if now != nil {
		services = slices.AppendSeq(services, maps.Keys(now.snap.Leaves))
	}
	slices.Sort(services)
	list := []admin.Certificate{}
	for _, service := range slices.Compact(services) {
		cert := admin.Certificate{Service: service}
		if now == nil {
			cert.Error = "the source has delivered no snapshot yet"
			list = append(list, cert)
			continue
		}
		cert.Identity = now.snap.Identity(service).String()
		if leaf := now.snap.Leaves[service]; leaf != nil && leaf.Leaf != nil {
			cert.Serial = fmt.Sprintf("%X", leaf.Leaf.SerialNumber)
			cert.NotBefore, cert.NotAfter = leaf.Leaf.NotBefore, leaf.Leaf.NotAfter
		}
		if _, err := now.credentials.Leaf(service); err != nil {
			cert.Error = err.Error()
		}
		list = append(list, cert)
	}
	return list
}

func (p *Proxy) instances(of []*catalog.Instance) []admin.Instance {
	list := []admin.Instance{}
	for _, inst := range of {
		s := admin.Instance{ID: inst.ID, Node: inst.Node, Local: inst.Local, Address: textOf(inst.Address), Mesh: textOf(inst.Mesh), Healthy: inst.Healthy, Gateway: inst.Gateway, Ejected: p.balancer.why(inst)}
		list = append(list, s)
	}
	return list
}

func (p *Proxy) targets(snap *catalog.Snapshot, route *catalog.Route) []admin.Target {
	var list []admin.Target
	inUse := route.Preferred()
	for _, t := range route.Targets {
		list = append(list, admin.Target{
			Name: t.String(), Identity: snap.TargetIdentity(t).String(), InUse: t == inUse && t.Usable(), Instances: p.instances(t.Instances), Why: t.Unreachable, Gateway: string(t.Gateway),
		})
	}
	return list
}

// textOf is "" for no address.
func textOf(at netip.AddrPort) string {
	if !at.IsValid() {
		return ""
	}
	return at.String()
}

func texts(addrs []netip.Addr) []string {
	list := []string{}
	for _, addr := range addrs {
		list = append(list, addr.String())
	}
	return list
}

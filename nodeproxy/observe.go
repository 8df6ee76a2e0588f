package nodeproxy

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// maxObservations bounds what is remembered of workloads that are only watched; beyond it new pairs are seen in trace alone.
const maxObservations = 4096

// observations counts what would have become of the connections of workloads that are only watched.
type observations struct {
	mu   sync.Mutex
	seen map[observation]*admin.Observation
}

type observation struct {
	source, destination string
	direction           admin.Direction
	reason              catalog.Reason
}

// foresee says, in e, what would become of a connection that the kernel only watched.
func (p *Proxy) foresee(v workload.KernelVerdict, e *admin.Connection) {
	e.Event, e.Path, e.Verdict = admin.EventObserved, admin.PathPlaintext, admin.Allowed
	defer func() { p.observed.add(e) }()
	if v.Reason != "" {
		e.Verdict = admin.Denied
		return
	}
	e.Detail = ""
	now := p.gate.current()
	if now == nil {
		return
	}
	to, ok := now.snap.Resolve(v.Destination)
	if !ok || v.Workload == nil {
		return
	}
	deny := func(r catalog.Reason) { e.Verdict, e.Reason, e.Detail = admin.Denied, r, r.Sentence() }
	decided := now.snap.Policy.Explain(now.snap.Identity(v.Workload.Service), to.Service.Name)
	if decided.Intention != nil {
		e.Intention = decided.Intention.String()
	}
	candidates := to.Service.Instances
	if to.Instance != nil {
		candidates = []*catalog.Instance{to.Instance}
	}
	switch {
	case !decided.Allowed:
		deny(catalog.ReasonIntention)
	case !slices.ContainsFunc(candidates, usable):
		deny(catalog.ReasonNoInstance)
	}
}

func (o *observations) add(e *admin.Connection) {
	key := observation{e.Source.Service, e.Destination.Service, e.Direction, e.Reason}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.seen == nil {
		o.seen = make(map[observation]*admin.Observation)
	}
	s := o.seen[key]
	if s == nil {
		if len(o.seen) >= maxObservations {
			return
		}
		s = &admin.Observation{Source: key.source, Destination: key.destination, Direction: key.direction, Reason: key.reason, Verdict: e.Verdict}
		o.seen[key] = s
	}
	s.Connections++
	s.Last, s.Example = time.Now(), e.Source.Address+" → "+e.Destination.Address
}

// list is sorted by pair.
func (o *observations) list() []admin.Observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := []admin.Observation{}
	for _, s := range o.seen {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b admin.Observation) int {
		return cmp.Or(cmp.Compare(a.Source, b.Source), cmp.Compare(a.Destination, b.Destination), cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}

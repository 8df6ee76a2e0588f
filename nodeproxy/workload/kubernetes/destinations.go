package kubernetes

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	// unknownFor is how long a ClusterIP stays a destination when an address behind it is not known in the mesh: the
	// EndpointSlice of a new pod may be there before its instance is.
	unknownFor = 10 * time.Second

	share = 20 // how many times longer than a look the time until the next is, at least: a cluster may have many Services

	maxListed = 50 // ClusterIPs that status explains
)

// Destinations is source with the ClusterIPs that stand for its services: on each declared port where every ready address
// behind it is an instance of one service. Others are left alone, and listed among the problems where it looks as if they were
// meant. What keeps snapshots keeps them too.
func (c *Cluster) Destinations(source catalog.Source) catalog.Source {
	d := &destinations{Source: source, cluster: c, changed: c.subscribe(), unknown: make(map[netip.AddrPort]time.Time)}
	if restorer, ok := source.(catalog.Restorer); ok {
		return &restorable{d, restorer}
	}
	return d
}

// destinations implements catalog.Source.
type destinations struct {
	catalog.Source
	cluster *Cluster
	changed <-chan struct{}

	mu       sync.Mutex // one delivery at a time
	deliver  func(*catalog.Snapshot)
	source   *catalog.Snapshot
	last     map[netip.AddrPort]string    // the services for which ClusterIPs stand
	unknown  map[netip.AddrPort]time.Time // since when an address behind one of last has been
	problems []catalog.Problem
	extra    uint64 // deliveries more than the source's
}

// restorable are destinations of a source that can begin with what an earlier daemon knew.
type restorable struct {
	*destinations
	restorer catalog.Restorer
}

// Restore implements catalog.Restorer.
func (r *restorable) Restore(snap *catalog.Snapshot, updated time.Time) error {
	err := r.restorer.Restore(snap, updated)
	if err == nil {
		r.last = maps.Clone(snap.ClusterIPs) // until the API server tells
	}
	return err
}

// Yield implements catalog.Yielder.
func (d *destinations) Yield() {
	if y, ok := d.Source.(catalog.Yielder); ok {
		y.Yield()
	}
}

// Run implements catalog.Source.
func (d *destinations) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	d.deliver = deliver
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	following.Go(func() { d.follow(ctx) })
	defer following.Wait()
	defer cancel()
	return d.Source.Run(ctx, func(snap *catalog.Snapshot) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.source = snap
		d.look(time.Now())
		d.tell()
	})
}

// follow delivers again when what stands behind ClusterIPs has changed.
func (d *destinations) follow(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.changed:
		case <-tick.C:
		}
		began := time.Now()
		d.mu.Lock()
		if d.source != nil && d.look(time.Now()) {
			d.extra++
			d.tell()
		}
		d.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(changesLast, share*time.Since(began))):
		}
	}
}

// look says whether what the ClusterIPs stand for is not what it was.
func (d *destinations) look(now time.Time) bool {
	if !d.cluster.hasSynced() {
		return false
	}
	d.cluster.mu.Lock()
	heard := d.cluster.unheard() == nil
	d.cluster.mu.Unlock()
	m := mapping{snap: d.source, last: d.last, unknown: d.unknown, heard: heard, now: now, next: make(map[netip.AddrPort]string)}
	m.behind = behindServices(list[discoveryv1.EndpointSlice](d.cluster.slices))
	services := list[corev1.Service](d.cluster.services)
	slices.SortFunc(services, func(a, b *corev1.Service) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	for _, svc := range services {
		_, meant := d.cluster.cfg.Namespaces[svc.Namespace]
		m.add(svc, meant)
	}
	maps.DeleteFunc(d.unknown, func(at netip.AddrPort, _ time.Time) bool { return m.next[at] == "" })
	if more := len(m.problems) - maxListed; more > 0 {
		m.problems = append(m.problems[:maxListed:maxListed], catalog.Problem{Kind: "cluster-ip", Text: fmt.Sprintf("%d more ClusterIPs are no destinations", more)})
	}
	same := maps.Equal(m.next, d.last) && slices.Equal(m.problems, d.problems)
	d.last, d.problems = m.next, m.problems
	return !same
}

// tell delivers the source's snapshot with what look found.
func (d *destinations) tell() {
	snap := d.source
	if d.extra > 0 || !maps.Equal(d.last, snap.ClusterIPs) || len(d.problems) > 0 {
		var err error
		if snap, err = withClusterIPs(snap, d.last, d.problems, d.extra); err != nil {
			d.cluster.cfg.Log.Error("ClusterIPs are no destinations", "error", err)
			snap = d.source
		}
	}
	d.deliver(snap)
}

func withClusterIPs(snap *catalog.Snapshot, clusterIPs map[netip.AddrPort]string, problems []catalog.Problem, extra uint64) (*catalog.Snapshot, error) {
	next := *snap
	next.Generation += extra
	next.ClusterIPs = maps.Clone(clusterIPs)
	next.Problems = slices.Concat(slices.DeleteFunc(slices.Clone(snap.Problems), func(p catalog.Problem) bool { return p.Kind == "cluster-ip" }), problems)
	next.Services = maps.Clone(snap.Services)
	ports := make(map[string][]netip.AddrPort)
	for at, name := range clusterIPs {
		ports[name] = append(ports[name], at)
	}
	for name, svc := range snap.Services {
		changed := *svc
		changed.Ports = slices.DeleteFunc(slices.Clone(svc.Ports), func(at netip.AddrPort) bool { return snap.ClusterIPs[at] != "" })
		for _, at := range ports[name] {
			if !slices.Contains(changed.Ports, at) {
				changed.Ports = append(changed.Ports, at)
			}
		}
		slices.SortFunc(changed.Ports, netip.AddrPort.Compare)
		next.Services[name] = &changed
	}
	return catalog.New(next)
}

// backend is a port of a Service, and where it leads.
type backend struct {
	namespace, service, port string
	ipv6                     bool
}

// endpoint is one address behind a backend.
type endpoint struct {
	at    netip.AddrPort
	ready bool
}

func behindServices(all []*discoveryv1.EndpointSlice) map[backend][]endpoint {
	behind := make(map[backend][]endpoint)
	for _, slice := range all {
		for _, port := range slice.Ports {
			if port.Port == nil || port.Protocol != nil && *port.Protocol != corev1.ProtocolTCP {
				continue
			}
			of := backend{slice.Namespace, slice.Labels[discoveryv1.LabelServiceName], "", slice.AddressType == discoveryv1.AddressTypeIPv6}
			if port.Name != nil {
				of.port = *port.Name
			}
			for _, e := range slice.Endpoints {
				for _, address := range e.Addresses {
					if ip, err := netip.ParseAddr(address); err == nil {
						behind[of] = append(behind[of], endpoint{netip.AddrPortFrom(ip, uint16(*port.Port)), e.Conditions.Ready == nil || *e.Conditions.Ready})
					}
				}
			}
		}
	}
	return behind
}

// mapping finds which service of snap each ClusterIP stands for.
type mapping struct {
	snap    *catalog.Snapshot
	behind  map[backend][]endpoint
	last    map[netip.AddrPort]string
	unknown map[netip.AddrPort]time.Time
	heard   bool // the API server answers
	now     time.Time

	next     map[netip.AddrPort]string
	problems []catalog.Problem
}

// add adds the ClusterIPs of svc. meant: it is in a namespace whose pods may be in the mesh.
func (m *mapping) add(svc *corev1.Service, meant bool) {
	for _, text := range svc.Spec.ClusterIPs {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			continue // "None"
		}
		for _, port := range svc.Spec.Ports {
			if port.Protocol != corev1.ProtocolTCP && port.Protocol != "" {
				continue
			}
			at := netip.AddrPortFrom(ip, uint16(port.Port))
			name, why, involved := m.stands(at, m.behind[backend{svc.Namespace, svc.Name, port.Name, ip.Is6()}])
			to, taken := m.snap.Resolve(at)
			switch taken = taken && m.snap.ClusterIPs[at] == ""; {
			case taken && (name == "" || name == to.Name()): // as the source says itself
			case taken:
				m.problems = append(m.problems, catalog.Problem{Kind: "cluster-ip", Text: fmt.Sprintf(
					"ClusterIP %s of Service %s/%s stands for %q, and is an address of %q, to which it leads", at, svc.Namespace, svc.Name, name, to.Name())})
			case name != "":
				m.next[at] = name
			case involved || meant:
				m.problems = append(m.problems, catalog.Problem{Kind: "cluster-ip", Text: fmt.Sprintf(
					"ClusterIP %s of Service %s/%s is no destination of the mesh, and is dialled as if there were none: %s", at, svc.Namespace, svc.Name, why)})
			}
		}
	}
}

// stands says for which service an address stands, or why for none, and whether any of the mesh is behind it.
func (m *mapping) stands(at netip.AddrPort, behind []endpoint) (name, why string, involved bool) {
	last := m.last[at]
	if ready := slices.DeleteFunc(slices.Clone(behind), func(e endpoint) bool { return !e.ready }); len(ready) > 0 {
		behind = ready
	}
	if len(behind) == 0 { // nobody would answer
		return m.existing(last), "no address is behind it", false
	}
	var unknown []netip.AddrPort
	for _, e := range behind {
		found := m.serviceAt(e.at)
		switch {
		case found == "":
			unknown = append(unknown, e.at)
		case name != "" && name != found:
			return "", fmt.Sprintf("instances of both %q and %q are behind it: give each a Service of its own", name, found), true
		default:
			name = found
		}
	}
	involved = name != ""
	if len(unknown) == 0 {
		delete(m.unknown, at)
		return name, "", true
	}
	if last != "" && (name == "" || name == last) && m.awaits(at) {
		return m.existing(last), "", involved
	}
	why = fmt.Sprintf("%s behind it is no instance of the mesh that a nodeproxy serves: enroll it, or see that its port is the instance's", unknown[0])
	return "", why, involved
}

// existing is name if it is a service of the mesh.
func (m *mapping) existing(name string) string {
	if m.snap.Services[name] == nil {
		return ""
	}
	return name
}

// awaits says whether an address behind at may only be new.
func (m *mapping) awaits(at netip.AddrPort) bool {
	if m.unknown[at].IsZero() {
		m.unknown[at] = m.now
	}
	return !m.heard || m.now.Sub(m.unknown[at]) < unknownFor
}

// serviceAt is the service of this cluster of which an instance is at the address, "" for none.
func (m *mapping) serviceAt(at netip.AddrPort) string {
	to, ok := m.snap.Resolve(at)
	if !ok || to.Instance == nil || to.Instance.Peer != "" || to.Instance.Datacenter != "" {
		return ""
	}
	return to.Service.Name
}

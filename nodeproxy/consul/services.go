package consul

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// service is what the catalog says of one service.
type service struct {
	instances []endpoint // that speak Connect mTLS; none: it is not in the mesh
	changed   time.Time  // when they last did
	read      time.Time
}

// ailing says whether s has an instance that is unhealthy or unheard, and it is time to see if that is still so: the longer it is, the less
// often. A new instance is unhealthy until its first check.
func (s *service) ailing() bool {
	wait := min(max(s.read.Sub(s.changed), time.Second/2), staleAtLast)
	return time.Since(s.read) > wait && slices.ContainsFunc(s.instances, func(e endpoint) bool { return !e.healthy || e.unheard })
}

// silentTooLong says whether s has an instance that must not count as healthy any more.
func (s *service) silentTooLong() bool {
	return slices.ContainsFunc(s.instances, func(e endpoint) bool {
		return e.unheard && e.healthy && time.Since(e.silent) >= maxSilence
	})
}

// endpoint is one place where Connect mTLS is spoken for a service.
type endpoint struct {
	node, nodeAddress string
	id                string // of the application's instance where one is named, else of the proxy
	proxyID           string
	mesh              place
	app               place // of the application; nothing for a native service
	native            bool
	gateway           bool // that stands for the service
	healthy           bool
	ending            bool      // critical, but only because its workload is being stopped
	agentless         bool      // critical, but only because its agent is not reachable
	unheard           bool      // its checks have not run since its agent started
	silent            time.Time // since when it is unheard
	peered            peerMeta
	virtual           netip.Addr
	tagged            place // "virtual": a Kubernetes ClusterIP, say
	tags              []string
	meta              map[string]string
}

// place is an address as registered. host may be "": then it is the node's.
type place struct {
	host string
	port int
}

const (
	// readers is how many services are read at once.
	readers = 6

	// A service that nobody here calls is read again when the catalog has changed, after staleAfter or after spacing for
	// each service there is, whichever is longer; and in any case after staleAtLast. One with an unhealthy instance is read
	// again earlier, see ailing.
	staleAfter  = 10 * time.Second
	spacing     = 50 * time.Millisecond
	staleAtLast = 5 * time.Minute

	// maxCalled is how many services and targets are watched because workloads call them, forgetAfter how long after the last call.
	maxCalled   = 64
	forgetAfter = 10 * time.Minute
)

// question asks also for what is unhealthy: an instance that vanished while it is would be called in plaintext
// meanwhile by whoever knows its address.
func (e endpoints) question() question {
	params := url.Values{}
	if e.datacenter != "" {
		params.Set("dc", e.datacenter)
	}
	if e.filter != "" {
		params.Set("filter", e.filter)
	}
	if e.peer != "" {
		params.Set("peer", e.peer)
	}
	if e.gateways {
		params.Set("filter", isMeshGateway)
		return question{path: "/v1/health/service/" + escape(e.service), params: params}
	}
	return question{path: "/v1/health/connect/" + escape(e.service), params: params}
}

// parseEndpoints reads the answer of of's question.
func parseEndpoints(a *answer, of endpoints) ([]endpoint, error) {
	var list []*api.ServiceEntry
	if err := decode(a, &list); err != nil {
		return nil, err
	}
	found := parseServiceEntries(list, of)
	return found, addPeerMeta(a, of, found)
}

func parseServiceEntries(list []*api.ServiceEntry, of endpoints) []endpoint {
	name := of.service
	found := make([]endpoint, 0, len(list))
	for _, entry := range list {
		if entry.Node == nil || entry.Service == nil {
			continue
		}
		s, status := entry.Service, entry.Checks.AggregatedStatus()
		e := endpoint{
			node: entry.Node.Node, nodeAddress: entry.Node.Address, id: s.ID, proxyID: s.ID, mesh: place{s.Address, s.Port},
			healthy: status == api.HealthPassing || status == api.HealthWarning && !of.onlyPassing,
			tags:    s.Tags, meta: s.Meta,
		}
		e.ending = onlyEnds(entry.Checks)
		e.unheard, e.agentless = blame(entry.Checks)
		if of.datacenter != "" || of.peer != "" {
			e.goAbroad(entry)
		}
		switch {
		case of.gateways:
			e.gateway = s.Kind == api.ServiceKindMeshGateway
		case s.Kind == api.ServiceKindTerminatingGateway:
			e.gateway = true
		case s.Connect != nil && s.Connect.Native && s.Service == name:
			e.native = true
		case s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && s.Proxy.DestinationServiceName == name:
			e.id, e.gateway = cmp.Or(s.Proxy.DestinationServiceID, s.ID), of.peer != "" // whose addresses are its gateways'
		default:
			continue // gateways and what is yet to be invented
		}
		tag := "consul-virtual"
		if e.gateway { // which has one for each service that it stands for
			tag += ":" + name
		}
		if v, err := netip.ParseAddr(s.TaggedAddresses[tag].Address); err == nil {
			e.virtual = v.Unmap()
		}
		if v, ok := s.TaggedAddresses["virtual"]; ok && !e.gateway {
			e.tagged = place{v.Address, v.Port}
		}
		found = append(found, e)
	}
	slices.SortFunc(found, func(a, b endpoint) int { return cmp.Or(cmp.Compare(a.node, b.node), cmp.Compare(a.proxyID, b.proxyID)) })
	return found
}

// goAbroad makes e's addresses those for other datacenters: the ones tagged "wan" where there are any (BestAddress in
// agent/structs of Consul).
func (e *endpoint) goAbroad(entry *api.ServiceEntry) {
	if wan := entry.Node.TaggedAddresses["wan"]; wan != "" {
		e.nodeAddress = wan
	}
	if wan, ok := entry.Service.TaggedAddresses["wan"]; ok {
		e.mesh = place{wan.Address, cmp.Or(wan.Port, e.mesh.port)}
	}
}

// applications fills in where the applications behind proxies are registered.
func (r *run) applications(ctx context.Context, name string, found []endpoint) error {
	if !slices.ContainsFunc(found, func(e endpoint) bool { return !e.native && !e.gateway }) {
		return nil
	}
	a, err := r.ask.request(ctx, question{path: "/v1/catalog/service/" + escape(name)})
	if err != nil {
		return err
	}
	var list []*api.CatalogService
	if err := decode(a, &list); err != nil {
		return err
	}
	apps := make(map[[2]string]place)
	onNode := make(map[string][]*api.CatalogService)
	for _, s := range list {
		apps[[2]string{s.Node, s.ServiceID}] = place{s.ServiceAddress, s.ServicePort}
		onNode[s.Node] = append(onNode[s.Node], s)
	}
	for i := range found {
		e := &found[i]
		if e.native || e.gateway {
			continue
		}
		app, known := apps[[2]string{e.node, e.id}]
		if all := onNode[e.node]; !known && e.id == e.proxyID && len(all) == 1 { // a proxy that names no instance
			e.id, app = all[0].ServiceID, place{all[0].ServiceAddress, all[0].ServicePort}
		}
		e.app = app
	}
	return nil
}

const aService = "service " // how the faults of questions about services begin

func serviceFault(name string) string { return fmt.Sprintf("%s%q", aService, name) }

// serviceTopic is the instances of one service, or of a part of them.
func (r *run) serviceTopic(ctx context.Context, of endpoints) topic {
	return topic{what: of.fault(), every: 100 * time.Millisecond, ask: of.question,
		apply: func(a *answer) error {
			found, err := parseEndpoints(a, of)
			if err == nil && of.isPlain() {
				err = r.applications(ctx, of.service, found)
			}
			if err != nil {
				return err
			}
			differs := false
			r.world.update(func(d *data) bool {
				first := d.endpoints(of) == nil
				r.keepLastWord(of.service, d.endpoints(of), found)
				changed := d.setEndpoints(of, found)
				differs = changed || first
				return changed
			})
			if differs {
				wake(r.known)
			}
			return nil
		}}
}

// endpoints is what was found last; nil when nothing was.
func (d *data) endpoints(of endpoints) *service {
	if of.isPlain() {
		return d.services[of.service]
	}
	return d.targets[of]
}

// setEndpoints notes what was found where that is still asked for, and says whether it makes a difference.
func (d *data) setEndpoints(of endpoints, found []endpoint) bool {
	_, wanted := slices.BinarySearch(d.names, of.service)
	old, now := d.endpoints(of), time.Now()
	if !of.isPlain() {
		wanted = old != nil || d.targetQuestions()[of]
	}
	if !wanted {
		return false
	}
	next := &service{instances: found, read: now, changed: now}
	same := old != nil && reflect.DeepEqual(old.instances, found)
	if same {
		next.instances, next.changed = old.instances, old.changed
	}
	if of.isPlain() {
		d.services[of.service] = next
	} else {
		d.targets = maps.Clone(d.targets)
		d.targets[of] = next
	}
	return !same
}

// readServices keeps the services that nobody here calls fairly fresh, until ctx ends.
func (r *run) readServices(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var changed time.Time // when the catalog last did
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.named:
			changed = time.Now()
		case <-tick.C:
		}
		if r.readAll(ctx, r.due(changed)) {
			failures = 0
			continue
		}
		failures++
		pause(ctx, backoff(failures))
	}
}

// due lists the services and targets that must be read now: first those that never were.
func (r *run) due(changed time.Time) []endpoints {
	d := r.world.current()
	watched, targets := r.watchedQuestions(), d.targetQuestions()
	r.world.forget(aService, func() map[string]bool {
		asked := make(map[string]bool)
		for _, name := range d.names {
			asked[serviceFault(name)] = true
		}
		for of := range targets {
			asked[of.fault()] = true
		}
		for of := range watched {
			asked[of.fault()] = true
		}
		return asked
	})
	soonest := max(staleAfter, time.Duration(len(d.names)+len(targets))*spacing)
	var never, again []endpoints
	look := func(of endpoints, s *service) {
		switch {
		case s == nil:
			never = append(never, of)
		case s.silentTooLong():
			again = append(again, of) // of which a watch hears nothing
		case (s.ailing() || time.Since(s.read) > staleAtLast || s.read.Before(changed) && time.Since(s.read) > soonest) && !watched[of]:
			again = append(again, of)
		}
	}
	for of := range targets {
		look(of, d.targets[of])
	}
	for _, name := range d.names {
		if of := (endpoints{service: name}); !targets[of] {
			look(of, d.services[name])
		}
	}
	for _, names := range [][]endpoints{never, again} { // so that a few that cannot be read do not keep the same others waiting
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	}
	return append(never, again[:min(len(again), int(time.Second/spacing))]...)
}

// readAll reads services, a few at once, and says whether all could be. It gives up after a few that could not.
func (r *run) readAll(ctx context.Context, names []endpoints) bool {
	var tasks sync.WaitGroup
	queue := make(chan endpoints)
	failed := make(chan struct{}, readers)
	for range min(readers, len(names)) {
		tasks.Go(func() {
			for of := range queue {
				if _, ok := r.ask.once(ctx, r.serviceTopic(ctx, of), [sha256.Size]byte{}); !ok {
					wake(failed)
				}
			}
		})
	}
	for _, name := range names {
		if ctx.Err() != nil || len(failed) == readers {
			break
		}
		queue <- name
	}
	close(queue)
	tasks.Wait()
	return len(failed) == 0
}

// called are the services that workloads of this node call. It is safe for concurrent use.
type called struct {
	more chan struct{}

	mu   sync.Mutex
	last map[string]time.Time
}

func newCalled() *called {
	return &called{more: make(chan struct{}, 1), last: make(map[string]time.Time)}
}

// add notes a call. Of more than maxCalled services, those of the first calls are watched.
func (c *called) add(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, known := c.last[name]
	if name == "" || !known && len(c.last) >= maxCalled {
		return
	}
	c.last[name] = time.Now()
	if !known {
		wake(c.more)
	}
}

// watched lists them, after forgetting those not called any more.
func (c *called) watched() map[string]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.last, func(_ string, at time.Time) bool { return time.Since(at) > forgetAfter })
	names := make(map[string]bool, len(c.last))
	for name := range c.last {
		names[name] = true
	}
	return names
}

// watchCalled watches what workloads call, until ctx ends.
func (r *run) watchCalled(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	stop := make(map[endpoints]context.CancelFunc)
	for {
		wanted := r.watchedQuestions()
		for of, cancel := range stop {
			if !wanted[of] {
				cancel()
				delete(stop, of)
			}
		}
		for of := range wanted {
			if stop[of] == nil {
				watching, cancel := context.WithCancel(ctx)
				stop[of] = cancel
				tasks.Go(func() { r.ask.watch(watching, r.serviceTopic(watching, of)) })
			}
		}
		select {
		case <-ctx.Done():
			for _, cancel := range stop {
				cancel()
			}
			return
		case <-r.called.more:
		case <-tick.C:
		}
	}
}

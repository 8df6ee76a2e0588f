package consul

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// endpoints names a question for instances. With a service alone it is all of them in this datacenter.
type endpoints struct {
	service     string
	datacenter  string // "" is this one
	filter      string // of a resolver's subset
	onlyPassing bool   // a warning counts as unhealthy
}

func (e endpoints) isPlain() bool { return e == endpoints{service: e.service} }

// fault names the question where it is not answered.
func (e endpoints) fault() string {
	text := serviceFault(e.service)
	if e.datacenter != "" {
		text += " in datacenter " + e.datacenter
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
		if f.Policy != nil && f.Policy.Mode != "" && f.Policy.Mode != "sequential" {
			c.ignored = append(c.ignored, fmt.Sprintf("failover policy %q is not honoured: the targets are used in order", f.Policy.Mode))
		}
	}
	for _, id := range ids {
		t, known := got.Chain.Targets[id]
		if !known {
			return nil, fmt.Errorf("read the answer: the chain has no target %q", id)
		}
		c.targets = append(c.targets, t.resolve(here))
	}
	c.setBalance(node.LoadBalancer)
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
		r.datacenter = t.Datacenter
	}
	switch mode := t.MeshGateway.Mode; {
	case t.Peer != "":
		r.unreachable = fmt.Sprintf("%q is a service of peer %q, and peers are not supported", t.Service, t.Peer)
	case !isDefault(t.Namespace) || !isDefault(t.Partition):
		r.unreachable = fmt.Sprintf("%q is in namespace %q and partition %q: those of Consul Enterprise are untested and refused", t.Service, t.Namespace, t.Partition)
	case r.datacenter != "" && mode != api.MeshGatewayModeDefault && mode != api.MeshGatewayModeNone:
		r.unreachable = fmt.Sprintf("%q in datacenter %q is to be reached through mesh gateways (mode %q), which is not supported: set MeshGateway.Mode to \"none\" where the datacenters reach each other", t.Service, r.datacenter, mode)
	}
	return r
}

var balances = map[string]catalog.Balance{
	"": catalog.LeastRequest, "least_request": catalog.LeastRequest, "round_robin": catalog.RoundRobin, "random": catalog.Random,
	"maglev": catalog.SourceHash, "ring_hash": catalog.SourceHash,
}

func (c *chain) setBalance(lb *api.LoadBalancer) {
	if lb == nil {
		return
	}
	ignore := func(format string, args ...any) { c.ignored = append(c.ignored, fmt.Sprintf(format, args...)) }
	var known bool
	if c.balance, known = balances[lb.Policy]; !known {
		ignore("LoadBalancer policy %q is not known: the less busy of two instances is used", lb.Policy)
	}
	if lb.LeastRequestConfig != nil && lb.LeastRequestConfig.ChoiceCount != 2 {
		ignore("LeastRequestConfig.ChoiceCount %d is not honoured: two instances are drawn", lb.LeastRequestConfig.ChoiceCount)
	}
	if lb.RingHashConfig != nil {
		ignore("RingHashConfig is not honoured: no ring is kept")
	}
	for _, p := range lb.HashPolicies {
		if !p.SourceIP {
			ignore("hash policy %q is ignored: it concerns HTTP, the source address is used", p.Field)
		}
	}
}

// queryKey names a prepared query, as executed in a datacenter; "" is this one.
type queryKey chainKey

func (k queryKey) fault() string { return fmt.Sprintf("prepared query %q", k.service) }

// executed is what a prepared query answered.
type executed struct {
	of        endpoints
	instances []endpoint
}

// maxQueries bounds how many prepared queries are executed again and again.
const maxQueries = 64

// resolverTopic is the service-resolver entries together with the chains that they make: both change in one step, so
// that no call goes where neither the old entries nor the new ones say.
func (r *run) resolverTopic(ctx context.Context) topic {
	t := r.entryTopic(api.ServiceResolver)
	t.every = time.Second
	t.apply = func(a *answer) error {
		found, err := parseEntries(a, api.ServiceResolver)
		if err != nil {
			return err
		}
		var keys []chainKey
		for _, entry := range found {
			keys = append(keys, chainKey{service: entry.GetName()})
		}
		chains, err := r.readChains(ctx, keys)
		r.world.update(func(d *data) bool {
			d.entries = d.entries.with(api.ServiceResolver, found)
			d.setChains(chains)
			return true
		})
		r.chainsChanged()
		return err // those that could not be read are read again, soon
	}
	return t
}

// setChains puts chains in the place of older ones, and forgets what is not wanted any more. It says whether that makes a
// difference.
func (d *data) setChains(chains map[chainKey]*chain) bool {
	wanted, next := wantedChains(d), maps.Clone(d.chains)
	maps.Copy(next, chains)
	maps.DeleteFunc(next, func(k chainKey, _ *chain) bool { return !slices.Contains(wanted, k) })
	changed := !maps.EqualFunc(next, d.chains, func(x, y *chain) bool {
		x, y = new(*x), new(*y)
		x.read, y.read = time.Time{}, time.Time{}
		return reflect.DeepEqual(x, y)
	})
	d.chains = next
	used := d.targetQuestions()
	targets := maps.Clone(d.targets)
	maps.DeleteFunc(targets, func(e endpoints, _ *service) bool { return !used[e] })
	d.targets = targets
	return changed
}

// wantedChains lists the chains that are not those of Consul's defaults, and those of upstreams in other datacenters.
func wantedChains(d *data) []chainKey {
	var keys []chainKey
	if d.entries != nil {
		for _, entry := range d.entries.byKind[api.ServiceResolver] {
			keys = append(keys, chainKey{service: entry.GetName()})
		}
	}
	for _, up := range d.declared() {
		if k := up.chain(d); up.DestinationType != api.UpstreamDestTypePreparedQuery && k.datacenter != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

// targetQuestions are the questions of all chains' targets that no service's own is the answer to.
func (d *data) targetQuestions() map[endpoints]bool {
	all := make(map[endpoints]bool)
	for _, c := range d.chains {
		for _, t := range c.targets {
			if !t.isPlain() && t.unreachable == "" {
				all[t.endpoints] = true
			}
		}
	}
	return all
}

// readChains reads chains, a few at once, and the instances of their targets where they are new. It returns those that
// could be read.
func (r *run) readChains(ctx context.Context, keys []chainKey) (map[chainKey]*chain, error) {
	var tasks sync.WaitGroup
	var mu sync.Mutex
	chains := make(map[chainKey]*chain)
	var errs []error
	queue := make(chan chainKey)
	for range min(readers, len(keys)) {
		tasks.Go(func() {
			for k := range queue {
				c, err := r.readChain(ctx, k)
				mu.Lock()
				if chains[k] = c; err != nil {
					delete(chains, k)
					errs = append(errs, fmt.Errorf("%s: %w", k.fault(), err))
				}
				mu.Unlock()
			}
		})
	}
	for _, k := range keys {
		queue <- k
	}
	close(queue)
	tasks.Wait()
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return chains, errors.Join(errs...)
}

func (r *run) readChain(ctx context.Context, k chainKey) (*chain, error) {
	q := question{method: http.MethodPost, path: "/v1/discovery-chain/" + escape(k.service), params: url.Values{}, body: map[string]string{"OverrideProtocol": "tcp"}}
	if k.datacenter != "" {
		q.params.Set("compile-dc", k.datacenter)
	}
	a, err := r.client.request(ctx, q)
	if err != nil {
		return nil, err
	}
	d := r.world.current()
	c, err := parseChain(a, d.agent.datacenter)
	if err != nil {
		return nil, err
	}
	c.read = time.Now()
	for _, t := range c.targets {
		if !t.isPlain() && t.unreachable == "" && d.targets[t.endpoints] == nil {
			r.readTarget(ctx, t.endpoints)
		}
	}
	return c, nil
}

// readTarget reads instances for the first time. That they cannot be read is a fault of its own, and no reason not to use
// the chain's other targets.
func (r *run) readTarget(ctx context.Context, e endpoints) {
	r.world.update(func(d *data) bool {
		d.targets = maps.Clone(d.targets)
		if d.targets[e] == nil {
			d.targets[e] = &service{}
		}
		return false
	})
	_, _ = r.ask.once(ctx, r.serviceTopic(ctx, e), [sha256.Size]byte{})
}

// refreshChains reads chains again that were read long ago: a virtual IP may have been assigned, or an entry of another
// kind written, of which the resolvers say nothing. Those never read go first.
func (r *run) refreshChains(ctx context.Context) bool {
	d := r.world.current()
	keys := wantedChains(&d)
	last := func(k chainKey) time.Time {
		if c := d.chains[k]; c != nil {
			return c.read
		}
		return time.Time{}
	}
	slices.SortFunc(keys, func(x, y chainKey) int { return last(x).Compare(last(y)) })
	keys = keys[:min(len(keys), int(look/spacing))]
	keys = slices.DeleteFunc(keys, func(k chainKey) bool { return time.Since(last(k)) < look/2 })
	asked := time.Now()
	chains, err := r.readChains(ctx, keys)
	changed := false
	r.world.update(func(d *data) bool {
		changed = d.setChains(chains)
		return changed
	})
	if changed {
		r.chainsChanged()
	}
	return r.world.note("discovery chains", asked, err) && r.executeQueries(ctx)
}

// chainsChanged tells those who ask about what the chains name.
func (r *run) chainsChanged() {
	wake(r.known)
	wake(r.called.more)
}

// executeQueries executes the prepared queries that are upstreams of this node's instances.
func (r *run) executeQueries(ctx context.Context) bool {
	d := r.world.current()
	results, ok := make(map[queryKey]*executed), true
	for _, up := range d.declared() {
		k := queryKey(up.chain(&d))
		if up.DestinationType != api.UpstreamDestTypePreparedQuery || results[k] != nil || len(results) == maxQueries {
			continue
		}
		asked := time.Now()
		got, err := r.executeQuery(ctx, k, d.agent.datacenter)
		if ok = r.world.note(k.fault(), asked, err) && ok; err != nil {
			got = d.queries[k] // the last answer stays in force
		}
		if got != nil {
			results[k] = got
		}
	}
	r.world.update(func(d *data) bool {
		if reflect.DeepEqual(d.queries, results) {
			return false
		}
		d.queries = results
		return true
	})
	wake(r.known)
	return ok
}

func (r *run) executeQuery(ctx context.Context, k queryKey, here string) (*executed, error) {
	params := url.Values{"connect": {"true"}}
	if k.datacenter != "" {
		params.Set("dc", k.datacenter)
	}
	a, err := r.client.request(ctx, question{path: "/v1/query/" + escape(k.service) + "/execute", params: params})
	if err != nil {
		return nil, err
	}
	var got api.PreparedQueryExecuteResponse
	if err := decode(a, &got); err != nil {
		return nil, err
	}
	res := &executed{of: endpoints{service: got.Service}}
	if got.Datacenter != here {
		res.of.datacenter = got.Datacenter
	}
	list := make([]*api.ServiceEntry, len(got.Nodes))
	for i := range got.Nodes {
		list[i] = &got.Nodes[i]
	}
	res.instances = parseServiceEntries(list, res.of)
	return res, nil
}

// note notes whether what was asked at that time was answered.
func (w *world) note(what string, asked time.Time, err error) bool {
	if err == nil {
		w.answered(what)
		return true
	}
	if !errors.Is(err, context.Canceled) {
		w.failed(what, asked, explain(err))
	}
	return false
}

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
		r.Targets[len(r.Targets)-1].Subset = t.subset
	}
	return r
}

// target is the instances found for a question, those of this datacenter as the service has them.
func (b *builder) target(of endpoints, found []endpoint) *catalog.Target {
	t := &catalog.Target{Service: of.service, Datacenter: of.datacenter}
	if res := b.resolvers[of.service]; res != nil {
		t.ConnectTimeout = max(res.ConnectTimeout, 0)
	}
	for _, e := range found {
		inst := b.find(of.service, e)
		if of.datacenter != "" {
			inst = b.abroad(of, e)
		}
		if inst != nil && inst.Healthy && !e.healthy {
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
		ID: e.id, Service: of.service, Node: e.node, Datacenter: of.datacenter, Healthy: e.healthy, Native: e.native, Tags: e.tags, Meta: e.meta,
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

// watchedQuestions are those about what workloads of this node call, at most maxCalled: of the services themselves, and of
// the targets of their chains.
func (r *run) watchedQuestions() map[endpoints]bool {
	d := r.world.current()
	all := make(map[endpoints]bool)
	add := func(e endpoints) {
		if len(all) < maxCalled {
			all[e] = true
		}
	}
	addChain := func(k chainKey) {
		if c := d.chains[k]; c != nil {
			for _, t := range c.targets {
				if t.unreachable == "" {
					add(t.endpoints)
				}
			}
		}
	}
	for _, up := range d.declared() {
		if up.DestinationType == api.UpstreamDestTypePreparedQuery {
			continue
		}
		k := up.chain(&d)
		if k.datacenter == "" {
			add(endpoints{service: k.service})
		}
		addChain(k)
	}
	for _, name := range slices.Sorted(maps.Keys(r.called.watched())) {
		add(endpoints{service: name})
		addChain(chainKey{service: name})
	}
	return all
}

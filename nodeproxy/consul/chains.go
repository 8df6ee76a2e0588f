package consul

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// queryKey names a prepared query, as executed in a datacenter; "" is this one.
type queryKey chainKey

const aQuery = "prepared query " // how the faults of prepared queries begin

func (k queryKey) fault() string { return fmt.Sprintf("%s%q", aQuery, k.service) }

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
			for _, e := range d.gatewaysTo(t.endpoints) {
				all[e] = true
			}
		}
	}
	for _, up := range d.declared() {
		if up.DestinationPeer != "" {
			all[endpoints{service: up.DestinationName, peer: up.DestinationPeer}] = true
		}
	}
	return all
}

// readChains reads chains, a few at once, and the instances of their targets where they are new. It returns those that
// could be read, and gives up after a few that could not.
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
	hopeless := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(errs) >= readers
	}
	for _, k := range keys {
		if ctx.Err() != nil || hopeless() {
			break
		}
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
	r.findGateways(ctx, c)
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
	err = errors.Join(err, r.readGateways(ctx), r.readPeers(ctx))
	changed := false
	r.world.update(func(d *data) bool {
		changed = d.setChains(chains)
		return changed
	})
	if changed {
		r.chainsChanged()
	}
	all := r.world.note("discovery chains", asked, err)
	return r.executeQueries(ctx) && all
}

// chainsChanged tells those who ask about what chains and upstreams name.
func (r *run) chainsChanged() {
	wake(r.known)
	wake(r.called.more)
}

// executeQueries executes the prepared queries that are upstreams of this node's instances.
func (r *run) executeQueries(ctx context.Context) bool {
	d := r.world.current()
	results, ok := make(map[queryKey]*executed), true
	failures, asked := 0, make(map[string]bool)
	for _, up := range d.declared() {
		k := queryKey(up.chain(&d))
		if up.DestinationType != api.UpstreamDestTypePreparedQuery || results[k] != nil || len(results) == maxQueries {
			continue
		}
		asked[k.fault()] = true
		got := d.queries[k] // stays in force if it is not answered now
		if failures < readers {
			at := time.Now()
			next, err := r.executeQuery(ctx, k, d.agent.datacenter)
			if !r.world.note(k.fault(), at, err) {
				ok = false
				failures++
			} else {
				got = next
			}
		}
		if got != nil {
			results[k] = got
		}
	}
	r.world.forget(aQuery, func() map[string]bool { return asked })
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

// watchedQuestions are those about what workloads of this node call, at most maxCalled: of the services themselves, and of
// the targets of their chains.
func (r *run) watchedQuestions() map[endpoints]bool {
	d := r.world.current()
	all := make(map[endpoints]bool)
	add := func(e endpoints) {
		if _, exists := slices.BinarySearch(d.names, e.service); len(all) < maxCalled && (exists || e.datacenter != "" || e.peer != "") {
			all[e] = true
		}
	}
	addChain := func(k chainKey) {
		if c := d.chains[k]; c != nil {
			for _, t := range c.targets {
				if t.unreachable == "" {
					add(t.endpoints)
				}
				for _, e := range d.gatewaysTo(t.endpoints) {
					add(e)
				}
			}
		}
	}
	for _, up := range d.declared() {
		if up.DestinationType == api.UpstreamDestTypePreparedQuery {
			continue
		}
		if up.DestinationPeer != "" {
			add(endpoints{service: up.DestinationName, peer: up.DestinationPeer})
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

package nodeproxy

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"

	"nodeproxy.io/nodeproxy/catalog"
)

// The back-off of an instance that could not be dialled, where the caller's own configuration says nothing: it doubles with
// every further failure.
const (
	minEjection = time.Second
	maxEjection = time.Minute
)

// maxConfiguredEjection bounds what a caller's own configuration makes of an instance that keeps failing, as in Envoy.
const maxConfiguredEjection = 5 * time.Minute

// place names an instance across snapshots. A gateway is one for each service that it stands for: it may fail for one of them.
type place struct{ datacenter, peer, node, id, service string }

func placeOf(inst *catalog.Instance) place {
	p := place{datacenter: inst.Datacenter, peer: inst.Peer, node: inst.Node, id: inst.ID}
	if inst.Gateway {
		p.service = inst.Service
	}
	return p
}

// ledger is where the failures of an instance are counted: those of all callers that configure nothing in one, those of
// each other caller in its own.
type ledger struct {
	caller string
	place
}

// ejection is why and for how long an instance is not the first choice.
type ejection struct {
	until    time.Time
	failures int // in a row, since the last ejection
	times    int
	err      error
}

// call is what matters of a connection when an instance is chosen.
type call struct {
	balance catalog.Balance
	source  netip.Addr

	caller   string // whose configuration ejects; "" where it says nothing
	ejection *catalog.Ejection
}

// balancer chooses among the instances of the first target that has any: by its policy. Instances that are about to end, and then
// those that failed and are ejected, are chosen only when nothing else is left in any target: neither makes a service unreachable.
type balancer struct {
	preferLocal bool
	now         func() time.Time
	ends        *endings

	mu      sync.Mutex
	active  map[place]int
	ejected map[ledger]ejection
	turns   map[string]uint64 // of round_robin, by target
}

func newBalancer(preferLocal bool, ends *endings) *balancer {
	return &balancer{preferLocal: preferLocal, now: time.Now, ends: ends, active: map[place]int{}, ejected: map[ledger]ejection{}, turns: map[string]uint64{}}
}

// pick chooses an instance that is not in tried, and counts a connection to it until done is called. It returns nil when
// none is left.
func (b *balancer) pick(targets []*catalog.Target, tried []*catalog.Instance, c call) (target *catalog.Target, inst *catalog.Instance, done func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var spareOf, endingOf *catalog.Target
	var spare *catalog.Instance
	var ends []*catalog.Instance
	for _, t := range targets {
		if t.Unreachable != "" {
			continue
		}
		usable, ending, ejected := b.sort(t.Instances, tried, c)
		if len(usable) > 0 {
			inst = b.choose(t, usable, c)
			return t, inst, b.use(placeOf(inst))
		}
		if endingOf == nil && len(ending) > 0 {
			endingOf, ends = t, ending
		}
		if spare == nil && len(ejected) > 0 {
			spareOf = t
			spare = slices.MinFunc(ejected, func(x, y *catalog.Instance) int { return b.until(x, c).Compare(b.until(y, c)) })
		}
	}
	if endingOf != nil {
		inst = b.choose(endingOf, ends, c)
		return endingOf, inst, b.use(placeOf(inst))
	}
	if spare == nil {
		return nil, nil, nil
	}
	return spareOf, spare, b.use(placeOf(spare))
}

// sort lists those that may be dialled, only those of this node where they go first, those that are about to end, and those that are
// ejected.
func (b *balancer) sort(instances, tried []*catalog.Instance, c call) (usable, ending, ejected []*catalog.Instance) {
	var local []*catalog.Instance
	for _, candidate := range instances {
		switch {
		case !candidate.Usable() || slices.Contains(tried, candidate):
		case b.now().Before(b.until(candidate, c)):
			ejected = append(ejected, candidate)
		case b.ends.has(candidate):
			ending = append(ending, candidate)
		case candidate.Local:
			local = append(local, candidate)
			usable = append(usable, candidate)
		default:
			usable = append(usable, candidate)
		}
	}
	if b.preferLocal && len(local) > 0 {
		usable = local
	}
	return usable, ending, ejected
}

func (b *balancer) until(inst *catalog.Instance, c call) time.Time {
	return b.ejected[ledger{c.caller, placeOf(inst)}].until
}

// choose applies c's policy. usable is not empty.
func (b *balancer) choose(t *catalog.Target, usable []*catalog.Instance, c call) *catalog.Instance {
	switch c.balance {
	case catalog.RoundRobin:
		name := t.String()
		turn := b.turns[name]
		b.turns[name]++
		return usable[turn%uint64(len(usable))]
	case catalog.Random:
		return usable[rand.IntN(len(usable))]
	case catalog.SourceHash:
		return rendezvous(usable, c.source)
	}
	return b.lessBusy(usable)
}

// rendezvous chooses the instance whose hash with source is the highest: an instance that comes or goes moves only the
// sources that it gets or had (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998). It is the
// same on every node.
func rendezvous(usable []*catalog.Instance, source netip.Addr) *catalog.Instance {
	from := source.Unmap().As16()
	weight := func(inst *catalog.Instance) uint64 {
		h := xxhash.New()
		_, _ = h.Write(from[:])
		_, _ = h.WriteString(inst.Datacenter + inst.Peer + "\x00" + inst.Node + "\x00" + inst.ID)
		return h.Sum64()
	}
	best, highest := usable[0], weight(usable[0])
	for _, inst := range usable[1:] {
		if w := weight(inst); w > highest {
			best, highest = inst, w
		}
	}
	return best
}

// only is pick for one instance that was asked for by its own address.
func (b *balancer) only(inst *catalog.Instance) (done func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.use(placeOf(inst))
}

func (b *balancer) lessBusy(usable []*catalog.Instance) *catalog.Instance {
	i := rand.IntN(len(usable))
	if len(usable) == 1 {
		return usable[i]
	}
	j := rand.IntN(len(usable) - 1)
	if j >= i {
		j++
	}
	if b.active[placeOf(usable[j])] < b.active[placeOf(usable[i])] {
		return usable[j]
	}
	return usable[i]
}

func (b *balancer) use(at place) (done func()) {
	b.active[at]++
	return sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.active[at]--; b.active[at] == 0 {
			delete(b.active, at)
		}
	})
}

// failed notes that inst, one of instances, failed, and ejects it if that is enough. Failures while it is ejected already
// are those of connections that were under way: they do not prolong the ejection. It returns for how long inst was ejected
// now, 0 when it was not.
func (b *balancer) failed(inst *catalog.Instance, instances []*catalog.Instance, c call, err error) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, now := ledger{c.caller, placeOf(inst)}, b.now()
	e := b.ejected[at]
	if now.Before(e.until) {
		return 0
	}
	e.failures++
	e.err = err
	backoff := min(minEjection<<min(e.times, 10), maxEjection)
	if c.ejection != nil {
		backoff = b.configured(e, instances, c)
	}
	if backoff > 0 {
		e.until, e.failures = now.Add(backoff), 0
		e.times++
	}
	b.ejected[at] = e
	return backoff
}

// configured is for how long c's own configuration ejects an instance now, 0 for not at all.
func (b *balancer) configured(e ejection, instances []*catalog.Instance, c call) time.Duration {
	ejected := 0
	for _, other := range instances {
		if b.now().Before(b.until(other, c)) {
			ejected++
		}
	}
	if e.failures < c.ejection.Failures || ejected > 0 && (ejected+1)*100 > c.ejection.Percent*len(instances) {
		return 0
	}
	backoff := min(c.ejection.Base*time.Duration(e.times+1), max(c.ejection.Base, maxConfiguredEjection))
	if step := c.ejection.Interval; step > 0 {
		backoff = (backoff + step - 1) / step * step
	}
	return backoff
}

// succeeded forgets the failures of inst.
func (b *balancer) succeeded(inst *catalog.Instance, c call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.ejected, ledger{c.caller, placeOf(inst)})
}

// why says why inst is ejected now, and for whom, or "".
func (b *balancer) why(inst *catalog.Instance) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var reasons []string
	for at, e := range b.ejected {
		switch {
		case at.place != placeOf(inst) || !b.now().Before(e.until):
		case at.caller == "":
			reasons = append(reasons, e.err.Error())
		default:
			reasons = append(reasons, "for "+at.caller+": "+e.err.Error())
		}
	}
	slices.Sort(reasons)
	return strings.Join(reasons, "; ")
}

// prune forgets the targets and instances that snap does not have.
func (b *balancer) prune(snap *catalog.Snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.ejected) == 0 && len(b.turns) == 0 {
		return
	}
	places, targets := make(map[place]bool), make(map[string]bool)
	for t := range snap.AllTargets() {
		targets[t.String()] = true
		for _, inst := range t.Instances {
			places[placeOf(inst)] = true
		}
	}
	maps.DeleteFunc(b.ejected, func(at ledger, _ ejection) bool { return !places[at.place] })
	maps.DeleteFunc(b.turns, func(name string, _ uint64) bool { return !targets[name] })
}

package nodeproxy

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// The back-off of an instance that could not be dialled doubles with every further failure.
const (
	minEjection = time.Second
	maxEjection = time.Minute
)

// place names an instance across snapshots.
type place struct{ node, id string }

func placeOf(inst *catalog.Instance) place { return place{inst.Node, inst.ID} }

// ejection is why and for how long an instance is not the first choice.
type ejection struct {
	until    time.Time
	failures int
	err      error
}

// balancer chooses among the instances of a service: the less busy one of two that it draws. Instances that could not be
// dialled are ejected: they are chosen only when nothing else is left, so that an ejection never makes a service
// unreachable.
type balancer struct {
	preferLocal bool
	now         func() time.Time

	mu      sync.Mutex
	active  map[place]int
	ejected map[place]ejection
}

func newBalancer(preferLocal bool) *balancer {
	return &balancer{preferLocal: preferLocal, now: time.Now, active: map[place]int{}, ejected: map[place]ejection{}}
}

// pick chooses an instance that is not in tried, and counts a connection to it until done is called. It returns nil when
// none is left.
func (b *balancer) pick(instances []*catalog.Instance, tried []*catalog.Instance) (inst *catalog.Instance, done func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var usable, local, ejected []*catalog.Instance
	for _, candidate := range instances {
		switch {
		case !candidate.Healthy || !candidate.Mesh.IsValid() || slices.Contains(tried, candidate):
		case b.now().Before(b.ejected[placeOf(candidate)].until):
			ejected = append(ejected, candidate)
		case candidate.Local:
			local = append(local, candidate)
			usable = append(usable, candidate)
		default:
			usable = append(usable, candidate)
		}
	}
	switch {
	case b.preferLocal && len(local) > 0:
		usable = local
	case len(usable) == 0 && len(ejected) > 0:
		usable = []*catalog.Instance{slices.MinFunc(ejected, b.sooner)}
	case len(usable) == 0:
		return nil, nil
	}
	inst = b.lessBusy(usable)
	return inst, b.use(placeOf(inst))
}

// only is pick for one instance that was asked for by its own address.
func (b *balancer) only(inst *catalog.Instance) (done func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.use(placeOf(inst))
}

func (b *balancer) sooner(x, y *catalog.Instance) int {
	return b.ejected[placeOf(x)].until.Compare(b.ejected[placeOf(y)].until)
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

// failed ejects inst. Failures while it is ejected already are those of connections that were under way: they do not
// prolong the ejection. It returns for how long inst was ejected now, 0 when it was already.
func (b *balancer) failed(inst *catalog.Instance, err error) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, now := placeOf(inst), b.now()
	e := b.ejected[at]
	if now.Before(e.until) {
		return 0
	}
	backoff := min(minEjection<<min(e.failures, 10), maxEjection)
	b.ejected[at] = ejection{until: now.Add(backoff), failures: e.failures + 1, err: err}
	return backoff
}

// succeeded forgets the failures of inst.
func (b *balancer) succeeded(inst *catalog.Instance) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.ejected, placeOf(inst))
}

// why says why inst is ejected now, or "".
func (b *balancer) why(inst *catalog.Instance) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.ejected[placeOf(inst)]
	if !b.now().Before(e.until) {
		return ""
	}
	return e.err.Error()
}

// prune forgets the instances that snap does not have.
func (b *balancer) prune(snap *catalog.Snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.ejected) == 0 {
		return
	}
	known := make(map[place]bool)
	for _, svc := range snap.Services {
		for _, inst := range svc.Instances {
			known[placeOf(inst)] = true
		}
	}
	for at := range b.ejected {
		if !known[at] {
			delete(b.ejected, at)
		}
	}
}

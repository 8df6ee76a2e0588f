package nodeproxy

import (
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// heardFor is how long it counts that a peer has said of an instance that it ends: then it is gone, or there again.
const heardFor = 30 * time.Second

// endings are the instances that are about to end: those of this node, as the Kernel says, and those of others, as their tunnels do.
type endings struct {
	mu    sync.Mutex
	here  []string // IDs
	heard map[place]time.Time
}

// Ending implements workload.Handler.
func (p *Proxy) Ending(instances []string) {
	p.ends.mu.Lock()
	p.ends.here = instances
	p.ends.mu.Unlock()
	p.tunnels.tell(&p.ends)
}

// local says whether an instance of this node ends.
func (e *endings) local(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.here, id)
}

func (e *endings) hear(inst *catalog.Instance) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.heard == nil {
		e.heard = make(map[place]time.Time)
	}
	e.heard[placeOf(inst)] = time.Now()
}

// has says whether inst is about to end, as far as is known.
func (e *endings) has(inst *catalog.Instance) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if inst.Local {
		return slices.Contains(e.here, inst.ID)
	}
	at := placeOf(inst)
	when, ok := e.heard[at]
	if ok && time.Since(when) >= heardFor {
		delete(e.heard, at)
		ok = false
	}
	return ok
}

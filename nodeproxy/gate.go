package nodeproxy

import (
	"sync"
	"sync/atomic"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/policy"
)

// state is what is in force: one snapshot and its certificates.
type state struct {
	snap        *catalog.Snapshot
	credentials *mtls.Credentials
	former      map[string]formerLeaf // by service
	trust       uint64                // rises when the roots, or what the mesh asks of TLS, are others than before
}

// verdict is a decision and its place in the order of all decisions.
type verdict struct {
	policy.Verdict
	sequence uint64
}

// gate holds the state in force and orders verdicts: none of an older state has a higher sequence than one of a newer.
type gate struct {
	mu       sync.RWMutex
	state    *state // nil before the first snapshot
	sequence atomic.Uint64
}

func (g *gate) current() *state {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.state
}

// swap puts next in force. When it returns, no verdict of an older state is given any more.
func (g *gate) swap(next *state) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state = next
}

// decide says whether src may connect to dst, by the state in force. Policy and sequence are taken under one lock: an
// atomic pointer and a counter would let a swap fall between the two.
func (g *gate) decide(src policy.Identity, dst string) verdict {
	g.mu.RLock()
	defer g.mu.RUnlock()
	v := g.state.snap.Policy.Decide(src, dst)
	return verdict{v, g.sequence.Add(1)}
}

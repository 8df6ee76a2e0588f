package nodeproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/policy"
)

// plainFor is how long an address is not asked for a tunnel after it made none.
const plainFor = 10 * time.Minute

// tunnelKey says who may use a tunnel: it is between one workload at one address and one instance, and ends with the
// certificate and the roots that it was made with.
type tunnelKey struct {
	source    string // service
	workload  uint32
	namespace uint64
	client    netip.Addr
	leaf      *x509.Certificate
	trust     uint64

	identity policy.Identity // which the instance has shown
	to       netip.AddrPort
}

// tunnels are those of a node: the ready ones of its callers, and the ends of all that lead to its instances.
type tunnels struct {
	pool     *tunnel.Pool[tunnelKey, *link]
	openings *tunnel.Memory[policy.Identity]
	rejected atomic.Uint64 // source addresses that were claimed and not shown

	mu    sync.Mutex
	plain map[netip.AddrPort]time.Time // until when an address is not asked
	ends  map[*tunnelEnd]struct{}
}

func newTunnels(limits *Limits) *tunnels {
	return &tunnels{
		pool:     tunnel.NewPool[tunnelKey, *link](limits.idleTunnels()),
		openings: tunnel.NewMemory[policy.Identity](),
		plain:    make(map[netip.AddrPort]time.Time), ends: make(map[*tunnelEnd]struct{}),
	}
}

// sweep forgets openings until ctx ends.
func (t *tunnels) sweep(ctx context.Context) {
	for tick := time.NewTicker(tunnel.MaxIdleTime); ; {
		select {
		case <-tick.C:
			t.openings.Sweep()
		case <-ctx.Done():
			tick.Stop()
			return
		}
	}
}

// speaks says whether a tunnel to inst, of snap, may be tried.
func (t *tunnels) speaks(snap *catalog.Snapshot, inst *catalog.Instance) bool {
	if !inst.Tunnels || !snap.TLS.Outgoing.Allows(tls.VersionTLS13) {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return !time.Now().Before(t.plain[inst.Mesh])
}

// isPlain notes that at speaks plain Connect.
func (t *tunnels) isPlain(at netip.AddrPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.plain[at] = time.Now().Add(plainFor)
}

// retire closes the tunnels that next makes invalid: those in use when their stream has ended.
func (t *tunnels) retire(next *state) {
	t.pool.Retire(func(key tunnelKey) bool {
		inst, ok := next.snap.InstanceByMesh(key.to)
		leaf := next.snap.Leaves[key.source]
		return ok && next.snap.Identity(inst.Service) == key.identity && inst.Tunnels && key.trust == next.trust && leaf != nil && leaf.Leaf == key.leaf
	})
	t.retireEnds(func(e *tunnelEnd) bool { return !e.fits(next) })
	t.mu.Lock()
	defer t.mu.Unlock()
	for at := range t.plain {
		if _, ok := next.snap.InstanceByMesh(at); !ok {
			delete(t.plain, at)
		}
	}
}

// retireNamespace closes the tunnels of a namespace that goes: their sockets keep it alive.
func (t *tunnels) retireNamespace(cookie uint64) {
	t.pool.Retire(func(key tunnelKey) bool { return key.namespace != cookie })
	t.retireEnds(func(e *tunnelEnd) bool { return e.ns.Cookie == cookie })
}

func (t *tunnels) retireEnds(which func(*tunnelEnd) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := range t.ends {
		if which(e) {
			e.retire()
		}
	}
}

// tell has the tunnels of instances that end say so.
func (t *tunnels) tell(ends *endings) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := range t.ends {
		if ends.local(e.served.Instance) {
			e.tell()
		}
	}
}

func (t *tunnels) add(e *tunnelEnd) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ends[e] = struct{}{}
}

func (t *tunnels) remove(e *tunnelEnd) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.ends, e)
}

// idle counts the tunnels without a stream, each of which is one socket.
func (t *tunnels) idle() (outbound, inbound int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := range t.ends {
		if e.resting() {
			inbound++
		}
	}
	return t.pool.Idle(), inbound
}

// pathTo is the path of a connection to any of instances: a tunnel only where each of them makes one.
func (p *Proxy) pathTo(snap *catalog.Snapshot, instances []*catalog.Instance) admin.Path {
	if !p.cfg.Tunnels || len(instances) == 0 || slices.ContainsFunc(instances, func(inst *catalog.Instance) bool { return !p.tunnels.speaks(snap, inst) }) {
		return admin.PathMTLS
	}
	return admin.PathTunnel
}

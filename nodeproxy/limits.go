package nodeproxy

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// Limits bound what connections may take. Full means that the new connection is refused with reason capacity; nothing
// established suffers.
type Limits struct {
	Connections int // of the node, both directions, handshakes in progress included

	// PerWorkload bounds the outbound connections of one workload, and the inbound ones that one source service has to
	// one local instance: neither the node nor a destination is exhausted by one workload.
	PerWorkload int

	// Handshakes bounds the inbound handshakes in progress of one local instance; 0 is a quarter of PerWorkload. One
	// client address may have half of them, and all instances together a quarter of Connections. It also bounds those that
	// this node begins with one instance anywhere: half of it, so that a peer with the same limits never refuses one, and
	// a sixteenth for each workload. What is above waits.
	Handshakes int

	Handshake time.Duration // for a whole TLS handshake, either direction
	Connect   time.Duration // to connect to one instance, where its service does not say, or to the application
	Idle      time.Duration // an open connection without a byte either way; 0 is no limit
	Drain     time.Duration // for live connections to end by themselves when the daemon stops
}

func (l *Limits) validate() error {
	var errs []error
	for name, n := range map[string]int{"connections": l.Connections, "per_workload": l.PerWorkload} {
		if n < 1 {
			errs = append(errs, fmt.Errorf("limits.%s is %d: it must be at least 1", name, n))
		}
	}
	for name, d := range map[string]time.Duration{"handshake": l.Handshake, "connect": l.Connect} {
		if d <= 0 {
			errs = append(errs, fmt.Errorf("limits.%s is %s: it must be more than 0", name, d))
		}
	}
	if l.Handshakes < 0 || l.Idle < 0 || l.Drain < 0 {
		errs = append(errs, errors.New("limits must not be negative"))
	}
	return errors.Join(errs...)
}

func (l *Limits) handshakes() int {
	if l.Handshakes > 0 {
		return l.Handshakes
	}
	return max(1, l.PerWorkload/4)
}

// slot is one place that a connection needs, of those that all connections with an equal key share.
type slot struct {
	key slotKey
	max int // 0 is no limit
}

// slotKey names what is limited. It is comparable and says so in words.
type slotKey struct {
	what     string
	workload uint32
	instance string
	peer     string
	upstream string
	client   netip.Addr
}

func (k slotKey) String() string {
	s := k.what
	if k.workload != 0 {
		s += fmt.Sprintf(" of workload %d", k.workload)
	}
	if k.instance != "" {
		s += fmt.Sprintf(" to instance %q", k.instance)
	}
	if k.peer != "" {
		s += fmt.Sprintf(" from %q", k.peer)
	}
	if k.upstream != "" {
		s += fmt.Sprintf(" to %q", k.upstream)
	}
	if k.client.IsValid() {
		s += fmt.Sprintf(" from %s", k.client)
	}
	return s
}

// slots counts what is taken. It holds an entry for what is in use and nothing else.
type slots struct {
	mu    sync.Mutex
	taken map[slotKey]int
}

// take takes a place in each of wanted, or in none of them. What it returns gives them back, once.
func (s *slots) take(wanted ...slot) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range wanted {
		if w.max > 0 && s.taken[w.key] >= w.max {
			return nil, &catalog.Refusal{Reason: catalog.ReasonCapacity, Err: fmt.Errorf("accept the connection: %s: all %d are in use", w.key, w.max)}
		}
	}
	for _, w := range wanted {
		s.taken[w.key]++
	}
	return sync.OnceFunc(func() { s.release(wanted) }), nil
}

func (s *slots) release(held []slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range held {
		if s.taken[h.key]--; s.taken[h.key] == 0 {
			delete(s.taken, h.key)
		}
	}
}

var everyConnection = slotKey{what: "limits.connections of this node"}

func (l *Limits) outboundSlots(workload uint32) []slot {
	return []slot{
		{everyConnection, l.Connections},
		{slotKey{what: "limits.per_workload: outbound connections", workload: workload}, l.PerWorkload},
	}
}

func (l *Limits) handshakeSlots(instance string, client netip.Addr) [scopes]slot {
	const what = "handshakes in progress"
	return [scopes]slot{
		{slotKey{what: what}, max(1, l.Connections/4)},
		{slotKey{what: what, instance: instance}, l.handshakes()},
		{slotKey{what: what, instance: instance, client: client}, max(1, l.handshakes()/2)},
	}
}

// dialTurns are what an outbound handshake waits for, one after the other: a workload that opens many waits for itself.
func (l *Limits) dialTurns(workload uint32, instance string) []slot {
	const what = "outbound handshakes in progress"
	return []slot{
		{slotKey{what: what, workload: workload, instance: instance}, max(1, l.handshakes()/16)},
		{slotKey{what: what, instance: instance}, max(1, l.handshakes()/2)},
	}
}

func (l *Limits) inboundSlots(instance, source string, maxInbound int) []slot {
	return []slot{
		{slotKey{what: "limits.per_workload: inbound connections", instance: instance, peer: source}, l.PerWorkload},
		{slotKey{what: "MaxInboundConnections", instance: instance}, maxInbound},
	}
}

// The bounds of tunnels without a stream: each holds a file descriptor.
const (
	idleShare       = 16   // of this many connections one may be an idle tunnel, outbound, and one inbound
	maxIdleOfSource = 1024 // inbound, of one source service
	maxIdleOfPair   = 256  // inbound, from one source service to one instance
)

// idleTunnels is how many of this node's own tunnels may be idle.
func (l *Limits) idleTunnels() int { return max(1, l.Connections/idleShare) }

// tunnelSlots are those of an inbound tunnel without a stream.
func (l *Limits) tunnelSlots(instance, source string) []slot {
	const what = "idle tunnels"
	return []slot{
		{slotKey{what: what}, l.idleTunnels()},
		{slotKey{what: what, peer: source}, maxIdleOfSource},
		{slotKey{what: what, instance: instance, peer: source}, maxIdleOfPair},
	}
}

package nodeproxy

import (
	"container/list"
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"sync"

	"nodeproxy.io/nodeproxy/catalog"
)

// answering is how many inbound handshakes are answered at once: one processor is left to accept, to copy and to finish handshakes.
func answering() int { return max(1, runtime.GOMAXPROCS(0)-1) }

// rounds bounds how many inbound handshakes are answered at once on this node, and shares the turns out: instances take them one
// after the other, within an instance its client addresses do, and an address's own are first come first served. Whoever
// floods one instance with hellos therefore delays a neighbour's by one answer, and those of other clients by one for each address
// that it has.
type rounds struct {
	mu        sync.Mutex
	free      int
	instances circle[string, *circle[netip.Addr, *list.List]]
}

// circle holds, by key, what takes turns.
type circle[K comparable, V any] struct {
	members map[K]*member[K, V]
	order   list.List // of members
}

type member[K comparable, V any] struct {
	key   K
	value V
	at    *list.Element
}

// join returns the member of a key, which becomes the last with a value that fresh makes if there is none.
func (c *circle[K, V]) join(key K, fresh func() V) V {
	m := c.members[key]
	if m == nil {
		if c.members == nil {
			c.members = make(map[K]*member[K, V])
		}
		m = &member[K, V]{key: key, value: fresh()}
		m.at = c.order.PushBack(m)
		c.members[key] = m
	}
	return m.value
}

// next is the member whose turn it is, and then the last. There must be one.
func (c *circle[K, V]) next() (K, V) {
	m := c.order.Front().Value.(*member[K, V])
	c.order.MoveToBack(m.at)
	return m.key, m.value
}

func (c *circle[K, V]) leave(key K) {
	c.order.Remove(c.members[key].at)
	delete(c.members, key)
}

// take waits for a turn to answer a client's handshake with an instance, until ctx ends. done ends it, once; it is never nil.
func (r *rounds) take(ctx context.Context, instance string, client netip.Addr) (done func(), err error) {
	r.mu.Lock()
	if r.free > 0 {
		r.free--
		r.mu.Unlock()
		return sync.OnceFunc(r.pass), nil
	}
	turn := make(chan struct{}) // closed when it has come
	clients := r.instances.join(instance, func() *circle[netip.Addr, *list.List] { return new(circle[netip.Addr, *list.List]) })
	waiting := clients.join(client, list.New).PushBack(turn)
	r.mu.Unlock()
	select {
	case <-turn:
		return sync.OnceFunc(r.pass), nil
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-turn: // at the same moment
		return sync.OnceFunc(r.pass), nil
	default:
		r.leave(instance, client, waiting)
		return func() {}, &catalog.Refusal{Reason: catalog.ReasonCapacity, Err: fmt.Errorf("wait for a turn to answer a handshake with instance %q: %w", instance, context.Cause(ctx))}
	}
}

// pass hands a turn that has ended to whoever is next.
func (r *rounds) pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.instances.order.Len() == 0 {
		r.free++
		return
	}
	instance, clients := r.instances.next()
	client, line := clients.next()
	first := line.Front()
	close(first.Value.(chan struct{}))
	r.leave(instance, client, first)
}

// leave takes out who does not wait any more, and what is empty then.
func (r *rounds) leave(instance string, client netip.Addr, waiting *list.Element) {
	clients := r.instances.members[instance].value
	line := clients.members[client].value
	if line.Remove(waiting); line.Len() > 0 {
		return
	}
	if clients.leave(client); clients.order.Len() == 0 {
		r.instances.leave(instance)
	}
}

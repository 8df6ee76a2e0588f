package nodeproxy

import (
	"sync"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/workload"
)

// directs are the open connections that do not pass the proxy, by the kernel's id. Nothing here owns their sockets: the
// kernel ends those that the policy comes to deny (see Kernel.Revoke), and says when they are closed.
type directs struct {
	mu   sync.Mutex
	open map[uint64]*directConnection
}

type directConnection struct {
	*connection
	denial *verdict // of a policy that came to deny it; guarded by directs.mu
}

func (d *directs) add(id uint64, c *directConnection) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open[id] = c
}

func (d *directs) take(id uint64) *directConnection {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.open[id]
	delete(d.open, id)
	return c
}

// recheck evaluates every connection again. One that is denied now may have closed by itself already, unheard of: it is
// condemned when the kernel says that it cut it.
func (d *directs) recheck(g *gate) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.open {
		c.evaluate(g)
	}
}

func (d *directs) recheckOne(c *directConnection, g *gate) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.evaluate(g)
}

func (c *directConnection) evaluate(g *gate) {
	v := g.decide(c.source, c.service)
	if c.denial = nil; !v.Allowed {
		c.denial = &v
		return
	}
	c.record(v)
}

func (d *directs) len() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)
}

func (d *directs) all() []*connection {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []*connection
	for _, c := range d.open {
		all = append(all, c.connection)
	}
	return all
}

// Direct implements workload.Handler: what went within the node without us is told like what we carried.
func (p *Proxy) Direct(d workload.DirectConnection) {
	switch d.Stage {
	case workload.DirectOpened:
		p.directOpened(d)
	case workload.DirectClosed:
		p.directClosed(d)
	case workload.DirectFailed:
		c := p.newDirect(d)
		v := p.gate.decide(c.source, c.service)
		c.record(v)
		err := refuse(d.Reason, "connect %q to instance %q at %s: %s", d.Source, d.Instance, d.Peer, d.Reason.Sentence())
		if !v.Allowed {
			err = denial(c.source, c.service, v)
		}
		p.end(c, err)
	}
}

// directOpened registers c before its intention is evaluated: a policy change either decides here, or finds it.
func (p *Proxy) directOpened(d workload.DirectConnection) {
	c := &directConnection{connection: p.newDirect(d)}
	_ = c.open() // c is new: it cannot have been cut off
	p.direct.add(d.ID, c)
	p.direct.recheckOne(c, &p.gate)
	e, _ := c.line()
	p.opened.Add(1)
	p.cfg.Observer.Observe(e)
}

func (p *Proxy) directClosed(d workload.DirectConnection) {
	c := p.direct.take(d.ID)
	if c == nil {
		return
	}
	if c.denial != nil && d.Cut {
		c.condemn(denial(c.source, c.service, *c.denial), c.denial)
	}
	c.sent.Store(d.Sent)
	c.received.Store(d.Received)
	c.describe(func(about *admin.Connection) { about.RTT = d.RTT })
	p.end(c.connection, nil)
}

func (p *Proxy) newDirect(d workload.DirectConnection) *connection {
	c := toldConnection(p.lastID.Add(1), admin.Outbound)
	if !d.Opened.IsZero() {
		c.started = d.Opened
	}
	c.via(admin.PathDirect)
	now := p.gate.current()
	c.identify(now.snap.Identity(d.Source), d.Destination)
	c.describe(func(about *admin.Connection) {
		about.Path = admin.PathDirect // also of one that fails
		about.Source.Address, about.Source.Workload = d.Client.String(), d.Workload
		about.Source.PID, about.Source.Comm = d.PID, d.Comm
		about.Destination.Instance, about.Destination.Address = d.Instance, d.Dialled.String()
		about.Destination.Identity = now.snap.Identity(d.Destination).String()
		if d.Peer != d.Dialled {
			about.Destination.Peer = d.Peer.String()
		}
	})
	return c
}

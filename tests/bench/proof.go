package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/admin"
)

// prove shows by the trace of the daemons that each path carries every byte of every kind of load the way it claims: in
// plain TCP past the daemons, directly within the node, or over mTLS, out through the client's node and in through the server's.
func (b *bench) prove(ctx context.Context, l *lab) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, err := l.opened(ctx); err != nil { // whatever came before must not be in the traces
		return err
	}
	w := l.watch(ctx)
	err := b.proveAll(ctx, l, w)
	cancel()
	return errors.Join(err, w.wait())
}

func (b *bench) proveAll(ctx context.Context, l *lab, w *watcher) error {
	if err := l.proveTraces(ctx, w); err != nil {
		return fmt.Errorf("read the traces: %w", err)
	}
	for _, p := range l.paths {
		for _, kind := range kinds() {
			b.step("prove %s over %s", kind, p.name)
			s, err := b.sample(ctx, p, order{Kind: kind, Connections: 1, Duration: 10 * time.Millisecond, Opens: 1})
			if err == nil {
				err = w.sees(ctx, p, admin.EventClose, s.Outcome)
			}
			if err != nil {
				return fmt.Errorf("prove %s over %s: %w", kind, p.name, err)
			}
		}
	}
	return nil
}

// proveTraces holds one connection until both daemons have told of it: from then on their traces miss nothing.
func (l *lab) proveTraces(ctx context.Context, w *watcher) error {
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, errors.New("the connection did not end"))
	defer cancel()
	p := l.far
	c, err := l.startClient(ctx, p, order{Kind: idle, Connections: 1})
	if err != nil {
		return err
	}
	if err := w.sees(ctx, p, admin.EventOpen, outcome{}); err != nil {
		return err
	}
	if err := c.end(ctx); err != nil {
		return err
	}
	return w.sees(ctx, p, admin.EventClose, outcome{Sent: messageSize, Received: messageSize})
}

// watcher reads the traces of both daemons.
type watcher struct {
	events chan seen
	ended  chan error // one for each daemon
}

type seen struct {
	node int
	admin.Connection
}

// watch reads the traces until ctx ends.
func (l *lab) watch(ctx context.Context) *watcher {
	w := &watcher{events: make(chan seen), ended: make(chan error, len(l.Daemons))}
	for node, d := range l.Daemons {
		go func() {
			w.ended <- d.Admin().Trace(ctx, admin.Filter{}, func(c admin.Connection) error {
				select {
				case w.events <- seen{node, c}:
				case <-ctx.Done():
				}
				return nil
			})
		}()
	}
	return w
}

func (w *watcher) wait() error { return errors.Join(<-w.ended, <-w.ended) }

// end is one daemon's part of a connection.
type end struct {
	node      int
	direction admin.Direction
}

// sees waits for an event at each end that a connection over p has on the daemons. A close must tell of the bytes of o.
// A plain path has no ends, and that the daemons opened nothing for it is known from their counters.
func (w *watcher) sees(ctx context.Context, p *path, event string, o outcome) error {
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, errors.New("no daemon tells of it"))
	defer cancel()
	for wanted := p.endList(); len(wanted) > 0; {
		select {
		case e := <-w.events:
			if e.Event != event {
				continue
			}
			if e.Path != p.via || event == admin.EventClose && (e.Sent != o.Sent || e.Received != o.Received) {
				return fmt.Errorf("node %d says %s over %q with %d bytes sent and %d received, and the load had %d and %d",
					e.node+1, e.Direction, e.Path, e.Sent, e.Received, o.Sent, o.Received)
			}
			i := slices.Index(wanted, end{e.node, e.Direction})
			if i < 0 {
				return fmt.Errorf("node %d tells of a connection that is none of this path's: %+v", e.node+1, e.Connection)
			}
			wanted = slices.Delete(wanted, i, i+1)
		case <-ctx.Done():
			return fmt.Errorf("wait for %v: %w", wanted, context.Cause(ctx))
		}
	}
	return nil
}

// endList names the ends of a connection: outbound at the client's node, inbound at the server's.
func (p *path) endList() []end {
	var all []end
	for node, n := range p.ends {
		for range n {
			all = append(all, end{node, admin.Inbound})
		}
	}
	if len(all) > 0 {
		all[0].direction = admin.Outbound
	}
	return all
}

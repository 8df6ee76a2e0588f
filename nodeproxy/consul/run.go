package consul

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	// look is how often that is asked which cannot be waited for, or need not.
	look = 10 * time.Second

	// settle is how long changes are collected after a snapshot. The first change after a pause is delivered at once.
	settle = 10 * time.Millisecond

	// rest is how many times as long as it took to build a snapshot no other is built, in a large mesh, and as it took to look at the
	// registrations of this node they are not looked at again.
	rest = 2
)

// run is one run of a Source.
type run struct {
	*Source
	ask     asker
	deliver func(*catalog.Snapshot)
	began   time.Time
	earlier *earlier // nil: nothing is known

	// These belong to the goroutine of loop.
	changes    uint64    // that the last snapshot knows of, or that could not be one
	intended   uint64    // the same of intentions
	certified  uint64    // and of certificates
	rested     time.Time // before it none is built whole
	generation uint64
	built      bool              // a snapshot of what the agent said was delivered
	made       *builder          // what made the last snapshot, but maybe for its policy and its certificates; nil: there is none
	snap       *catalog.Snapshot // the last one
	rejected   string            // the error of the last snapshot that could not be built, logged

	undefined string // why this node's definitions are not applied, logged; define's own
}

// loop builds and delivers snapshots until ctx ends.
func (r *run) loop(ctx context.Context) {
	silent, later := time.NewTimer(hung), time.NewTimer(0)
	defer silent.Stop()
	defer later.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-silent.C:
		case <-later.C:
		case <-r.world.changed:
		}
		began := time.Now()
		if wait := r.send(); wait > 0 {
			later.Reset(wait)
		}
		pause(ctx, settle-time.Since(began))
	}
}

// send delivers the world as it is, once it is complete, or only its intentions and certificates, and returns how long the rest is to
// wait. Those do not wait for what else changes, of which there may be much. A certificate counts once what it is for is known too.
func (r *run) send() (wait time.Duration) {
	d := r.world.current()
	if r.made != nil && d.intended != r.intended {
		if snap, err := r.made.restate(&d, r.snap, r.generation+1, time.Now()); snap != nil || err != nil {
			r.intended = d.intended
			r.pass(snap, err)
		}
	}
	if r.made != nil && d.certified != r.certified && d.roots == r.made.data.roots { // what new roots sign comes with them
		r.certified = d.certified
		r.pass(r.snap.WithLeaves(r.leaves.certificates(r.made.needed), r.generation+1, time.Now()), nil)
		r.want()
	}
	if d.changes == r.changes && d.intended == r.intended && d.certified == r.certified || !r.complete(&d) {
		r.fallBack()
		return 0
	}
	began := time.Now()
	if wait := r.rested.Sub(began); wait > 0 {
		return wait
	}
	r.changes, r.intended, r.certified, r.made = d.changes, d.intended, d.certified, nil
	needed := r.leaves.needed()
	given := r.givePorts(&d, needed)
	b := r.builder(&d, needed, given)
	snap, err := b.build(r.generation+1, time.Now())
	r.rested = time.Now().Add(rest * time.Since(began))
	if !r.pass(snap, err) {
		return 0
	}
	r.made = b
	r.want()
	return 0
}

// want tells keepRegistered what the last snapshot wants to be registered.
func (r *run) want() {
	if r.ports == nil {
		return
	}
	select {
	case <-r.wanted: // an older one that was not taken
	default:
	}
	r.wanted <- wantedOf(&r.cfg, r.made.data, r.snap, r.made.needed, r.made.given)
}

// pass delivers a snapshot, unless none could be made.
func (r *run) pass(snap *catalog.Snapshot, err error) bool {
	if err != nil {
		if r.rejected != err.Error() {
			r.cfg.Log.Error("what Consul says makes no snapshot, the last good one stays in force", "error", err)
		}
		r.rejected = err.Error()
		r.world.failed("a consistent catalog", time.Now(), err)
		return false
	}
	r.world.answered("a consistent catalog")
	r.rejected = ""
	r.generation++
	r.snap = snap
	r.supersede()
	r.deliver(snap)
	return true
}

// complete says whether every question has been answered once, or, where it is one of many, will not be. The first
// snapshot waits for it.
func (r *run) complete(d *data) bool {
	if r.built {
		return true
	}
	if d.agent == nil || d.roots == nil || d.local == nil || d.checks == nil || d.looks == nil || d.proxies == nil || d.nodes == nil || !d.entries.complete() {
		return false
	}
	if r.isReading(d) {
		return false
	}
	waited := make(map[string]bool) // names that are not known yet, and may be
	own, others := destinations(d, r.leaves.needed())
	for _, names := range []map[string]bool{own, others} {
		for name := range names {
			if _, known := d.intentions[name]; !known {
				waited[name] = true
			}
		}
	}
	for _, l := range d.asked {
		if r.world.hopeless(matchFault(l.names), r.patience()) {
			for _, name := range l.names {
				delete(waited, name)
			}
		}
	}
	return len(waited) == 0
}

// askAll asks everything until ctx ends.
func (r *run) askAll(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for failures := 1; ctx.Err() == nil; failures++ { // who the agent is comes first: other questions need its name
		if _, ok := r.ask.once(ctx, r.agentTopic(), [sha256.Size]byte{}); ok {
			break
		}
		pause(ctx, backoff(failures))
	}
	if ctx.Err() != nil {
		return
	}
	tasks.Go(func() { r.ask.watch(ctx, r.rootsTopic()) })
	tasks.Go(func() { r.ask.watch(ctx, r.namesTopic()) })
	if r.cfg.agentless() {
		origins := newOrigins(len(r.cfg.Definitions), r.define)
		for i, d := range r.cfg.Definitions {
			tasks.Go(func() { d.Run(ctx, func(defs catalog.Definitions) { origins.define(i, defs) }) })
		}
	} else {
		tasks.Go(func() { r.ask.watch(ctx, r.registrationsTopic()) })
	}
	tasks.Go(func() { r.ask.watch(ctx, r.resolverTopic(ctx)) })
	tasks.Go(func() { r.matchAll(ctx) })
	tasks.Go(func() { r.readServices(ctx) })
	tasks.Go(func() { r.watchCalled(ctx) })
	tasks.Go(func() { r.ask.watch(ctx, r.nodeProxiesTopic()) })
	tasks.Go(func() { r.ask.watch(ctx, r.nodesTopic()) })
	if r.ports != nil {
		tasks.Go(func() { r.keepRegistered(ctx) })
	}
	r.poll(ctx)
}

// poll looks at what cannot be waited for, or need not, and at the registrations of this node when they have changed.
func (r *run) poll(ctx context.Context) {
	topics := []topic{r.agentTopic()}
	if !r.cfg.agentless() {
		topics = append(topics, r.localTopic(), r.checksTopic())
	}
	local := topics[1:]
	topics = append(topics, r.entryTopics()...)
	last := make([][sha256.Size]byte, len(topics))
	next := time.NewTimer(0)
	defer next.Stop()
	for failures := 0; ; {
		asked, all := time.Now(), true
		if err := r.client.reload(); err != nil {
			r.world.failed("anything over TLS", asked, err)
			all = false
		} else {
			r.world.answered("anything over TLS")
		}
		for i, t := range topics {
			var ok bool
			last[i], ok = r.ask.once(ctx, t, last[i])
			all = all && ok
		}
		all = r.refreshChains(ctx) && all
		if failures++; all {
			r.world.sawAll(asked)
			failures = 0
			next.Reset(look)
		} else {
			next.Reset(min(look, backoff(failures)))
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return
			case <-next.C:
				waiting = false
			case <-r.lookNow:
				began := time.Now()
				for i := range local {
					last[1+i], _ = r.ask.once(ctx, local[i], last[1+i])
				}
				r.refreshChains(ctx)
				pause(ctx, min(time.Second, rest*time.Since(began)))
			}
		}
	}
}

// sawAll notes that all that is polled was answered at that time.
func (w *world) sawAll(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looked = at
}

// minVersion is the oldest Consul that has all that is asked here.
var minVersion = [2]int{1, 16}

func checkVersion(version string) error {
	var v [2]int
	if n, _ := fmt.Sscanf(version, "%d.%d", &v[0], &v[1]); n == 2 && (v[0] < minVersion[0] || v[0] == minVersion[0] && v[1] < minVersion[1]) {
		return fmt.Errorf("the agent is Consul %s: %d.%d or newer is needed: upgrade it", version, minVersion[0], minVersion[1])
	}
	return nil
}

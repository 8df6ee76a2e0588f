package consul

import (
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	// hung is how long after the start an agent that has not said everything yet is taken for one that does not answer.
	hung = 5 * time.Second

	// insisted is how many times in a row a question must fail before the first snapshot is built without its answer, when
	// that would replace what an earlier daemon knew: with back-off, about a minute.
	insisted = 9
)

// earlier is what an earlier daemon knew.
type earlier struct {
	snap    *catalog.Snapshot
	updated time.Time
	inForce atomic.Bool
}

var _ catalog.Restorer = (*Source)(nil)

// Restore implements catalog.Restorer.
func (s *Source) Restore(snap *catalog.Snapshot, updated time.Time) error {
	switch {
	case snap.Node != s.cfg.Node:
		return fmt.Errorf("it is of node %q, and this is %q", snap.Node, s.cfg.Node)
	case s.cfg.Datacenter != "" && snap.Datacenter != s.cfg.Datacenter:
		return fmt.Errorf("it is of datacenter %q, and this is %q", snap.Datacenter, s.cfg.Datacenter)
	}
	s.restored.Store(&earlier{snap: snap, updated: updated})
	s.leaves.restore(snap.Leaves)
	return nil
}

// fallBack delivers what an earlier daemon knew, once, if the agent does not answer.
func (r *run) fallBack() {
	if r.built || r.earlier == nil || r.earlier.inForce.Load() {
		return
	}
	_, err := r.world.health()
	if (err == nil || errors.Is(err, errUnread)) && time.Since(r.began) < hung {
		return
	}
	r.cfg.Log.Warn("consul does not answer: what an earlier daemon knew is in force", "last current", r.earlier.updated, "error", err)
	r.earlier.inForce.Store(true)
	r.deliver(r.earlier.snap)
}

// supersede ends what an earlier daemon knew: the agent has answered everything.
func (r *run) supersede() {
	r.built = true
	if r.earlier != nil {
		r.earlier.inForce.Store(false)
	}
}

// patience is how many times in a row a question may fail before the first snapshot does not wait for it any more.
func (r *run) patience() int {
	if r.earlier != nil {
		return insisted
	}
	return tolerated
}

// restore keeps the certificates of an earlier daemon for the services that turn out to be needed.
func (l *leaves) restore(certs map[string]*tls.Certificate) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.earlier = maps.Clone(certs)
	for name, leaf := range l.all {
		leaf.cert = l.earlier[name]
	}
}

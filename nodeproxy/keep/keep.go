// Package keep keeps a source's last good snapshot for the daemon that runs next: restarted while the control plane is away, it
// goes on with what the one before knew.
//
// A snapshot holds private keys: the Memory given must not be on a disk. What is kept is current to a second, or nothing: when
// a snapshot cannot be kept, the one before is removed, for it may allow what is forbidden by now.
package keep

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	// settle is the least time between two writes, share the part of the time that writing may take.
	settle = time.Second
	share  = 20

	// refresh is how often a snapshot that does not change is written again, with the time at which it was still current.
	refresh = time.Minute
)

// Memory keeps one value. redirect.Store does, in kernel memory.
type Memory interface {
	Save(value []byte) error
	Load() ([]byte, error) // fs.ErrNotExist: there is none
	Remove() error         // also if there is none
}

// Restorable is a source that can go on with what an earlier daemon knew.
type Restorable interface {
	catalog.Source
	catalog.Restorer
}

// Source is a Restorable whose snapshots are kept. It implements catalog.Source.
type Source struct {
	Restorable
	memory   Memory
	log      *slog.Logger
	restored *catalog.Snapshot

	mu      sync.Mutex
	newest  *catalog.Snapshot
	state   State
	yielded bool
}

// State is what is kept.
type State struct {
	Generation uint64 // of the snapshot; 0: nothing is kept by this daemon
	Bytes      int
	Written    time.Time
	Err        error // why nothing is kept
}

// New returns source with its snapshots kept in memory.
func New(source Restorable, memory Memory, log *slog.Logger) *Source {
	return &Source{Restorable: source, memory: memory, log: log}
}

// State says what is kept now.
func (s *Source) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Restore implements catalog.Restorer. What is kept is not looked at then.
func (s *Source) Restore(snap *catalog.Snapshot, updated time.Time) error {
	err := s.Restorable.Restore(snap, updated)
	if err == nil {
		s.restored = snap
	}
	return err
}

// Yield implements catalog.Yielder: nothing is written any more.
func (s *Source) Yield() {
	s.mu.Lock()
	s.yielded = true
	s.mu.Unlock()
	if y, ok := s.Restorable.(catalog.Yielder); ok {
		y.Yield()
	}
}

// Run implements catalog.Source.
func (s *Source) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	if s.restored == nil {
		if err := s.restore(); err != nil {
			s.log.Warn("what an earlier daemon knew is not used", "error", err)
		}
	}
	changed := make(chan struct{}, 1)
	saving, stop := context.WithCancel(context.WithoutCancel(ctx))
	var saver sync.WaitGroup
	saver.Go(func() { s.saveAll(saving, changed) })
	defer saver.Wait()
	defer stop()
	return s.Restorable.Run(ctx, func(snap *catalog.Snapshot) {
		s.mu.Lock()
		s.newest = snap
		s.mu.Unlock()
		select {
		case changed <- struct{}{}:
		default:
		}
		deliver(snap)
	})
}

// restore gives the source what is kept. What cannot be used stays where it is until the first snapshot replaces it.
func (s *Source) restore() error {
	text, err := s.memory.Load()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	kept, err := catalog.Decode(text)
	clear(text) // keys
	if err != nil {
		return err
	}
	now := s.Health()
	if kept.Kind != now.Kind || kept.Location != now.Location {
		return fmt.Errorf("it is from %s %s, and the source is %s %s", kept.Kind, kept.Location, now.Kind, now.Location)
	}
	return s.Restore(kept.Snapshot, kept.Updated)
}

// saveAll writes the newest snapshot when it has changed, once more at the end, and then and when in between.
func (s *Source) saveAll(ctx context.Context, changed <-chan struct{}) {
	again := time.NewTicker(refresh)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			select {
			case <-changed:
				s.save()
			default:
			}
			return
		case <-changed:
		case <-again.C:
		}
		began := time.Now()
		s.save()
		pause := time.NewTimer(max(settle, share*time.Since(began)))
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

func (s *Source) save() {
	s.mu.Lock()
	newest, yielded := s.newest, s.yielded
	s.mu.Unlock()
	if newest == nil || newest == s.restored || yielded {
		return
	}
	size, err := s.write(newest)
	next := State{Generation: newest.Generation, Bytes: size, Written: time.Now()}
	if err != nil {
		next = State{Err: errors.Join(err, s.memory.Remove())}
	}
	s.mu.Lock()
	before := s.state.Err
	s.state = next
	s.mu.Unlock()
	if err != nil && before == nil {
		s.log.Error("the snapshot is not kept: a daemon that is restarted while the source is away will have none", "error", err)
	}
}

func (s *Source) write(snap *catalog.Snapshot) (int, error) {
	health := s.Health()
	text, err := (&catalog.Remembered{Snapshot: snap, Kind: health.Kind, Location: health.Location, Updated: health.Updated}).Encode()
	if err != nil {
		return 0, err
	}
	defer clear(text)
	if err := s.memory.Save(text); err != nil {
		return 0, fmt.Errorf("keep a snapshot of %d KiB: %w", len(text)>>10, err)
	}
	return len(text), nil
}

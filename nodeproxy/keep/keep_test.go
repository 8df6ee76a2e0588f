package keep_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/keep"
	"nodeproxy.io/policy"
)

// source delivers what it is sent.
type source struct {
	snaps    chan *catalog.Snapshot
	location string
	restored *catalog.Snapshot
}

func (s *source) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case snap := <-s.snaps:
			deliver(snap)
		}
	}
}

func (s *source) Need([]string) {}

func (s *source) Health() catalog.Health {
	return catalog.Health{Kind: "consul", Location: s.location, Updated: time.Now()}
}

func (s *source) Restore(snap *catalog.Snapshot, _ time.Time) error {
	s.restored = snap
	return nil
}

// memory counts, and is full on demand.
type memory struct {
	mu    sync.Mutex
	value []byte
	saves int
	full  bool
}

func (m *memory) Save(value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saves++
	if m.full {
		return errors.New("it is full")
	}
	m.value = bytes.Clone(value)
	return nil
}

func (m *memory) Load() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.value == nil {
		return nil, fs.ErrNotExist
	}
	return bytes.Clone(m.value), nil
}

func (m *memory) Remove() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.value = nil
	return nil
}

func (m *memory) fill(full bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.full = full
}

func (m *memory) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.saves
}

func (m *memory) generation(t *testing.T) uint64 {
	t.Helper()
	text, err := m.Load()
	if err != nil {
		return 0
	}
	kept, err := catalog.Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	return kept.Snapshot.Generation
}

func snapshot(t *testing.T, generation uint64) *catalog.Snapshot {
	t.Helper()
	p, err := policy.Compile(generation, policy.Deny, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.New(catalog.Snapshot{Generation: generation, Node: "node-1", TrustDomain: "x.consul", Policy: p})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs a keeper until the function returned is called.
func run(t *testing.T, s *source, m *memory, log *slog.Logger) (k *keep.Source, stop func()) {
	t.Helper()
	k = keep.New(s, m, log)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx, func(*catalog.Snapshot) {}) }()
	return k, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestTheNewestSnapshotIsKeptAtABoundedRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m := &source{snaps: make(chan *catalog.Snapshot)}, &memory{}
		_, stop := run(t, s, m, slog.New(slog.DiscardHandler))
		s.snaps <- snapshot(t, 1)
		synctest.Wait()
		if g := m.generation(t); g != 1 {
			t.Errorf("the first snapshot is not kept at once: %d is", g)
		}
		for g := range uint64(300) { // three seconds of them
			s.snaps <- snapshot(t, g+2)
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		if g := m.generation(t); g != 301 || m.written() > 5 {
			t.Errorf("snapshot %d is kept, after %d writes", g, m.written())
		}
		before := m.written()
		time.Sleep(10 * time.Minute)
		if n := m.written() - before; n < 9 || n > 11 {
			t.Errorf("%d writes in ten minutes without a change: its age is to be known to a minute", n)
		}
		s.snaps <- snapshot(t, 302)
		s.snaps <- snapshot(t, 303)
		stop()
		if g := m.generation(t); g != 303 {
			t.Errorf("at the end snapshot %d is kept", g)
		}
	})
}

func TestWhatCannotBeKeptLeavesNothingOlder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m := &source{snaps: make(chan *catalog.Snapshot)}, &memory{}
		k, stop := run(t, s, m, slog.New(slog.DiscardHandler))
		defer stop()
		s.snaps <- snapshot(t, 1)
		synctest.Wait()
		m.fill(true)
		s.snaps <- snapshot(t, 2)
		time.Sleep(2 * time.Second)
		if g := m.generation(t); g != 0 {
			t.Errorf("snapshot %d is still kept: it may allow what is denied by now", g)
		}
		if state := k.State(); state.Err == nil || !strings.Contains(state.Err.Error(), "it is full") || !state.Written.IsZero() {
			t.Errorf("state: %+v", state)
		}
		m.fill(false)
		s.snaps <- snapshot(t, 3)
		time.Sleep(2 * time.Second)
		if state := k.State(); m.generation(t) != 3 || state.Err != nil {
			t.Errorf("state: %+v", state)
		}
	})
}

func TestOnlyWhatIsWholeAndOfTheSameSourceIsRestored(t *testing.T) {
	kept := &memory{}
	synctest.Test(t, func(t *testing.T) {
		s := &source{snaps: make(chan *catalog.Snapshot), location: "here"}
		_, stop := run(t, s, kept, slog.New(slog.DiscardHandler))
		s.snaps <- snapshot(t, 7)
		stop()
	})
	for name, c := range map[string]struct {
		value    []byte
		location string
		want     uint64
		says     string
	}{
		"whole":                  {kept.value, "here", 7, ""},
		"of another agent":       {kept.value, "elsewhere", 0, "from consul here"},
		"half":                   {kept.value[:len(kept.value)/2], "here", 0, "decode the snapshot"},
		"of another version":     {[]byte("nodeproxy snapshot 99\n"), "here", 0, "another version"},
		"nothing":                {nil, "here", 0, ""},
		"not even the beginning": {[]byte{0, 0, 0}, "here", 0, "another version"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var said bytes.Buffer
				s, m := &source{snaps: make(chan *catalog.Snapshot), location: c.location}, &memory{value: c.value}
				_, stop := run(t, s, m, slog.New(slog.NewTextHandler(&said, nil)))
				stop()
				var got uint64
				if s.restored != nil {
					got = s.restored.Generation
				}
				if got != c.want || c.says == "" && said.Len() > 0 || !strings.Contains(said.String(), c.says) {
					t.Errorf("restored is %d, want %d; the log says %q", got, c.want, said.String())
				}
			})
		})
	}
}

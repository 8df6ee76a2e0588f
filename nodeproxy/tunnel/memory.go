package tunnel

import (
	"sync"
	"time"
)

// The bounds of Memory.
const (
	rememberFor   = time.Minute
	rememberIDs   = 1 << 16 // of one source, twice: the newest are always remembered
	rememberCount = 1 << 12 // sources; beyond it, new ones share one memory
)

// Memory remembers the ids of openings, for each source apart: for a minute at least, or until 65,536 newer ones of the
// same source have come, which is far beyond the time in which a client tries again.
type Memory[K comparable] struct {
	now func() time.Time

	mu      sync.Mutex
	sources map[K]*ids
	shared  *ids
}

// ids are two generations: what is in neither was not seen for a minute.
type ids struct {
	since       time.Time // when young was begun
	young, aged map[ID]struct{}
}

// NewMemory returns one that remembers nothing.
func NewMemory[K comparable]() *Memory[K] {
	return &Memory[K]{now: time.Now, sources: make(map[K]*ids)}
}

// Add remembers id. It returns false when it did already.
func (m *Memory[K]) Add(source K, id ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.of(source)
	if age := m.now().Sub(s.since); age >= rememberFor || len(s.young) >= rememberIDs {
		s.aged, s.young, s.since = s.young, make(map[ID]struct{}), m.now()
		if age >= 2*rememberFor {
			s.aged = nil
		}
	}
	_, young := s.young[id]
	_, aged := s.aged[id]
	if young || aged {
		return false
	}
	s.young[id] = struct{}{}
	return true
}

// Remove forgets id: what it opened came to nothing.
func (m *Memory[K]) Remove(source K, id ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.of(source)
	delete(s.young, id)
	delete(s.aged, id)
}

func (m *Memory[K]) of(source K) *ids {
	if s := m.sources[source]; s != nil {
		return s
	}
	if len(m.sources) >= rememberCount {
		m.sweep()
	}
	s := &ids{since: m.now(), young: make(map[ID]struct{})}
	if len(m.sources) < rememberCount {
		m.sources[source] = s
		return s
	}
	if m.shared == nil {
		m.shared = s
	}
	return m.shared
}

// Sweep frees what need not be remembered any more.
func (m *Memory[K]) Sweep() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep()
}

func (m *Memory[K]) sweep() {
	for source, s := range m.sources {
		if m.now().Sub(s.since) >= 2*rememberFor {
			delete(m.sources, source)
		}
	}
}

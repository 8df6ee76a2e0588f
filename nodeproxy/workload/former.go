package workload

import (
	"maps"
	"strings"
	"time"
)

// former is what was in force until a moment ago. Connections that had been redirected or steered by then, and are not accepted yet,
// are still carried: nobody else gets them.
type former struct {
	workloads map[uint32]formerWorkload
	served    map[servedKey]formerServed
}

type formerWorkload struct {
	*Workload
	callers []string
	until   time.Time
}

type formerServed struct {
	*served
	until time.Time
}

// retire adds to next what last had in force and next has not, for grace. Nothing is redirected or steered because of it.
func (f *former) retire(last, next *view) {
	now := time.Now()
	for id, w := range last.byID {
		if next.byID[id] == nil && f.workloads[id].Workload == nil {
			f.workloads[id] = formerWorkload{w, last.callers[id], now.Add(grace)}
		}
	}
	for key, s := range last.served {
		if next.served[key] == nil && len(s.Workloads) > 0 {
			f.served[key] = formerServed{s, now.Add(grace)}
		}
	}
	maps.DeleteFunc(f.workloads, func(_ uint32, w formerWorkload) bool { return now.After(w.until) })
	maps.DeleteFunc(f.served, func(key servedKey, s formerServed) bool { return now.After(s.until) || next.served[key] != nil })
	for id, w := range f.workloads {
		next.byID[id], next.callers[id] = w.Workload, w.callers
	}
	next.former = make(map[servedKey]*served, len(f.served))
	for key, s := range f.served {
		next.former[key] = s.served
	}
}

// leave detaches the hooks of workloads that were released before the last reconciliation: a connect that their hooks had
// redirected has reached its listener by now.
func (m *Manager) leave() {
	again := m.leaving[:0]
	for _, e := range m.leaving {
		if !e.left {
			e.left = true
			again = append(again, e)
			continue
		}
		if m.isClaimed(e.cgroup) {
			continue // again
		}
		if err := m.redirect.Unenroll(e.cgroup); err != nil {
			m.log.Error("un-enrolment left something behind; run `nodeproxy cleanup` once the daemon is stopped", "cgroup", e.Cgroup, "error", err)
		}
		m.log.Info("workload un-enrolled", "cgroup", e.Cgroup, "service", strings.Join(e.Services(), ","))
	}
	if m.leaving = again; len(again) > 0 {
		m.wake()
	}
}

func (m *Manager) isClaimed(cgroup uint64) bool {
	for _, e := range m.workloads {
		if e.cgroup == cgroup {
			return true
		}
	}
	return false
}

// index completes next, which is about to be what the data path reads.
func (m *Manager) index(next *view) {
	next.index(m.workloads)
	m.former.retire(m.view.Load(), next)
}

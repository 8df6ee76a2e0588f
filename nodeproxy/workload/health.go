package workload

import "time"

// Health is whether the datapath lives, and protects.
type Health struct {
	Beat        time.Time // when the kernel was last told that the daemon lives, as it remembers it
	Looked      time.Time // when the workloads were last looked at
	Known       bool      // a snapshot is in force, and every provider has spoken or says why it cannot
	Workloads   int
	Unprotected []WorkloadState
}

// Health is cheap enough to be asked for every second.
func (m *Manager) Health() Health {
	var h Health
	h.Beat, _ = m.redirect.Pulse()
	if looked := m.looked.Load(); looked != nil {
		h.Looked = *looked
	}
	select {
	case <-m.ready:
		h.Known = true
	default:
	}
	states := m.view.Load().states
	h.Workloads = len(states)
	for _, s := range states {
		if s.State == "unprotected" || s.State == "waiting" {
			h.Unprotected = append(h.Unprotected, s)
		}
	}
	return h
}

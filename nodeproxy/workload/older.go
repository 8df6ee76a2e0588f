package workload

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// older is what a workload had open when it was enrolled, and is to lose.
type older struct {
	due      time.Time
	accepted map[uint64]bool // cookies. What it dialled needs no list: what it dials from now on takes the mesh
	ended    int
}

// joined notes when e, which was just enrolled, came into the mesh: now, or, where an earlier daemon had enrolled it, when that did.
// The time for which its connections may go on counts from then.
func (m *Manager) joined(e *entry, now bool) {
	adopted := m.adopted[e.cgroup]
	delete(m.adopted, e.cgroup)
	at := time.Now()
	var err error
	switch {
	case now:
		err = m.redirect.SetJoined(e.cgroup, at)
	case adopted && m.cfg.Existing != nil && *m.cfg.Existing > 0:
		at, err = m.redirect.Joined(e.cgroup)
	default:
		return
	}
	if err != nil {
		m.log.Warn("the time for connections older than the enrolment starts anew when a daemon is restarted", "cgroup", e.Cgroup, "error", err)
	}
	m.noteOlder(e, at)
}

// noteOlder remembers what e has open past the mesh, which it joined at that time.
func (m *Manager) noteOlder(e *entry, joined time.Time) {
	if m.cfg.Existing == nil {
		return
	}
	o := &older{due: joined.Add(*m.cfg.Existing), accepted: make(map[uint64]bool)}
	m.older[e.cgroup] = o
	err := m.bypasses(e, func(_ *redirect.Namespace, b redirect.Bypass) error {
		if b.Accepted {
			o.accepted[b.Cookie] = true
		}
		return nil
	})
	if err != nil {
		m.warn(e.Cgroup, "connections older than the enrolment may go on", err, "service", e.Service)
	}
}

// endOlder resets what is due. It looks again in the next reconciliation, until there is nothing: a connect that was under
// way when the workload was switched on comes late.
func (m *Manager) endOlder(h Handler) {
	for _, e := range m.workloads {
		o := m.older[e.cgroup]
		if o == nil || !e.enrolled || time.Now().Before(o.due) {
			continue
		}
		if e.Mesh != Enabled { // it is only watched, or left alone, by now
			delete(m.older, e.cgroup)
			continue
		}
		found := 0
		err := m.bypasses(e, func(ns *redirect.Namespace, b redirect.Bypass) error {
			if b.Accepted && !o.accepted[b.Cookie] {
				return nil
			}
			found++
			if err := ns.Reset(b.Socket); err != nil {
				return err
			}
			h.Verdict(ended(m.view.Load().byID[e.ID], b))
			return nil
		})
		o.ended += found
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			m.warn(e.Cgroup, "connections older than the enrolment go on", err, "service", e.Service)
			delete(m.older, e.cgroup)
		case err != nil:
			m.warn(e.Cgroup, "connections older than the enrolment go on, until the next attempt", err, "service", e.Service)
		case found == 0:
			delete(m.older, e.cgroup)
		default:
			m.log.Info("connections older than the enrolment are reset", "cgroup", e.Cgroup, "service", e.Service, "connections", o.ended)
		}
	}
}

// ended tells of a connection of w that was reset.
func ended(w *Workload, b redirect.Bypass) KernelVerdict {
	v := KernelVerdict{Inbound: b.Accepted, Reason: catalog.ReasonExisting, Workload: w, Source: b.Local, Destination: b.Remote}
	if b.Accepted {
		v.Source, v.Destination = b.Remote, b.Local
	}
	return v
}

// bypasses calls f for each connection of e that goes past the mesh, until it returns an error.
func (m *Manager) bypasses(e *entry, f func(*redirect.Namespace, redirect.Bypass) error) error {
	for _, inode := range e.inodes {
		s := m.namespaces[inode]
		if s == nil {
			continue
		}
		found, err := s.Bypasses(e.ID, func(cgroup uint64) bool { return e.subtree[cgroup] })
		if err != nil {
			return err
		}
		for _, b := range found {
			if err := f(s.Namespace, b); err != nil {
				return err
			}
		}
	}
	return nil
}

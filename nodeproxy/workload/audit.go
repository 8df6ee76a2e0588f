package workload

import (
	"cmp"
	"fmt"
	"time"
)

const (
	auditEvery    = 2 * time.Second // how long what somebody else detached may go unseen
	auditMapsEach = 5               // of so many audits one looks into the maps too
)

// drifts is what the last audit could not repair.
type drifts struct {
	at         time.Time
	audits     int
	cgroups    map[uint64]error        // by id
	namespaces map[uint64]error        // by cookie
	foreign    map[uint64]foreignRules // by cgroup id
	shared     error
}

// audit compares, every few seconds, what the kernel has of ours with what it should have, and looks for what others have added. What cannot be repaired is a
// problem of the workloads that it concerns, until an audit finds it in order.
func (m *Manager) audit() {
	if time.Since(m.drifted.at) >= auditEvery {
		m.lookForDrift()
	}
	for _, e := range m.workloads {
		if !e.enrolled {
			continue
		}
		e.foreign = m.drifted.foreign[e.cgroup]
		if e.problem == nil {
			e.problem = cmp.Or(m.drifted.of(e, m.namespaces), e.disputed())
		}
	}
}

func (m *Manager) lookForDrift() {
	last := m.drifted
	m.drifted = drifts{at: time.Now(), audits: last.audits + 1, cgroups: make(map[uint64]error), namespaces: make(map[uint64]error)}
	m.drifted.foreign = m.auditForeign(last.foreign)
	for _, d := range m.redirect.Audit(last.audits%auditMapsEach == 0) {
		if d.Err == nil {
			m.repairs.Add(1)
			m.log.Warn("somebody else changed what nodeproxy has in the kernel; it is repaired", "what", d.What, "cgroup", d.Cgroup, "netns", d.Namespace)
			continue
		}
		err := fmt.Errorf("%s, by somebody else, and cannot be repaired: %w", d.What, d.Err)
		if known := last.find(d.Cgroup, d.Namespace); known == nil || known.Error() != err.Error() {
			m.log.Error("somebody else changed what nodeproxy has in the kernel", "what", d.What, "cgroup", d.Cgroup, "netns", d.Namespace, "error", d.Err)
		}
		switch {
		case d.Cgroup != 0:
			m.drifted.cgroups[d.Cgroup] = err
		case d.Namespace != 0:
			m.drifted.namespaces[d.Namespace] = err
		default:
			m.drifted.shared = err
		}
	}
}

func (d *drifts) find(cgroup, namespace uint64) error {
	switch {
	case cgroup != 0:
		return d.cgroups[cgroup]
	case namespace != 0:
		return d.namespaces[namespace]
	}
	return d.shared
}

// of says what is wrong with what protects e.
func (d *drifts) of(e *entry, namespaces map[uint64]*space) error {
	if err := d.cgroups[e.cgroup]; err != nil {
		return err
	}
	for _, inode := range e.inodes {
		if s := namespaces[inode]; s != nil && d.namespaces[s.Cookie] != nil {
			return d.namespaces[s.Cookie]
		}
	}
	return d.shared
}

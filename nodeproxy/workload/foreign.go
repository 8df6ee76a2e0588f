package workload

import (
	"errors"
	"fmt"

	"nodeproxy.io/redirect"
)

// foreignRules is what a look at the namespaces of one workload found.
type foreignRules struct {
	rule  redirect.ForeignRule
	inode uint64 // of the namespace that has it
	err   error  // why there may be others
}

func (f foreignRules) found() bool { return f.rule != (redirect.ForeignRule{}) }

func (m *Manager) lookForForeign(e *entry) (f foreignRules) {
	for _, inode := range e.inodes {
		s := m.namespaces[inode]
		if s == nil {
			continue
		}
		rule, err := s.ForeignRedirect()
		if rule != (redirect.ForeignRule{}) {
			return foreignRules{rule: rule, inode: inode}
		}
		f.err = errors.Join(f.err, err)
	}
	return f
}

// foreignRedirect says whose rules redirect what e sends already: two proxies must not have one workload.
func (m *Manager) foreignRedirect(e *entry) error {
	e.foreign = m.lookForForeign(e)
	if e.foreign.err != nil {
		m.warn(e.Cgroup, "whether another proxy has the workload is not known", e.foreign.err, "service", e.Service)
	}
	if !e.foreign.found() {
		return nil
	}
	return fmt.Errorf("another proxy's rules redirect its connections (%s, in network namespace %d): remove them, and the workload is enrolled", e.foreign.rule.Where, e.foreign.inode)
}

// auditForeign looks for rules that were set since their workloads were enrolled. Those stay enrolled: without the mesh,
// what they send would be plaintext on the wire, and their ports open.
func (m *Manager) auditForeign(last map[uint64]foreignRules) map[uint64]foreignRules {
	found := make(map[uint64]foreignRules)
	for _, e := range m.workloads {
		if !e.enrolled || e.Mesh != Enabled {
			continue
		}
		now, before := m.lookForForeign(e), last[e.cgroup]
		found[e.cgroup] = now
		switch {
		case now.found() && now.rule != before.rule:
			m.log.Error("another proxy's rules redirect what an enrolled workload sends", "cgroup", e.Cgroup, "service", e.Service, "rule", now.rule.Where, "netns", now.inode)
		case !now.found() && before.found():
			m.log.Info("no other proxy's rules redirect what the workload sends any more", "cgroup", e.Cgroup, "service", e.Service)
		}
		if now.err != nil && before.err == nil {
			m.log.Warn("whether another proxy has the workload is not known", "cgroup", e.Cgroup, "service", e.Service, "error", now.err)
		}
	}
	return found
}

// disputed says that what e sends may go to another proxy although it is enrolled.
func (e *entry) disputed() error {
	if !e.enrolled || !e.foreign.found() {
		return nil
	}
	return fmt.Errorf("another proxy's rules redirect its connections (%s, in network namespace %d), set since it was enrolled: it stays so, but what it and nodeproxy send from there may go to that proxy: remove them, or un-enroll it", e.foreign.rule.Where, e.foreign.inode)
}

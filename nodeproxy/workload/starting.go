package workload

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// startsWithin is how long a network namespace without a process is taken for one of its workload after it was last asked for.
const startsWithin = time.Minute

// starting is a network namespace of a workload in which there may be no process yet.
type starting struct {
	cgroup string
	file   *os.File
	asked  time.Time
	err    error // why it is not protected
}

// Start has a network namespace guarded for the workload of a cgroup, before there is any process in it, and says why what starts there is not protected
// yet; nil: it is. It does not wait, and is called again until it is. It takes ownership of the file.
func (m *Manager) Start(cgroup string, namespace *os.File) error {
	inode, err := inodeOf(namespace)
	if err != nil {
		return errors.Join(err, namespace.Close())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.starting[inode]; s != nil && s.cgroup == cgroup {
		s.asked = time.Now()
		return errors.Join(s.err, namespace.Close())
	}
	m.forgetStart(inode)
	s := &starting{cgroup, namespace, time.Now(), errors.New("it has not been looked at yet")}
	m.starting[inode] = s
	m.wake()
	return s.err
}

// Stop says that there will be no process any more in a network namespace: what listens there must not keep it.
func (m *Manager) Stop(namespace *os.File) error {
	inode, err := inodeOf(namespace)
	if err := errors.Join(err, namespace.Close()); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetStart(inode)
	m.over[inode] = true
	m.wake()
	return nil
}

func inodeOf(namespace *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(namespace.Fd()), &st); err != nil {
		return 0, fmt.Errorf("look at a network namespace: %w", err)
	}
	return st.Ino, nil
}

// forgetStart is for who holds mu.
func (m *Manager) forgetStart(inode uint64) {
	if s := m.starting[inode]; s != nil {
		_ = s.file.Close()
		delete(m.starting, inode)
	}
}

// lookAtStops takes up what Stop has said.
func (m *Manager) lookAtStops() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.going, m.over = m.over, make(map[uint64]bool)
}

// scanStarting finds the namespaces of e in which its processes are about to start, and takes those from it that are over.
func (m *Manager) scanStarting(e *entry, processes []uint64) []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := make(map[uint64]bool)
	for _, inode := range processes {
		seen[inode] = true
	}
	var all []uint64
	for _, inode := range e.inodes {
		if !m.going[inode] || seen[inode] {
			all = append(all, inode)
		}
	}
	for inode, s := range m.starting {
		if s.cgroup != e.Cgroup || e.Mesh == Disabled {
			continue
		}
		all = append(all, inode)
		if _, open := m.namespaces[inode]; !open {
			m.findNamespace(e, inode, fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()))
		}
	}
	return all
}

// settleStarting says who may start by now.
func (m *Manager) settleStarting() {
	m.mu.Lock()
	starts := make(map[uint64]string)
	for inode, s := range m.starting {
		if time.Since(s.asked) > startsWithin {
			m.forgetStart(inode)
			continue
		}
		starts[inode] = s.cgroup
	}
	m.mu.Unlock()
	verdicts := make(map[uint64]error)
	for inode, cgroup := range starts {
		verdicts[inode] = m.startable(cgroup, inode)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for inode, err := range verdicts {
		if s := m.starting[inode]; s != nil {
			s.err = err
		}
	}
}

// startable says why what would start now in a namespace of a workload is not protected.
func (m *Manager) startable(cgroup string, inode uint64) error {
	e := m.workloads[cgroup]
	switch {
	case e == nil:
		return errors.New("it is not claimed yet")
	case e.problem != nil:
		return e.problem
	case !e.enrolled && len(e.uncertified) > 0:
		return fmt.Errorf("there is no certificate for service %q yet: \"nodeproxy status\" has the control plane's error", strings.Join(e.uncertified, ","))
	case !e.enrolled:
		return errors.New("it is not enrolled yet")
	case m.namespaces[inode] == nil:
		return errors.New("there is no listener in its network namespace yet: see the daemon's log")
	}
	return m.shortfall(e)
}

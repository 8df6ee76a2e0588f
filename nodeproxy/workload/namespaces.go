package workload

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// openNamespace listens in the namespace of a process, the nth of its workload, unless the process has left it meanwhile.
// A workload that makes ever more namespaces has its own connections refused, not the node's.
func (m *Manager) openNamespace(e *entry, pid string, nth int) {
	if nth > maxNamespaces {
		m.warn(e.Cgroup, "workload is unprotected", fmt.Errorf("its processes are in more than %d network namespaces: enroll cgroups further below instead", maxNamespaces), "service", e.Service)
		return
	}
	if err := m.listenIn("/proc/" + pid + "/ns/net"); err != nil {
		m.missed = true
		m.warn(e.Cgroup, "workload is unprotected", err, "service", e.Service)
	}
}

// listenIn opens the namespace at a path, unless it is open or gone.
func (m *Manager) listenIn(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || m.namespaces[st.Ino] != nil {
		f.Close()
		return nil // the process has moved to one we know
	}
	ns, err := m.redirect.OpenNamespace(f)
	if err != nil {
		return err
	}
	s := &space{used: time.Now(), Namespace: ns, public: &Namespace{Cookie: ns.Cookie, Inode: ns.Inode, Host: ns.Host}}
	m.namespaces[ns.Inode] = s
	m.serve(ns, s.public)
	m.log.Debug("listening in network namespace", "inode", ns.Inode, "host", ns.Host)
	return nil
}

// openHost listens in the node's own namespace if its ports lead to a workload: peers connect there.
func (m *Manager) openHost() {
	if m.hostSpace() != nil {
		return
	}
	for _, e := range m.workloads {
		if len(e.claim.Mapped) == 0 || e.Mesh == Disabled {
			continue
		}
		if err := m.listenIn("/proc/thread-self/ns/net"); err != nil {
			m.missed = true
			m.warn(e.Cgroup, "workload is not reached at its published ports", err, "service", e.Service)
		}
		return
	}
}

// hostSpace is the node's own namespace, nil while it is not open.
func (m *Manager) hostSpace() *space {
	for _, s := range m.namespaces {
		if s.Host {
			return s
		}
	}
	return nil
}

// watchNamespaces reads the addresses of the open namespaces and notes which of them are in use.
func (m *Manager) watchNamespaces() {
	used := make(map[uint64]bool)
	for _, e := range m.workloads {
		for _, inode := range e.inodes {
			used[inode] = true
		}
	}
	for inode, s := range m.namespaces {
		if used[inode] || s.Host && len(m.workloads) > 0 {
			s.used = time.Now()
		}
		addrs, err := s.Addresses()
		if err != nil {
			m.log.Error("cannot see a network namespace's addresses; keeping the last", "inode", inode, "error", err)
			continue
		}
		if !slices.Equal(addrs, s.addrs) {
			changed := *s // the data path reads the other one
			changed.addrs = addrs
			m.namespaces[inode] = &changed
		}
	}
}

func (m *Manager) closeNamespaces() {
	for inode, s := range m.namespaces {
		if time.Since(s.used) < grace {
			continue
		}
		delete(m.namespaces, inode)
		if err := s.Close(); err != nil {
			m.log.Error("closing a network namespace left something behind", "inode", inode, "error", err)
		}
	}
}

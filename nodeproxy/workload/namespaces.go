package workload

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
)

// foundNamespace is one that is not open, with where it was found, which may stand for another one by now.
type foundNamespace struct {
	entry *entry // of the first process
	paths []string

	opened *redirect.Namespace
	err    error
}

// findNamespace notes a namespace, to be opened. A workload that makes ever more namespaces has its own
// connections refused, not the node's.
func (m *Manager) findNamespace(e *entry, inode uint64, path string) {
	if nth := len(slices.Compact(slices.Sorted(slices.Values(e.inodes)))); nth > maxNamespaces {
		m.warn(e.Cgroup, "workload is unprotected", fmt.Errorf("its processes are in more than %d network namespaces: enroll cgroups further below instead", maxNamespaces), "service", e.Service)
		return
	}
	found := m.found[inode]
	if found == nil {
		found = &foundNamespace{entry: e}
		m.found[inode] = found
	}
	found.paths = append(found.paths, path)
}

// openNamespaces listens in the namespaces that were found, in several at a time: the kernel verifies a program for each.
func (m *Manager) openNamespaces() {
	var opening sync.WaitGroup
	turns := make(chan struct{}, runtime.GOMAXPROCS(0))
	for inode, found := range m.found {
		turns <- struct{}{}
		opening.Go(func() {
			found.opened, found.err = m.openNamespace(inode, found.paths)
			<-turns
		})
	}
	opening.Wait()
	for _, found := range m.found {
		switch ns := found.opened; {
		case found.err != nil:
			m.missed = true
			m.warn(found.entry.Cgroup, "workload is unprotected", found.err, "service", found.entry.Service)
		case ns != nil:
			m.listenIn(ns)
		}
	}
	clear(m.found)
}

// openNamespace opens the namespace by the first of paths that stands for it still; nil: none does.
func (m *Manager) openNamespace(inode uint64, paths []string) (ns *redirect.Namespace, err error) {
	for _, path := range paths {
		ns, err = m.openAt(path, func(now uint64) bool { return now == inode })
		if ns != nil || err != nil {
			break
		}
	}
	return ns, err
}

// openAt opens the namespace at a path, nil if that is gone or not wanted.
func (m *Manager) openAt(path string, wanted func(inode uint64) bool) (ns *redirect.Namespace, err error) {
	f, err := os.Open(path)
	if err != nil {
		return ns, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || !wanted(st.Ino) {
		f.Close()
		return ns, nil
	}
	return m.redirect.OpenNamespace(f)
}

// listenIn has the connections that arrive in a namespace served.
func (m *Manager) listenIn(ns *redirect.Namespace) {
	s := &space{used: time.Now(), heard: new(listening), Namespace: ns, public: &Namespace{Cookie: ns.Cookie, Inode: ns.Inode, Host: ns.Host}}
	m.namespaces[ns.Inode] = s
	m.begin(func() { m.serve(ns, s.public) })
	m.log.Debug("listening in network namespace", "inode", ns.Inode, "host", ns.Host)
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
		ns, err := m.openAt("/proc/thread-self/ns/net", func(inode uint64) bool { return m.namespaces[inode] == nil })
		switch {
		case err != nil:
			m.missed = true
			m.warn(e.Cgroup, "workload is not reached at its published ports", err, "service", e.Service)
		case ns != nil:
			m.listenIn(ns)
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

// isOver says whether a namespace is about to go, and no workload's any more.
func (m *Manager) isOver(inode uint64) bool {
	for _, e := range m.workloads {
		if slices.Contains(e.inodes, inode) {
			return false
		}
	}
	return m.going[inode]
}

func (m *Manager) closeNamespaces() {
	for inode, s := range m.namespaces {
		if time.Since(s.used) < grace && !m.isOver(inode) {
			continue
		}
		delete(m.namespaces, inode)
		if err := s.Close(); err != nil {
			m.log.Error("closing a network namespace left something behind", "inode", inode, "error", err)
		}
	}
}

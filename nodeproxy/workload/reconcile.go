package workload

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
)

// crowd is how many workloads are enrolled without a look at what else is claimed.
const crowd = 16

// reconcile compares what should be with what is, once, and repairs it. Order matters: listeners exist before anything is
// redirected to them, guards and ids before a workload is switched on.
func (m *Manager) reconcile(h Handler) {
	m.missed = false
	m.unheard = m.silent() // before claims are read: what is said meanwhile counts from the next reconciliation on
	known := m.complete()
	m.findProbers()
	m.follow()
	m.lookAtStops()
	for _, e := range m.workloads {
		m.scan(e)
	}
	m.openNamespaces()
	m.openHost()
	m.watchHost()
	m.watchNamespaces()
	m.openDNS()
	next, last := m.assign(), m.view.Load()
	m.noteEndings()
	next.states, next.refused, next.problems = last.states, last.refused, last.problems // shown until there are newer ones
	if known {
		m.protect(next, h)
	} else {
		m.index(next) // an earlier daemon's guards stay as they are until we know better
	}
	m.leave()
	m.closeNamespaces()
	m.audit()
	m.settleStarting()
	shown := *next
	shown.states, shown.refused, shown.problems = m.states(), slices.Clone(m.refused), m.probers.problems
	m.view.Store(&shown)
	if known && m.certified(next) || m.waited() {
		m.settle()
	}
	if known {
		m.once.Do(func() { close(m.ready) })
		m.settleDirect(h)
	}
}

// waited says whether what waits since the daemon before died has waited long enough.
func (m *Manager) waited() bool {
	return m.inherited != nil && !m.cfg.Before.Runs && time.Since(m.began) > waiting
}

// certified says whether the certificates of all workloads are there that were enrolled before: a daemon that is dead leaves none.
func (m *Manager) certified(v *view) bool {
	if m.inherited == nil || m.cfg.Before.Runs {
		return true
	}
	for _, e := range m.workloads {
		if e.enrolled && e.Mesh == Enabled && slices.ContainsFunc(e.Services(), func(service string) bool { return !v.hasLeaf(service) }) {
			return false
		}
	}
	return true
}

// complete reports whether a snapshot is there and every provider has spoken, or says why it cannot. While a daemon before serves
// nobody waits for the others, and what a provider is about to claim is served by that one: such a provider has hesitation to recover.
func (m *Manager) complete() bool {
	unheard := maps.Clone(m.unheard)
	if m.inherited == nil || !m.cfg.Before.Runs || time.Since(m.began) > hesitation {
		for _, p := range m.problems() {
			delete(unheard, p.Provider)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snap != nil && len(unheard) == 0
}

// silent names the providers that have claimed nothing yet, not even that there is nothing: what an earlier daemon enrolled
// may be theirs.
func (m *Manager) silent() map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	silent := make(map[string]bool)
	for _, p := range m.cfg.Providers {
		if _, spoke := m.claims[p.Name()]; !spoke {
			silent[p.Name()] = true
		}
	}
	return silent
}

// protect guards and switches on what is ready to be, and removes what an earlier daemon enrolled and nobody claims.
func (m *Manager) protect(next *view, h Handler) {
	ready := m.enrollable(next)
	for _, e := range ready {
		if e.ID != 0 {
			continue // it stays what it is
		}
		id, err := m.redirect.NewWorkload(m.group(&e.Workload))
		if err != nil {
			e.problem = err
		}
		e.ID = id
	}
	m.index(next)
	m.view.Store(next)
	if m.unguarded = m.redirect.SetRules(m.rules(next, ready)); m.unguarded != nil {
		m.log.Error("inbound rules are incomplete", "error", m.unguarded)
		ready = m.refuseUnguarded(ready)
	}
	m.reach(next, ready)
	m.admitProbers(next, ready)
	for i, e := range ready {
		if i%crowd == 0 { // what is claimed meanwhile gets its certificates meanwhile
			m.tellNeeds(h)
		}
		m.enroll(e)
	}
	m.settleNesting()
	m.syncSockets(next)
	m.endOlder(h)
	m.steerDNS()
	m.prune()
	m.retryRoutes()
	m.grantDirect(next)
}

// refuseUnguarded takes those out of ready whose inbound rules have no room: they are not enrolled before they have. The rules that
// are in force stay.
func (m *Manager) refuseUnguarded(ready []*entry) []*entry {
	return slices.DeleteFunc(ready, func(e *entry) bool {
		if e.ID == 0 || !m.isUnguarded(e) {
			return false
		}
		e.problem = fmt.Errorf("not enrolled, because its ports cannot be guarded: %w", m.unguarded)
		if err := m.redirect.Forget(e.ID); err != nil {
			e.problem = errors.Join(e.problem, err)
		}
		e.ID = 0
		m.warn(e.Cgroup, "workload is unprotected", e.problem, "service", e.Service)
		return true
	})
}

func (m *Manager) isUnguarded(e *entry) bool {
	missing, ok := errors.AsType[*redirect.Unguarded](m.unguarded)
	return ok && missing.Workloads[e.ID]
}

// scan finds the processes of a workload, the network namespaces they are in, and the ids of the cgroups below.
func (m *Manager) scan(e *entry) {
	last := e.inodes
	e.processes, e.inodes, e.subtree, e.foreign = 0, nil, make(map[uint64]bool), foreignRules{}
	err := filepath.WalkDir(e.Cgroup, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return skipGone(err)
		}
		if !d.IsDir() {
			return nil
		}
		if path != e.Cgroup && m.workloads[path] != nil {
			return fs.SkipDir // an inner workload's processes and listeners are its own
		}
		id, err := redirect.CgroupID(path)
		if err != nil {
			return skipGone(err)
		}
		e.subtree[id] = true
		return m.scanProcesses(e, path)
	})
	if err == nil && e.claim.Sockets && e.cgroup != 0 && e.Mesh != Disabled {
		_, err = m.noteNamespace(e, "thread-self")
	}
	e.problem = err
	found := e.inodes
	if len(e.inodes) == 0 {
		e.inodes = last // an application that restarts must not find its port open to strangers
	}
	e.inodes = m.scanStarting(e, found)
	slices.Sort(e.inodes)
	e.inodes = slices.Compact(e.inodes)
}

func skipGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func (m *Manager) scanProcesses(e *entry, dir string) error {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a threaded cgroup: its processes are listed at the domain above
		}
		return skipGone(err)
	}
	for line := range strings.Lines(string(procs)) {
		alive, err := m.noteNamespace(e, strings.TrimSpace(line))
		if err != nil {
			return err
		}
		if alive {
			e.processes++
		}
	}
	return nil
}

// noteNamespace notes the network namespace of a process as one of e's. It reports false if the process has ended.
func (m *Manager) noteNamespace(e *entry, pid string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+pid+"/ns/net", &st); errors.Is(err, fs.ErrPermission) {
		return false, fmt.Errorf("look at the network namespace of process %s: %w: see that no security module denies it", pid, err)
	} else if err != nil {
		return false, nil
	}
	if e.Mesh == Disabled {
		return true, nil
	}
	e.inodes = append(e.inodes, st.Ino)
	if _, open := m.namespaces[st.Ino]; !open {
		m.findNamespace(e, st.Ino, "/proc/"+pid+"/ns/net")
	}
	return true, nil
}

// enrollable lists the workloads to switch on now: the cgroup is there and so are the certificates, unless an earlier
// daemon had enrolled it already, which must never lapse.
func (m *Manager) enrollable(v *view) []*entry {
	pinned := make(map[uint64]uint32)
	for _, e := range m.redirect.Enrolled() {
		pinned[e.Cgroup] = e.Workload
	}
	var ready []*entry
	for _, e := range m.workloads {
		if e.enrolled || e.cgroup == 0 || e.problem != nil {
			continue
		}
		id, left := pinned[e.cgroup]
		if left {
			m.direct.remember(id, owner{e.Service, e.Cgroup})
			e.ID = m.sameWorkload(e, id)
		}
		e.uncertified = slices.DeleteFunc(e.Services(), v.hasLeaf)
		if !left && e.Mesh == Enabled {
			if len(e.uncertified) > 0 {
				continue
			}
			if e.problem = m.foreignRedirect(e); e.problem != nil {
				m.warn(e.Cgroup, "workload is not enrolled", e.problem, "service", e.Service)
				continue
			}
		}
		ready = append(ready, e)
	}
	// The inner ones first: what is taken out of a workload must not be redirected with it for a moment.
	slices.SortFunc(ready, func(a, b *entry) int { return strings.Compare(b.Cgroup, a.Cgroup) })
	return ready
}

func (m *Manager) enroll(e *entry) {
	if e.ID == 0 {
		return
	}
	e.enrolled = true // counts in the nesting of the others already
	nesting := m.settleNesting()
	joins := e.Mesh == Enabled && !m.redirect.Redirects(e.cgroup)
	err := m.redirect.Treat(e.ID, e.treatment())
	if err == nil {
		err = m.redirect.Enroll(e.Cgroup, e.ID, nesting[e.Cgroup])
	}
	if err != nil {
		e.enrolled, e.problem, e.ID = false, err, 0
		m.warn(e.Cgroup, "workload is unprotected", err, "service", e.Service)
		return
	}
	m.forgetWarnings(e.Cgroup)
	m.log.Info("workload enrolled", "cgroup", e.Cgroup, "service", strings.Join(e.Services(), ","), "mesh", e.Mesh.String(), "mode", e.Mode.String(), "provider", e.Provider)
	m.joined(e, joins)
}

// treatment is what the kernel does differently for e than for others.
func (e *entry) treatment() redirect.Treatment {
	if e.Mesh == Disabled {
		return redirect.Untreated()
	}
	x := e.claim.Exclude
	return redirect.Treatment{Ports: x.OutboundPorts, Networks: x.OutboundNetworks, Observe: e.Mesh == Observe}
}

// settleNesting tells every enrolled cgroup what is enrolled around it, and returns that.
func (m *Manager) settleNesting() map[string]redirect.Nesting {
	all := m.nesting()
	for _, e := range m.workloads {
		if !e.enrolled {
			continue
		}
		if err := m.redirect.SetNesting(e.cgroup, all[e.Cgroup]); err != nil {
			m.log.Error("nested workloads may be taken for each other", "cgroup", e.Cgroup, "error", err)
		}
	}
	return all
}

// nesting says of each enrolled cgroup what is enrolled around it.
func (m *Manager) nesting() map[string]redirect.Nesting {
	all := make(map[string]redirect.Nesting)
	for _, e := range slices.AppendSeq(slices.Clone(m.leaving), maps.Values(m.workloads)) {
		if e.enrolled {
			all[e.Cgroup] = redirect.Nesting{}
		}
	}
	for path := range all {
		for dir := filepath.Dir(path); len(dir) > 1; dir = filepath.Dir(dir) {
			outer, enrolled := all[dir]
			if !enrolled {
				continue
			}
			inner := all[path]
			inner.Outer, outer.Inner = true, true
			all[path], all[dir] = inner, outer
		}
	}
	return all
}

// prune removes, once, what an earlier daemon enrolled and nobody claims any more. While a namespace cannot be opened or a
// provider is silent the earlier daemon's guards stay: one of them may be theirs.
func (m *Manager) prune() {
	if m.pruned || m.missed || len(m.unheard) > 0 {
		return
	}
	claimed := make(map[uint64]bool)
	for _, e := range m.workloads {
		claimed[e.cgroup] = true
	}
	for cgroup := range invalidClaims(m.refused) {
		if id, err := redirect.CgroupID(cgroup); err == nil {
			claimed[id] = true
		}
	}
	if err := m.redirect.Prune(func(cgroup uint64) bool { return claimed[cgroup] }); err != nil {
		m.log.Error("removing what an earlier daemon left", "error", err)
		return
	}
	m.pruned = true
}

// warn logs a problem of a cgroup once, until the workload was enrolled or released.
func (m *Manager) warn(cgroup, msg string, err error, args ...any) {
	w := warning{cgroup, err.Error()}
	if m.warned[w] {
		return
	}
	m.warned[w] = true
	m.log.Warn(msg, append(args, "cgroup", cgroup, "error", err)...)
}

func (m *Manager) forgetWarnings(cgroup string) {
	maps.DeleteFunc(m.warned, func(w warning, _ bool) bool { return w.cgroup == cgroup })
}

// group is the kernel's number of the workloads that have the services of w, for as long as this daemon runs.
func (m *Manager) group(w *Workload) uint32 {
	services := strings.Join(w.Services(), ",")
	if m.groups[services] == 0 {
		m.groups[services] = uint32(len(m.groups) + 1)
	}
	return m.groups[services]
}

func (m *Manager) states() []WorkloadState {
	states := make([]WorkloadState, 0, len(m.workloads))
	for _, e := range m.workloads {
		w := e.Workload
		s := WorkloadState{Workload: &w, Processes: e.processes, Instances: e.instances}
		for _, inode := range e.inodes {
			if ns := m.namespaces[inode]; ns != nil {
				s.Namespaces = append(s.Namespaces, ns.public)
			}
		}
		s.State, s.Detail = e.state(len(s.Namespaces))
		s.Foreign = e.foreign.rule.Kind
		if err := m.shortfall(e); err != nil && s.State == "protected" {
			s.State, s.Detail = "unprotected", err.Error()
		}
		s.DNS = m.dnsState(e)
		states = append(states, s)
	}
	for _, e := range m.leaving {
		if w := e.Workload; !m.isClaimed(e.cgroup) {
			states = append(states, WorkloadState{Workload: &w, State: "leaving", Detail: "its hooks are about to be detached", Processes: e.processes})
		}
	}
	slices.SortFunc(states, func(a, b WorkloadState) int { return strings.Compare(a.Workload.Cgroup, b.Workload.Cgroup) })
	return states
}

// shortfall says for which protection of e the kernel has no room.
func (m *Manager) shortfall(e *entry) error {
	if m.isUnguarded(e) {
		return fmt.Errorf("ports of it may be open to strangers: %w", m.unguarded)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(m.passed, m.unreached); err != nil {
		return fmt.Errorf("it may reach instances outside the mesh: %w", err)
	}
	return nil
}

func (e *entry) state(open int) (state, detail string) {
	switch {
	case e.cgroup == 0:
		return "empty", "the cgroup does not exist yet"
	case e.problem != nil:
		return "unprotected", e.problem.Error()
	case e.enrolled && e.Mesh == Disabled:
		return "disabled", ""
	case !e.enrolled:
		return "waiting", fmt.Sprintf("no certificate for service %q yet: see the control plane's error below", strings.Join(e.uncertified, ","))
	case open < len(e.inodes):
		return "unprotected", "no listener in " + strconv.Itoa(len(e.inodes)-open) + " of its network namespaces: see the daemon's log"
	case e.processes == 0 && !e.claim.Sockets:
		return "empty", "no process in it"
	}
	var remarks []string
	if len(e.misplaced) > 0 {
		remarks = append(remarks, "not served from here: "+strings.Join(e.misplaced, "; "))
	}
	if e.foreign.err != nil {
		remarks = append(remarks, "whether another proxy's rules redirect its connections is not known: "+e.foreign.err.Error())
	}
	detail = strings.Join(append(remarks, e.contested...), "; ")
	if e.Mesh == Observe {
		return "observed", detail
	}
	return "protected", detail
}

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Drift is something in the kernel that was not as this package left it: somebody else changed it.
type Drift struct {
	Cgroup    uint64 // id of the enrolled cgroup that it concerns; 0: it is not one cgroup's
	Namespace uint64 // cookie of the namespace that it concerns; 0: it is not one namespace's
	What      string
	Err       error // nil: it is repaired
}

// Audit compares what should be attached and pinned with what is, and repairs it. With maps it compares the contents of the
// maps that the daemon writes, too, which takes a system call for each entry.
func (r *Redirect) Audit(maps bool) []Drift {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := audit{r: r}
	a.link(&r.own, hook{daemonPin, ebpf.AttachCGroupSockOps, r.obj.ProxySockops}, r.cgroup, r.dir)
	a.guard()
	for id, l := range r.former {
		if linkedCgroup(l) != 0 {
			a.pin(&l, "the link of an earlier daemon", filepath.Join(r.dir, formerDir, strconv.FormatUint(id, 10)))
			a.program(l, "the link of an earlier daemon", r.obj.ProxySockops)
			r.former[id] = l
		}
	}
	for _, err := range r.dropFormer() {
		if err != nil {
			a.repair("the link of an earlier daemon is of no use any more", func() error { return err })
		}
	}
	for id, e := range r.enrolled {
		if now, err := CgroupID(e.cgroup); err == nil && now == id { // else it is gone, or an earlier daemon's
			a.Drift = Drift{Cgroup: id}
			a.enrolment(e)
		}
	}
	for cookie, ns := range r.namespaces {
		a.Drift = Drift{Namespace: cookie}
		a.namespace(ns)
	}
	a.Drift = Drift{}
	if maps {
		auditMap(&a, "destinations", r.obj.Destinations, r.dests, r.single)
		auditMap(&a, "virtual_ranges", r.obj.VirtualRanges, r.ranges, r.outside)
		auditMap(&a, "plaintext_from", r.obj.PlaintextFrom, r.plaintext)
		auditMap(&a, "rules", r.obj.Rules, r.rules)
		auditMap(&a, "exclusions", r.obj.Exclusions, r.exclusions)
		auditMap(&a, "grants", r.obj.Grants, r.grants)
		auditMap(&a, "probes", r.obj.Probes, r.probes)
		auditMap(&a, "mapped_probes", r.obj.MappedProbes, r.mappedProbes)
	}
	return a.found
}

// audit is one Audit. The embedded Drift says what is looked at now.
type audit struct {
	Drift
	r     *Redirect
	found []Drift
}

// repair notes a difference, and what came of repairing it.
func (a *audit) repair(what string, repair func() error) {
	d := a.Drift
	d.What, d.Err = what, repair()
	a.found = append(a.found, d)
}

func (a *audit) enrolment(e *enrolment) {
	r, id := a.r, a.Cgroup
	for i, h := range r.hooks() {
		a.link(&e.links[i], h, e.cgroup, e.dir)
	}
	var m outboundMembership
	want := outboundMembership{Workload: e.workload, Flags: e.flags}
	if err := r.obj.Memberships.Lookup(id, &m); err != nil || m != want {
		a.repair("the cgroup was another workload", func() error { return r.obj.Memberships.Put(id, want) })
	}
	var w outboundWorkload
	if r.obj.Workloads.Lookup(e.workload, &w) != nil || w.Group != e.group {
		a.repair("the workload was unknown to the kernel", func() error { return r.obj.Workloads.Put(e.workload, outboundWorkload{Group: e.group}) })
	}
}

// link makes sure that *l is attached to a cgroup, runs h and is pinned in dir.
func (a *audit) link(l *link.Link, h hook, cgroup, dir string) {
	pin := filepath.Join(dir, h.name)
	if linkedCgroup(*l) == 0 {
		a.repair(h.name+" was detached", func() error {
			return replaceLink(l, pin, func() (link.Link, error) {
				return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.at, Program: h.prog})
			})
		})
		return
	}
	a.pin(l, h.name, pin)
	a.program(*l, h.name, h.prog)
}

// program makes sure that a link runs prog.
func (a *audit) program(l link.Link, name string, prog *ebpf.Program) {
	info, err := l.Info()
	if err != nil {
		return
	}
	want, err := a.r.programID(prog)
	if err != nil {
		return
	}
	if want != info.Program {
		a.repair(name+" was replaced", func() error { return l.Update(prog) })
	}
}

// programID is the kernel's number of a program of ours, for which the kernel is asked once. The caller holds r.mu.
func (r *Redirect) programID(prog *ebpf.Program) (ebpf.ProgramID, error) {
	if id, known := r.programs[prog]; known {
		return id, nil
	}
	info, err := prog.Info()
	if err != nil {
		return 0, err
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("the kernel does not number programs")
	}
	r.programs[prog] = id
	return id, nil
}

// pin makes sure that a link in force is pinned, so that it outlives this process.
func (a *audit) pin(l *link.Link, name, pin string) {
	if _, err := os.Lstat(pin); !errors.Is(err, fs.ErrNotExist) {
		return
	}
	a.repair("the pin of "+name+" was removed", func() error {
		info, err := (*l).Info()
		if err != nil {
			return err
		}
		return replaceLink(l, pin, func() (link.Link, error) { return link.NewFromID(info.ID) })
	})
}

// replaceLink puts a new link in the place of *l and pins it.
func replaceLink(l *link.Link, pin string, open func() (link.Link, error)) error {
	n, err := open()
	if err != nil {
		return err
	}
	old := *l
	*l = n
	err = os.MkdirAll(filepath.Dir(pin), 0o700)
	if rmErr := os.Remove(pin); !errors.Is(rmErr, fs.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return errors.Join(err, n.Pin(pin), old.Close())
}

// guard makes sure that the programs of namespaces call ours.
func (a *audit) guard() {
	var is ebpf.ProgramID
	want, err := a.r.programID(a.r.guard)
	if err != nil || a.r.obj.Guard.Lookup(uint32(0), &is) == nil && is == want {
		return
	}
	a.repair("the guard of all namespaces was replaced", a.r.putGuard)
}

func (a *audit) namespace(ns *Namespace) {
	pin := filepath.Join(ns.dir, "sk_lookup")
	info, err := ns.lookup.Info()
	if err != nil || info.NetNs() == nil || uint64(info.NetNs().NetnsInode) != ns.Inode {
		a.repair("the guard was detached", func() error {
			return replaceLink(&ns.lookup, pin, func() (link.Link, error) { return link.AttachNetNs(int(ns.file.Fd()), ns.prog) })
		})
	} else {
		a.pin(&ns.lookup, "the guard", pin)
		a.program(ns.lookup, "the guard", ns.prog)
	}
	var ready outboundNsReady
	if err := a.r.obj.NsReady.Lookup(ns.Cookie, &ready); err != nil || ready != ns.ports() {
		a.repair("the namespace was not open for redirects", func() error { return a.r.obj.NsReady.Put(ns.Cookie, ns.ports()) })
	}
	for _, kind := range []outboundListenerKind{outboundListenerKindLISTENER_OUTBOUND, outboundListenerKindLISTENER_INBOUND} {
		for ln, key := range ns.listenersOf(kind) {
			var cookie uint64
			if errors.Is(a.r.obj.Listeners.Lookup(key, &cookie), ebpf.ErrKeyNotExist) {
				a.repair("the guard did not know a listener", func() error { return ns.showListener(ln, key) })
			}
		}
	}
}

// auditMap compares what a map holds with what it should, all of the shadows together, and makes it that.
func auditMap[K, V comparable](a *audit, name string, m *ebpf.Map, shadows ...shadow[K, V]) {
	if holds(m, shadows) {
		return
	}
	is, err := loadShadow[K, V](m)
	if err != nil {
		a.repair("map "+name+" could not be read", func() error { return err })
		return
	}
	want := make(map[K]V)
	for _, s := range shadows {
		maps.Copy(want, s)
	}
	if maps.Equal(is, want) {
		return
	}
	changed := 0
	for k, v := range is {
		if w, ok := want[k]; !ok || v != w {
			changed++
		}
	}
	for k := range want {
		if _, ok := is[k]; !ok {
			changed++
		}
	}
	a.repair(fmt.Sprintf("%d entries of map %s were changed", changed, name), func() error { return is.sync(name, m, want) })
}

// holds says whether a map is known to hold what it should. It makes no copy of it, which may be large.
func holds[K, V comparable](m *ebpf.Map, shadows []shadow[K, V]) bool {
	missing, same := 0, true
	for _, s := range shadows {
		missing += len(s)
	}
	err := each(m, func(k K, v V) {
		missing--
		same = same && slices.ContainsFunc(shadows, func(s shadow[K, V]) bool {
			want, known := s[k]
			return known && want == v
		})
	})
	return err == nil && same && missing == 0
}

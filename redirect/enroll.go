package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Enrolled is one enrolled cgroup.
type Enrolled struct {
	Cgroup   uint64 // id
	Workload uint32
}

// Nesting says which other enrolments a cgroup has above and below it.
type Nesting struct {
	Outer bool // an ancestor is enrolled
	Inner bool // a descendant is enrolled
}

type enrolment struct {
	cgroup   string // directory; "" for an earlier daemon's
	workload uint32
	group    uint32
	flags    uint32 // of its membership
	dir      string // of its pins
	links    []link.Link
	dns      []link.Link // of SteerDNS
}

func (e *enrolment) close() error {
	var errs []error
	for _, l := range append(e.dns, e.links...) {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// hook is a program and where it is attached.
type hook struct {
	name string // of its pin
	at   ebpf.AttachType
	prog *ebpf.Program
}

// hooks are the programs of a workload's cgroup.
func (r *Redirect) hooks() []hook {
	return []hook{
		{"connect4", ebpf.AttachCGroupInet4Connect, r.obj.Connect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, r.obj.Connect6},
		{"getpeername4", ebpf.AttachCgroupInet4GetPeername, r.obj.Getpeername4},
		{"getpeername6", ebpf.AttachCgroupInet6GetPeername, r.obj.Getpeername6},
		{"sockops", ebpf.AttachCGroupSockOps, r.obj.WorkloadSockops},
	}
}

// NewWorkload hands out a workload id, in the group of the workloads with its services. Rules may name it at once, so that what is delivered to
// it passes before it is enrolled. Ids are never used again while the pins exist.
func (r *Redirect) NewWorkload(group uint32) (uint32, error) {
	var id uint32
	err := r.updateHeartbeat(func(h *outboundHeartbeat) error {
		h.NextWorkload++
		id = h.NextWorkload
		return nil
	})
	if err != nil {
		return 0, err
	}
	if err := r.obj.Workloads.Put(id, outboundWorkload{Group: group}); err != nil {
		return 0, fmt.Errorf("add workload %d (room for %d): %w", id, r.obj.Workloads.MaxEntries(), err)
	}
	return id, nil
}

// Forget takes back an id from NewWorkload, unless a cgroup was enrolled with it.
func (r *Redirect) Forget(workload uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.enrolled {
		if e.workload == workload {
			return nil
		}
	}
	return r.forgetWorkload(workload)
}

// Enroll attaches to a cgroup and switches the hooks on together, as workload, an id from NewWorkload. An enrolled cgroup
// becomes the new workload in one step, or stays the workload that it is. On error the cgroup is as it was, and an id that is
// new to it is gone.
func (r *Redirect) Enroll(cgroup string, workload uint32, n Nesting) (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	same := false
	defer func() {
		if err != nil && !same {
			err = errors.Join(err, r.forgetWorkload(workload))
		}
	}()
	id, err := CgroupID(cgroup)
	if err != nil {
		return err
	}
	same = r.enrolled[id] != nil && r.enrolled[id].workload == workload
	var w outboundWorkload
	if err := r.obj.Workloads.Lookup(workload, &w); err != nil {
		return fmt.Errorf("enroll %s: find workload %d: %w", cgroup, workload, err)
	}
	e, known := r.enrolled[id]
	if !known {
		if e, err = r.attach(cgroup, id); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil && !known {
			err = errors.Join(err, r.detach(id, e))
		}
	}()
	old := e.workload
	if err := r.setMembership(id, e, workload, n.flags()|r.treated[workload]); err != nil {
		return err
	}
	e.cgroup, e.group = cgroup, w.Group
	r.enrolled[id] = e
	delete(r.unclaimed, workload)
	if old != 0 && !same {
		return r.forgetWorkload(old)
	}
	return nil
}

// SetNesting tells an enrolled cgroup what is enrolled above and below it. Tell the inner one first when an outer
// enrolment is about to be added, and last when one was removed.
func (r *Redirect) SetNesting(cgroup uint64, n Nesting) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.enrolled[cgroup]
	if !ok {
		return nil
	}
	flags := e.flags&^Nesting{Outer: true, Inner: true}.flags() | n.flags()
	if flags == e.flags {
		return nil
	}
	return r.setMembership(cgroup, e, e.workload, flags)
}

func (n Nesting) flags() uint32 {
	var flags uint32
	if n.Outer {
		flags |= uint32(outboundMemberFlagMEMBER_HAS_OUTER)
	}
	if n.Inner {
		flags |= uint32(outboundMemberFlagMEMBER_HAS_INNER)
	}
	return flags
}

// setMembership is the one write that switches all hooks of a cgroup.
func (r *Redirect) setMembership(cgroup uint64, e *enrolment, workload, flags uint32) error {
	if err := r.obj.Memberships.Put(cgroup, outboundMembership{Workload: workload, Flags: flags}); err != nil {
		return fmt.Errorf("switch cgroup %d to workload %d: %w", cgroup, workload, err)
	}
	e.workload, e.flags = workload, flags
	return nil
}

// Unenroll leaves the cgroup as it was before Enroll. Connections already redirected live on. A cgroup that is gone is
// no error.
func (r *Redirect) Unenroll(cgroup uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.enrolled[cgroup]
	if !ok {
		return nil
	}
	delete(r.enrolled, cgroup)
	err := r.detach(cgroup, e)
	if e.workload == 0 {
		return err
	}
	return errors.Join(err, r.forgetWorkload(e.workload))
}

// Enrolled lists the enrolled cgroups, also those that an earlier daemon left.
func (r *Redirect) Enrolled() []Enrolled {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Enrolled, 0, len(r.enrolled))
	for id, e := range r.enrolled {
		list = append(list, Enrolled{Cgroup: id, Workload: e.workload})
	}
	return list
}

// Redirects says whether what a cgroup dials meets redirects: it is enrolled, not only observed, and not left alone.
func (r *Redirect) Redirects(cgroup uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.enrolled[cgroup]
	if !ok || e.flags&uint32(outboundMemberFlagMEMBER_OBSERVES) != 0 {
		return false
	}
	_, untreated := r.exclusions[outboundExclusionKey{Prefixlen: uint32(outboundExclusionBitsEXCLUDED_PORT), Workload: e.workload}]
	return !untreated
}

// SetJoined notes, for the daemons to come, when an enrolled cgroup became one whose connections are redirected.
func (r *Redirect) SetJoined(cgroup uint64, at time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return os.Chtimes(r.enrolled[cgroup].dir, at, at)
}

// Joined is what SetJoined noted. Pins that had to be repaired since then make it later.
func (r *Redirect) Joined(cgroup uint64) (time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := os.Stat(r.enrolled[cgroup].dir)
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

// attach attaches every hook, switched off, and pins them under a temporary name that is renamed last.
func (r *Redirect) attach(cgroup string, id uint64) (_ *enrolment, err error) {
	dir := filepath.Join(r.dir, "cgroups", strconv.FormatUint(id, 10))
	aside := filepath.Join(r.dir, "cgroups", "new-"+strconv.FormatUint(id, 10)) // bpffs takes no dots
	e := &enrolment{dir: aside}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.detach(id, e))
		}
	}()
	if err := os.Mkdir(aside, 0o700); err != nil {
		return nil, fmt.Errorf("create pin directory: %w", err)
	}
	for _, h := range r.hooks() {
		l, err := r.attachPinned(cgroup, filepath.Join(aside, h.name), h.at, h.prog)
		if err != nil {
			return nil, fmt.Errorf("enroll %s: %w", cgroup, err)
		}
		e.links = append(e.links, l)
	}
	if err := os.Rename(aside, dir); err != nil {
		return nil, fmt.Errorf("enroll %s: rename pins: %w", cgroup, err)
	}
	e.dir = dir
	return e, nil
}

// detach switches the hooks off, removes the pins and lets go of the links.
func (r *Redirect) detach(cgroup uint64, e *enrolment) error {
	err := r.obj.Memberships.Put(cgroup, outboundMembership{})
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = nil // the cgroup is gone, or no hook was attached yet
	}
	return errors.Join(err, os.RemoveAll(e.dir), e.close())
}

// adopt takes over the enrolments and remembers the guards that an earlier daemon pinned; half attached and dead ones are
// removed, as are the ids of workloads that are gone.
func (r *Redirect) adopt() error {
	err := eachPinned(filepath.Join(r.dir, "cgroups"), r.adoptOne)
	if err != nil {
		return err
	}
	err = eachPinned(filepath.Join(r.dir, "namespaces"), func(cookie uint64, _ string) error {
		r.inherited[cookie] = true
		return nil
	})
	if err != nil {
		return err
	}
	return r.forgetUnknownWorkloads()
}

// eachPinned calls f for every directory of root that is named by a number, and removes the others: what was being built
// there was never renamed.
func eachPinned(root string, f func(id uint64, dir string) error) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("read pin directory: %w", err)
	}
	for _, entry := range entries {
		dir := filepath.Join(root, entry.Name())
		id, err := strconv.ParseUint(entry.Name(), 10, 64)
		if err != nil {
			if err := os.RemoveAll(dir); err != nil {
				return fmt.Errorf("remove unfinished enrolment: %w", err)
			}
			continue
		}
		if err := f(id, dir); err != nil {
			return err
		}
	}
	return nil
}

// forgetUnknownWorkloads removes the ids of workloads whose cgroup went while no daemon ran.
func (r *Redirect) forgetUnknownWorkloads() error {
	known := make(map[uint32]bool)
	for _, e := range r.enrolled {
		known[e.workload] = true
	}
	var gone []uint32
	var id uint32
	var w outboundWorkload
	it := r.obj.Workloads.Iterate()
	for it.Next(&id, &w) {
		if !known[id] {
			gone = append(gone, id)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read workloads: %w", err)
	}
	for _, id := range gone {
		if err := r.forgetWorkload(id); err != nil {
			return err
		}
	}
	return nil
}

func (r *Redirect) adoptOne(id uint64, dir string) error {
	e := &enrolment{dir: dir}
	var m outboundMembership
	alive := r.obj.Memberships.Lookup(id, &m) == nil && m.Workload != 0
	for _, h := range r.hooks() {
		l, err := link.LoadPinnedLink(filepath.Join(dir, h.name), nil)
		if err != nil {
			alive = false
			continue
		}
		e.links = append(e.links, l)
		if linkedCgroup(l) != id {
			alive = false
			continue
		}
		if err := l.Update(h.prog); err != nil {
			return errors.Join(fmt.Errorf("put this version's %s into cgroup %d: %w", h.name, id, err), e.close())
		}
	}
	if !alive {
		return r.detach(id, e)
	}
	if err := r.adoptDNS(id, e); err != nil {
		return errors.Join(fmt.Errorf("take over the DNS hooks of cgroup %d: %w", id, err), e.close())
	}
	e.workload, e.flags = m.Workload, m.Flags
	r.enrolled[id] = e
	r.unclaimed[e.workload] = true
	return nil
}

// forgetWorkload removes what the maps hold of a workload that is gone.
func (r *Redirect) forgetWorkload(id uint32) error {
	if err := r.obj.Workloads.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove workload %d: %w", id, err)
	}
	delete(r.unclaimed, id)
	return r.forgetTreatment(id)
}

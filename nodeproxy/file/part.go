package file

import (
	"io/fs"
	"maps"
	"slices"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/hclfile"
)

// part is what one file says by itself. It is not changed any more.
type part struct {
	stamp   stamp // of the file, zero if another content could have the same
	mesh    *mesh
	origins []hclfile.Pos
	kind    [2]string   // and name of the config entry; none: it is no entry
	pos     hclfile.Pos // of the kind
	errs    []error
}

// parts are those of a directory, by path.
type parts map[string]*part

// stamp changes with a file, as far as the file system tells.
type stamp struct {
	dev, ino                uint64
	size, modified, changed int64
}

// coarse is more than the step of a file system's clock: two contents that follow each other within it may bear one time.
const coarse = time.Second

func stampOf(info fs.FileInfo, now time.Time) stamp {
	st := info.Sys().(*syscall.Stat_t)
	changed := time.Unix(st.Ctim.Unix())
	if now.Sub(changed) < coarse {
		return stamp{}
	}
	return stamp{st.Dev, st.Ino, info.Size(), info.ModTime().UnixNano(), changed.UnixNano()}
}

// part is what the file at path says: as it was read last if it looks the same and was good, else as read lets a reader of its own have it.
func (r *reader) part(path string, info fs.FileInfo, read func(*reader, *hclfile.File)) *part {
	seen := stampOf(info, time.Now())
	if p := r.known[path]; p != nil && p.stamp == seen && seen != (stamp{}) && len(p.errs) == 0 {
		return p
	}
	own := newReader(r.dir, r.datacenter)
	if f, err := hclfile.Read(path); err != nil {
		own.fail(err)
	} else {
		read(own, f)
	}
	own.mesh.entries.forgetEmpty()
	p := &part{stamp: seen, mesh: own.mesh, origins: own.origins, errs: own.errs}
	for kind, pos := range own.byKind {
		p.kind, p.pos = kind, pos
	}
	return p
}

// forgetEmpty drops the maps that hold nothing: there is one of each for every file.
func (e *entries) forgetEmpty() {
	e.chains = nil
	if len(e.defaults) == 0 {
		e.defaults = nil
	}
	if len(e.resolvers) == 0 {
		e.resolvers = nil
	}
	if len(e.ignoredL7) == 0 {
		e.ignoredL7 = nil
	}
}

// merge adds what a file says to what the others do.
func (r *reader) merge(p *part) {
	if p.pos != (hclfile.Pos{}) {
		if first, twice := r.byKind[p.kind]; twice {
			r.fail(p.pos.Errorf("%s %q is already written at %s: keep one of them", p.kind[0], p.kind[1], first))
			return
		}
		r.byKind[p.kind] = p.pos
	}
	r.errs = append(r.errs, p.errs...)
	for _, inst := range p.mesh.instances {
		r.addInstance(inst)
	}
	r.mesh.problems = append(r.mesh.problems, p.mesh.problems...)
	r.origins = append(r.origins, p.origins...)
	all, own := &r.mesh.entries, &p.mesh.entries
	all.intentions = append(all.intentions, own.intentions...)
	all.permissive = append(all.permissive, own.permissive...)
	maps.Copy(all.defaults, own.defaults)
	maps.Copy(all.resolvers, own.resolvers)
	for service, ignored := range own.ignoredL7 {
		all.ignoredL7[service] = slices.Concat(all.ignoredL7[service], ignored)
	}
	if own.proxy != nil {
		all.proxy = own.proxy
	}
	if own.mesh != nil {
		all.mesh, all.tls = own.mesh, own.tls
	}
}

// addInstance files an instance, whose ID is its node's alone.
func (r *reader) addInstance(inst *instance) {
	key := [2]string{inst.node, inst.id}
	if first := r.byID[key]; first != nil {
		r.fail(inst.pos.Errorf("service id %q is already used on node %q at %s: give one of them another id", inst.id, inst.node, first.pos))
		return
	}
	r.byID[key] = inst
	r.mesh.instances = append(r.mesh.instances, inst)
}

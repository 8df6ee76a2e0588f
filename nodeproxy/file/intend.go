package file

import (
	"os"
	"path/filepath"
	"slices"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/policy"
)

// intend applies the files at paths, if all they change is what intentions between the same services say, and returns whether it did.
// That somebody is denied from now on must not wait until all the other files have been looked at: the next look does that.
func (r *run) intend(paths map[string]bool) bool {
	if r.last == nil || r.readErr != nil || r.caErr != nil {
		return false
	}
	own := newReader(r.cfg.Dir, r.cfg.Datacenter)
	own.known = r.parts
	m := *r.world.mesh
	m.entries.intentions = slices.Clone(m.entries.intentions)
	read, changed := make(parts), make(map[string][]policy.Intention) // by destination
	for path := range paths {
		if filepath.Dir(path) == filepath.Join(r.cfg.Dir, configDir) && !isDefinition(path) {
			continue // what somebody moves into place, say
		}
		old, info, err := r.parts[path], os.FileInfo(nil), error(nil)
		if old != nil {
			info, err = os.Stat(path)
		}
		if old == nil || err != nil {
			return false
		}
		read[path] = own.part(path, info, (*reader).readEntry)
		if !read[path].restates(old) {
			return false
		}
		if slices.Equal(read[path].mesh.entries.intentions, old.mesh.entries.intentions) {
			continue
		}
		for _, in := range read[path].mesh.entries.intentions {
			changed[in.Destination] = nil
		}
		at := slices.Index(m.entries.intentions, old.mesh.entries.intentions[0])
		copy(m.entries.intentions[at:], read[path].mesh.entries.intentions)
	}
	if len(changed) == 0 {
		return len(read) > 0
	}
	for _, in := range m.entries.intentions { // a destination may have some in other files, too
		if list, is := changed[in.Destination]; is {
			changed[in.Destination] = append(list, in)
		}
	}
	next := &world{mesh: &m, state: r.world.state, authority: r.world.authority}
	var err error
	if next.policy, err = r.world.policy.With(r.generation+1, changed); err != nil {
		return false
	}
	for path, p := range read {
		r.parts[path] = p
	}
	r.world = next
	r.give(r.last.WithPolicy(next.policy, r.generation+1, r.now()))
	r.report()
	return true
}

// restates says whether p holds the intentions of old, at the same places, with or without other actions, and nothing else.
func (p *part) restates(old *part) bool {
	quiet := func(p *part) bool {
		return p.kind[0] == api.ServiceIntentions && len(p.errs) == 0 && len(p.mesh.problems) == 0 && len(p.mesh.entries.intentions) > 0
	}
	same := func(a, b policy.Intention) bool {
		a.Action = b.Action
		return a == b
	}
	return quiet(p) && quiet(old) && p.kind == old.kind && slices.Equal(p.origins, old.origins) &&
		slices.EqualFunc(p.mesh.entries.intentions, old.mesh.entries.intentions, same)
}

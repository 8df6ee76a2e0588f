package workload

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"nodeproxy.io/redirect"
)

// grants decides on the claims as they stand. Providers are asked in order; the first to claim a cgroup has it, and one
// that asks for something else is refused.
func (m *Manager) grants() (granted []Claim, refused []RefusedClaim) {
	m.mu.Lock()
	defer m.mu.Unlock()
	owner := make(map[string]Claim)
	for _, p := range m.cfg.Providers {
		for _, c := range m.claims[p.Name()] {
			c.Cgroup = filepath.Clean(c.Cgroup)
			if why := m.refuses(c); why != "" {
				refused = append(refused, RefusedClaim{Claim: c, Why: why})
				continue
			}
			if first, taken := owner[c.Cgroup]; taken {
				if !first.agrees(c) {
					refused = append(refused, RefusedClaim{Claim: c, Why: conflict(first, c)})
				}
				continue
			}
			owner[c.Cgroup] = c
			granted = append(granted, c)
		}
	}
	return granted, refused
}

func conflict(first, c Claim) string {
	if !slices.Equal(first.services(), c.services()) {
		return fmt.Sprintf("%s claims this cgroup for service %q: remove one of the two", first.Provider, strings.Join(first.services(), ","))
	}
	return fmt.Sprintf("%s claims this cgroup for the same service with other settings, which hold: remove one of the two, or make them equal", first.Provider)
}

// refuses says why a claim can never be granted, or "".
func (m *Manager) refuses(c Claim) string {
	switch {
	case c.Invalid != "":
		return c.Invalid
	case c.Denied != "":
		return c.Denied
	case !within(c.Cgroup, m.mount):
		return fmt.Sprintf("it is not on cgroup2, which is mounted at %s", m.mount)
	case c.Cgroup == m.mount:
		return "the root cgroup cannot be a workload: it holds every process of the node"
	case within(m.cgroup, c.Cgroup):
		return fmt.Sprintf("the daemon itself runs in it, in %s: start nodeproxy in another cgroup", m.cgroup)
	case c.Service == "" && c.Mesh != Disabled:
		return "it names no service"
	case repeated(c.services()) != "":
		return fmt.Sprintf("it names service %q twice: name it once", repeated(c.services()))
	case c.DNS != nil && *c.DNS && m.cfg.DNS == nil:
		return "its label dns is \"enabled\", and dns.enabled is false in the configuration of this node: set that to true, or remove the label"
	}
	if prober := m.isProbers(c.Cgroup); prober != "" {
		return fmt.Sprintf("a prober of this node, such as the Consul agent, runs in it, in %s: start that in another cgroup", prober)
	}
	return ""
}

// repeated is the first of names that is there twice, or "".
func repeated(names []string) string {
	for i, name := range names {
		if slices.Contains(names[:i], name) {
			return name
		}
	}
	return ""
}

// Check says why cgroup can not be enrolled as service, before a provider claims it.
func (m *Manager) Check(c Claim) error {
	if _, err := redirect.CgroupID(c.Cgroup); err != nil {
		return err
	}
	if why := m.refuses(c); why != "" {
		return fmt.Errorf("enroll %s: %s", c.Cgroup, why)
	}
	return nil
}

// within reports whether path is dir or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// follow brings m.workloads in line with the granted claims and with what exists of their cgroups. Enrolments whose
// claim or cgroup is gone end here.
func (m *Manager) follow() {
	granted, refused := m.grants()
	m.refused = refused
	for _, r := range refused {
		args := []any{"service", r.Claim.Service, "provider", r.Claim.Provider}
		if r.Claim.Name != "" {
			args = append(args, "name", r.Claim.Name)
		}
		m.warn(r.Claim.Cgroup, "workload claim refused", errors.New(r.Why), args...)
	}
	wanted := enrolments(granted)
	invalid := invalidClaims(refused)
	for path, e := range m.workloads {
		c, ok := wanted[path]
		id, err := redirect.CgroupID(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue // cannot be told: leave it protected
		}
		if !ok && id == e.cgroup && invalid[path] {
			continue // a label that cannot be understood changes nothing
		}
		if !ok || id != e.cgroup || m.changed(e, c) {
			m.release(e, ok && id == e.cgroup)
			continue
		}
		e.claim.Ending = c.Ending
	}
	for path, c := range wanted {
		if _, known := m.workloads[path]; known {
			continue
		}
		e := &entry{claim: c, access: c.Access, Workload: Workload{Cgroup: path, Name: c.Name, Service: c.Service, Also: c.Also, Provider: c.Provider, Mode: m.mode(c), Mesh: c.Mesh, Proxied: c.Proxied}}
		e.cgroup, _ = redirect.CgroupID(path) // not there yet: it may come
		m.workloads[path] = e
	}
	m.watcher.follow(slices.Collect(maps.Keys(m.workloads)))
}

// enrolments lists, by cgroup, the claims for which something is attached: a cgroup that is to be left alone needs that only
// inside an enrolled one.
func enrolments(granted []Claim) map[string]Claim {
	wanted := make(map[string]Claim, len(granted))
	for _, c := range granted {
		inside := func(o Claim) bool { return o.Mesh != Disabled && within(c.Cgroup, o.Cgroup) }
		if c.Mesh != Disabled || slices.ContainsFunc(granted, inside) {
			wanted[c.Cgroup] = c
		}
	}
	return wanted
}

func invalidClaims(refused []RefusedClaim) map[string]bool {
	invalid := make(map[string]bool)
	for _, r := range refused {
		if r.Claim.Invalid != "" {
			invalid[r.Claim.Cgroup] = true
		}
	}
	return invalid
}

func (m *Manager) mode(c Claim) Mode {
	if c.Mode != nil {
		return *c.Mode
	}
	return m.cfg.Mode
}

func (m *Manager) changed(e *entry, c Claim) bool {
	return !e.claim.agrees(c) || e.Provider != c.Provider
}

// release forgets an entry. keep leaves the kernel's enrolment in place, for the entry of the same cgroup that follows.
func (m *Manager) release(e *entry, keep bool) {
	delete(m.workloads, e.Cgroup)
	m.forgetWarnings(e.Cgroup)
	if keep || e.cgroup == 0 {
		return
	}
	delete(m.older, e.cgroup)
	m.leaving = append(m.leaving, e)
}

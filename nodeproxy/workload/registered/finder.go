// Package registered finds workloads by what is registered in Consul: instances of this node whose meta asks for it, by who listens
// at their address, or for allocations of Nomad in the allocation's cgroup.
//
// Whoever may register a service says which it is; that a process is it takes more: see find. What is found first stays it, until the
// instance is registered no more. The package only looks.
package registered

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

const lookEvery = time.Second // for who starts to listen

// Config is what a Finder needs.
type Config struct {
	Mount string // of cgroup2
	Log   *slog.Logger
}

// Finder is the provider of instances that are registered with the mark. It implements workload.Provider, and waits for Apply.
type Finder struct {
	cfg   Config
	known map[string]*instance // by ID; Run's own

	changed chan struct{}
	mu      sync.Mutex
	snap    *catalog.Snapshot
	problem error
}

// instance is one that asks to be a workload.
type instance struct {
	catalog.Registered
	claim   workload.Claim // its Cgroup is "" until it is found
	space   uint64         // inode of the network namespace in which it was found
	missing error          // why it is not found, or what else is wrong
}

// New is a Finder that knows of nothing yet.
func New(cfg Config) *Finder {
	return &Finder{cfg: cfg, known: make(map[string]*instance), changed: make(chan struct{}, 1)}
}

// Apply tells what is registered. It does not block.
func (f *Finder) Apply(snap *catalog.Snapshot) {
	f.mu.Lock()
	f.snap = snap
	f.mu.Unlock()
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// Name implements workload.Provider.
func (*Finder) Name() string { return "consul" }

// Problem implements workload.Reporter.
func (f *Finder) Problem() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
}

// Run implements workload.Provider.
func (f *Finder) Run(ctx context.Context, claim func([]workload.Claim)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var told []workload.Claim
	for first := true; ; {
		f.mu.Lock()
		snap := f.snap
		f.mu.Unlock()
		if snap != nil {
			if now := f.look(snap.Labelled); first || !reflect.DeepEqual(now, told) {
				told, first = now, false
				claim(now)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.changed:
		case <-tick.C:
		}
	}
}

// look brings what is known in line with what is registered and with who listens, and claims it.
func (f *Finder) look(all []catalog.Registered) []workload.Claim {
	seen := newSight(f.cfg.Mount)
	registered := make(map[string]bool)
	for _, r := range all {
		labels := labelsOf(r)
		if labels["mesh"] == workload.Disabled.String() {
			continue
		}
		registered[r.ID] = true
		known := f.known[r.ID]
		if known == nil || known.Service != r.Service || known.Address != r.Address {
			known = &instance{}
			f.known[r.ID] = known
		}
		known.Registered = r
		f.update(known, labels, seen)
	}
	left := make(map[string]bool)
	for _, r := range all {
		left[r.ID] = !registered[r.ID] // its mark says that it is to be left alone
	}
	maps.DeleteFunc(f.known, func(id string, i *instance) bool {
		// What is registered no more stays closed to strangers until its last process has ended.
		return left[id] || !registered[id] && !(i.claim.Cgroup != "" && i.claim.Denied == "" && populated(i.claim.Cgroup))
	})
	f.report()
	return f.claims()
}

// update finds who i is.
func (f *Finder) update(i *instance, labels workload.Labels, seen *sight) {
	at := i.claim.Cgroup
	if i.claim.Denied != "" {
		at = ""
	}
	claim := labels.Claim(f.Name(), at)
	claim.Name, claim.Service, claim.Also, claim.Mapped = "instance "+i.ID, i.Service, nil, i.claim.Mapped
	if own := labels["service"]; own != "" && own != i.Service {
		claim.Denied, claim.Invalid = fmt.Sprintf("its meta nodeproxy-service is %q, and it is registered as %q: a registration is only the service that it registers; remove that", own, i.Service), ""
		i.claim, i.missing = claim, nil
		return
	}
	i.missing = nil
	found, err := seen.find(i)
	refused, isRefused := errors.AsType[refusal](err)
	switch {
	case err == nil && at != "" && found.cgroup != at:
		i.missing = fmt.Errorf("instance %s of %q was found in cgroup %s, and now cgroup %s listens at its port: that is not enrolled; stop it, or register the instance anew", i.ID, i.Service, at, found.cgroup)
	case err == nil:
		claim.Cgroup, claim.Mapped, i.space = found.cgroup, found.mapped, found.space
	case isRefused && at != "":
		i.missing = fmt.Errorf("instance %s of %q was found in cgroup %s, and now somebody else is at its port: %w", i.ID, i.Service, at, err)
	case isRefused:
		claim.Cgroup, claim.Denied, claim.Invalid = refused.cgroup, refused.why, ""
	case at == "":
		i.missing = fmt.Errorf("instance %s of %q is not enrolled: %w: it is looked for", i.ID, i.Service, err)
	}
	i.claim = claim
}

// report tells what is wrong.
func (f *Finder) report() {
	var all []error
	for _, id := range slices.Sorted(maps.Keys(f.known)) {
		if err := f.known[id].missing; err != nil {
			all = append(all, err)
		}
	}
	problem := errors.Join(all...)
	f.mu.Lock()
	news := fmt.Sprint(problem) != fmt.Sprint(f.problem)
	f.problem = problem
	f.mu.Unlock()
	if news && problem != nil {
		f.cfg.Log.Warn("registered workloads are not all found", "error", problem)
	}
}

// claims lists one claim for each cgroup that instances of one service share.
func (f *Finder) claims() []workload.Claim {
	var all []workload.Claim
	for _, id := range slices.Sorted(maps.Keys(f.known)) {
		c := f.known[id].claim
		if c.Cgroup == "" && c.Denied == "" && c.Invalid == "" {
			continue
		}
		same := slices.IndexFunc(all, func(o workload.Claim) bool {
			return o.Cgroup == c.Cgroup && o.Service == c.Service && o.Denied == "" && c.Denied == "" && o.Invalid == "" && c.Invalid == ""
		})
		if same >= 0 {
			all[same].Mapped = append(slices.Clone(all[same].Mapped), c.Mapped...)
			continue
		}
		all = append(all, c)
	}
	slices.SortStableFunc(all, func(a, b workload.Claim) int { return cmp.Compare(a.Cgroup, b.Cgroup) })
	return all
}

// Keys of an instance's meta with our prefix that are no labels.
var otherKeys = []string{"upstreams", "version", portKey}

const portKey = "port"

// labelsOf are the labels in an instance's meta.
func labelsOf(r catalog.Registered) workload.Labels {
	labels := make(workload.Labels)
	for key, value := range r.Meta {
		if key, ours := strings.CutPrefix(key, catalog.MetaMesh+"-"); ours && !slices.Contains(otherKeys, key) {
			labels[key] = value
		}
	}
	labels["mesh"] = r.Meta[catalog.MetaMesh]
	return labels
}

func populated(cgroup string) bool {
	events, err := os.ReadFile(filepath.Join(cgroup, "cgroup.events"))
	return err == nil && strings.Contains(string(events), "populated 1")
}

// Package resolver says where the calls of a service go by service-resolver config entries: what a load-balancing policy is
// here, which instances a subset is, and, for a source whose control plane does not compile discovery chains itself, which
// targets a chain has. It is pure: no I/O, and no state.
package resolver

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// Target is one of a chain's.
type Target struct {
	Service string
	Subset  string // "" is all of the service
	Filter  string // of the subset: see ParseFilter
}

// Chain is where the calls of a service go.
type Chain struct {
	Targets []Target // the first is the primary one
	Balance catalog.Balance
	Ignored []string // sentences: what of the entries is not honoured
}

// Fault is what is wrong with an entry, at the key that these steps lead to.
type Fault struct {
	Path []any
	Err  error
}

var balances = map[string]catalog.Balance{
	"": catalog.LeastRequest, "least_request": catalog.LeastRequest, "round_robin": catalog.RoundRobin, "random": catalog.Random,
	"maglev": catalog.SourceHash, "ring_hash": catalog.SourceHash,
}

// Balance is how instances are chosen by lb, which may be nil, and sentences about what of it is not honoured.
func Balance(lb *api.LoadBalancer) (balance catalog.Balance, ignored []string) {
	if lb == nil {
		return catalog.LeastRequest, nil
	}
	ignore := func(format string, args ...any) { ignored = append(ignored, fmt.Sprintf(format, args...)) }
	balance, known := balances[lb.Policy]
	if !known {
		ignore("LoadBalancer policy %q is not known: the less busy of two instances is used", lb.Policy)
	}
	if lb.LeastRequestConfig != nil && lb.LeastRequestConfig.ChoiceCount != 2 {
		ignore("LeastRequestConfig.ChoiceCount %d is not honoured: two instances are drawn", lb.LeastRequestConfig.ChoiceCount)
	}
	if lb.RingHashConfig != nil {
		ignore("RingHashConfig is not honoured: no ring is kept")
	}
	for _, p := range lb.HashPolicies {
		if !p.SourceIP {
			ignore("hash policy %q is ignored: it concerns HTTP, the source address is used", p.Field)
		}
	}
	return balance, ignored
}

// Unordered is the sentence about a failover policy that is not honoured, "" where it is.
func Unordered(mode string) string {
	if mode == "" || mode == "sequential" {
		return ""
	}
	return fmt.Sprintf("failover policy %q is not honoured: the targets are used in order", mode)
}

// Check says what of entry, of a mesh that is one datacenter and has no peers, namespaces or partitions, cannot be honoured or
// makes no sense.
func Check(entry *api.ServiceResolverConfigEntry, datacenter string) (faults []Fault) {
	fail := func(path []any, format string, args ...any) {
		faults = append(faults, Fault{path, fmt.Errorf(format, args...)})
	}
	if entry.ConnectTimeout < 0 {
		fail([]any{"ConnectTimeout"}, "ConnectTimeout is negative")
	}
	for _, name := range slices.Sorted(maps.Keys(entry.Subsets)) {
		if _, err := ParseFilter(entry.Subsets[name].Filter); err != nil {
			fail([]any{"Subsets", name, "Filter"}, "filter of subset %q: %w", name, err)
		}
	}
	if entry.DefaultSubset != "" && !hasSubset(entry, entry.DefaultSubset) {
		fail([]any{"DefaultSubset"}, "DefaultSubset %q is none of the Subsets", entry.DefaultSubset)
	}
	if entry.PrioritizeByLocality != nil && entry.PrioritizeByLocality.Mode != "" && entry.PrioritizeByLocality.Mode != "none" {
		fail([]any{"PrioritizeByLocality"}, "PrioritizeByLocality is not supported: remove it")
	}
	if lb := entry.LoadBalancer; lb != nil {
		if _, known := balances[lb.Policy]; !known {
			fail([]any{"LoadBalancer", "Policy"}, "LoadBalancer policy %q is not one of Consul's", lb.Policy)
		}
	}
	elsewhere := func(path []any, in string, dc string, strangers ...string) {
		for i, what := range []string{"namespace", "partition", "peer", "sameness group"} {
			if name := strangers[i]; name != "" && (i > 1 || name != "default") {
				fail(path, "%s: %s %q: there is none here", in, what, name)
			}
		}
		if dc != "" && dc != datacenter {
			fail(path, "%s: datacenter %q: the only one here is %q", in, dc, datacenter)
		}
	}
	if r := entry.Redirect; r != nil {
		path := []any{"Redirect"}
		elsewhere(path, "Redirect", r.Datacenter, r.Namespace, r.Partition, r.Peer, r.SamenessGroup)
		if len(entry.Failover) > 0 {
			fail(path, "Redirect and Failover do not go together: remove one of them")
		}
		if r.Service == "" && r.ServiceSubset == "" {
			fail(path, "Redirect leads nowhere: set Service or ServiceSubset")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(entry.Failover)) {
		f, path := entry.Failover[name], []any{"Failover", name}
		if name != "*" && !hasSubset(entry, name) {
			fail(path, "Failover %q: it is neither \"*\" nor one of the Subsets", name)
		}
		elsewhere(path, "Failover "+name, "", f.Namespace, "", "", f.SamenessGroup)
		for _, dc := range f.Datacenters {
			elsewhere(path, "Failover "+name, dc, "", "", "", "")
		}
		for _, t := range f.Targets {
			elsewhere(path, "Failover "+name, t.Datacenter, t.Namespace, t.Partition, t.Peer, "")
		}
		if f.Service == "" && f.ServiceSubset == "" && len(f.Targets) == 0 && len(f.Datacenters) == 0 {
			fail(path, "Failover %q leads nowhere: set Service, ServiceSubset or Targets", name)
		}
	}
	return faults
}

func hasSubset(entry *api.ServiceResolverConfigEntry, name string) bool {
	_, has := entry.Subsets[name]
	return has
}

// Compile is the chain of a service by entries that passed Check, as Consul compiles it for TCP (agent/consul/discoverychain):
// redirects are followed, and the failover that counts is that of the service and subset at their end. An error is one of the
// entries together.
func Compile(service string, entries map[string]*api.ServiceResolverConfigEntry) (*Chain, error) {
	primary, err := resolve(Target{Service: service}, entries)
	if err != nil {
		return nil, err
	}
	c := &Chain{Targets: []Target{primary}}
	entry := entries[primary.Service]
	if entry == nil {
		return c, nil
	}
	c.Balance, c.Ignored = Balance(entry.LoadBalancer)
	f, own := entry.Failover[primary.Subset]
	if !own || primary.Subset == "" {
		if f, own = entry.Failover["*"]; !own {
			return c, nil
		}
	}
	if f.Policy != nil && Unordered(f.Policy.Mode) != "" {
		c.Ignored = append(c.Ignored, Unordered(f.Policy.Mode))
	}
	for _, t := range failoverTargets(&f) {
		next, err := resolve(primary.rewritten(t.Service, t.ServiceSubset), entries)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(c.Targets, next) {
			c.Targets = append(c.Targets, next)
		}
	}
	return c, nil
}

func failoverTargets(f *api.ServiceResolverFailover) []api.ServiceResolverFailoverTarget {
	if len(f.Targets) > 0 {
		return f.Targets
	}
	return []api.ServiceResolverFailoverTarget{{Service: f.Service, ServiceSubset: f.ServiceSubset}}
}

// rewritten is t with another service or subset where one is named. Another service has other subsets.
func (t Target) rewritten(service, subset string) Target {
	if service != "" && service != t.Service {
		return Target{Service: service, Subset: subset}
	}
	return Target{Service: t.Service, Subset: cmp.Or(subset, t.Subset)}
}

// resolve follows redirects and default subsets from t.
func resolve(t Target, entries map[string]*api.ServiceResolverConfigEntry) (Target, error) {
	seen := make(map[Target]bool)
	for {
		if seen[t] {
			return t, fmt.Errorf("service-resolver of %q: its redirects lead in a circle", t.Service)
		}
		seen[t] = true
		entry := entries[t.Service]
		switch {
		case entry != nil && entry.Redirect != nil:
			next := t.rewritten(entry.Redirect.Service, entry.Redirect.ServiceSubset)
			if next == t {
				return t, fmt.Errorf("service-resolver of %q: it redirects to itself", t.Service)
			}
			t = next
		case t.Subset == "" && entry != nil && entry.DefaultSubset != "":
			t.Subset = entry.DefaultSubset
		case t.Subset == "":
			return t, nil
		case entry == nil || !hasSubset(entry, t.Subset):
			return t, fmt.Errorf("service %q has no subset %q: define it in the service-resolver of %q", t.Service, t.Subset, t.Service)
		default:
			t.Filter = entry.Subsets[t.Subset].Filter
			return t, nil
		}
	}
}

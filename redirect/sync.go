package redirect

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Destination is one address that is redirected.
type Destination struct {
	Addr     netip.Addr
	Port     uint16 // 0: every port
	Workload uint32 // for this one only; 0: for all
	Instance bool   // an instance's own address: dialled plain while the daemon is gone, if on_failure is "open"
	Pass     bool   // not redirected: reached also where only the mesh is open
	Refuse   bool   // refused, with the verdict ConsulAccess
}

func (d Destination) entry() (outboundDestinationKey, outboundDestination) {
	var v outboundDestination
	if d.Instance {
		v.Flags |= uint32(outboundDestFlagDEST_INSTANCE)
	}
	if d.Pass {
		v.Flags |= uint32(outboundDestFlagDEST_PASS)
	}
	if d.Refuse {
		v.Flags |= uint32(outboundDestFlagDEST_REFUSE)
	}
	return outboundDestinationKey{Ip: toAddr(d.Addr), Workload: d.Workload, Port: swap(d.Port)}, v
}

// Action is what an inbound connection meets.
type Action uint32

// The actions of a Rule.
const (
	Steer      = Action(outboundRuleActionRULE_STEER)      // a mesh port: to the inbound listener
	Strict     = Action(outboundRuleActionRULE_STRICT)     // plaintext is refused
	Permissive = Action(outboundRuleActionRULE_PERMISSIVE) // plaintext is let in and reported
	Untouched  = Action(outboundRuleActionRULE_OPEN)       // not ours
	Observe    = Action(outboundRuleActionRULE_OBSERVE)    // plaintext is let in, and reported as what Strict would refuse
)

// Rule says what inbound connections to a port of one namespace meet. The most exact rule wins: address and port, then
// port, then namespace.
type Rule struct {
	Namespace uint64     // cookie
	Addr      netip.Addr // zero: every address
	Port      uint16     // 0: every port
	Action    Action
	Workload  uint32 // named in verdicts
	Group     uint32 // whose own calls pass, in the node's namespace
}

// SetDestinations makes what is redirected for all workloads exactly the addresses given, by diff: an address that changes hands does so in
// one step. The ranges are those of virtual IPs: what is in one and no destination is refused.
func (r *Redirect) SetDestinations(dests []Destination, ranges []netip.Prefix) error {
	want := make(map[outboundDestinationKey]outboundDestination, len(dests))
	for _, d := range dests {
		if d.Workload != 0 {
			return fmt.Errorf("redirect %s: it is for workload %d alone", d.Addr, d.Workload)
		}
		if d.Addr.IsLoopback() || d.Addr.IsUnspecified() || d.Addr.IsMulticast() || d.Addr.IsLinkLocalUnicast() {
			return fmt.Errorf("redirect %s: loopback, unspecified, multicast and link-local addresses are never redirected", d.Addr)
		}
		k, v := d.entry()
		want[k] = v
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(
		r.dests.sync("destinations", r.obj.Destinations, want),
		r.ranges.sync("virtual ranges", r.obj.VirtualRanges, rangeKeys(ranges, outboundRangeKindRANGE_VIRTUAL)),
	)
}

// SetOwn makes what is redirected for single workloads exactly the addresses given, by diff, but for those of workloads that
// an earlier daemon enrolled and this one has not yet; they may be loopback. With
// meshOnly, what is redirected for nobody is refused, but for loopback, port 53, and destinations that pass.
func (r *Redirect) SetOwn(dests []Destination, meshOnly bool) error {
	want := make(map[outboundDestinationKey]outboundDestination, len(dests))
	for _, d := range dests {
		if d.Workload == 0 {
			return fmt.Errorf("redirect %s for one workload: it is for none", d.Addr)
		}
		k, v := d.entry()
		want[k] = v
	}
	outside := make(map[outboundRangeKey]uint32)
	if meshOnly {
		outside = rangeKeys(loopback, outboundRangeKindRANGE_OPEN)
		maps.Copy(outside, rangeKeys(everywhere, outboundRangeKindRANGE_OUTSIDE))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, d := range r.single {
		if _, given := want[key]; !given && r.unclaimed[key.Workload] {
			want[key] = d
		}
	}
	return errors.Join(
		r.single.sync("destinations of single workloads", r.obj.Destinations, want),
		r.outside.sync("ranges outside the mesh", r.obj.VirtualRanges, outside),
	)
}

// The addresses that a connect leads to this host by, and all there are.
var (
	loopback = []netip.Prefix{
		netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("0.0.0.0/32"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("::/128"),
	}
	everywhere = []netip.Prefix{netip.MustParsePrefix("::/0")} // of the v4-mapped form too
)

// SetPlaintextFrom makes the networks whose plaintext strict ports take exactly those given, by diff.
func (r *Redirect) SetPlaintextFrom(networks []netip.Prefix) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plaintext.sync("plaintext networks", r.obj.PlaintextFrom, rangeKeys(networks, 1))
}

func rangeKeys(ranges []netip.Prefix, value outboundRangeKind) map[outboundRangeKey]uint32 {
	keys := make(map[outboundRangeKey]uint32, len(ranges))
	for _, p := range ranges {
		keys[rangeKey(p)] = uint32(value)
	}
	return keys
}

func rangeKey(p netip.Prefix) outboundRangeKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96 // of the v4-mapped form
	}
	return outboundRangeKey{Prefixlen: uint32(bits), Ip: toAddr(p.Masked().Addr())}
}

// SetRules makes the inbound rules exactly those given, by diff, but for those of namespaces that an earlier daemon guarded
// and this one has not opened, and of workloads that it enrolled and this one has not: they stay until Prune, or until a
// given one is in their place. A port that is steered to us comes to be so before, and ceases to be so after, all else: at no moment is it
// guarded alone, which would refuse what whoever listens there is about to have, or had. An error is an *Unguarded.
func (r *Redirect) SetRules(rules []Rule) error {
	want := make(shadow[outboundRuleKey, outboundRule], len(rules))
	for _, rule := range rules {
		key := outboundRuleKey{Netns: rule.Namespace, Port: rule.Port}
		if rule.Addr.IsValid() {
			key.Ip = toAddr(rule.Addr)
		}
		want[key] = outboundRule{Action: uint32(rule.Action), Workload: rule.Workload, Group: rule.Group}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, rule := range r.rules {
		if _, given := want[key]; !given && (r.inherited[key.Netns] || r.unclaimed[rule.Workload]) {
			want[key] = rule
		}
	}
	if maps.Equal(r.rules, want) {
		return nil
	}
	isSteered := func(key outboundRuleKey, _ outboundRule) bool { return key.Ip != (outboundAddr{}) }
	steered, last := want.steps(r.rules, isSteered)
	_ = r.rules.sync("rules", r.obj.Rules, steered) // what cannot be written now may have room once others are removed
	_ = r.rules.sync("rules", r.obj.Rules, last)
	err := r.rules.sync("rules", r.obj.Rules, want)
	if err == nil {
		return nil
	}
	missing := &Unguarded{Workloads: make(map[uint32]bool), err: err}
	for key, rule := range want {
		if have, written := r.rules[key]; !written || have != rule {
			missing.Workloads[rule.Workload] = true
		}
	}
	return missing
}

// Unguarded says whose inbound rules are not all in force, and why.
type Unguarded struct {
	Workloads map[uint32]bool
	err       error
}

func (u *Unguarded) Error() string { return u.err.Error() }
func (u *Unguarded) Unwrap() error { return u.err }

// shadow is what we know a map to hold, so that a sync writes only what differs.
type shadow[K comparable, V comparable] map[K]V

func (r *Redirect) loadShadows() error {
	var err error
	if r.dests, err = loadShadow[outboundDestinationKey, outboundDestination](r.obj.Destinations); err != nil {
		return err
	}
	if r.ranges, err = loadShadow[outboundRangeKey, uint32](r.obj.VirtualRanges); err != nil {
		return err
	}
	r.single = r.dests.split(func(k outboundDestinationKey, _ outboundDestination) bool { return k.Workload != 0 })
	r.outside = r.ranges.split(func(_ outboundRangeKey, kind uint32) bool { return kind != uint32(outboundRangeKindRANGE_VIRTUAL) })
	if r.plaintext, err = loadShadow[outboundRangeKey, uint32](r.obj.PlaintextFrom); err != nil {
		return err
	}
	if r.exclusions, err = loadShadow[outboundExclusionKey, uint32](r.obj.Exclusions); err != nil {
		return err
	}
	if r.grants, err = loadShadow[outboundGrantKey, outboundGrant](r.obj.Grants); err != nil {
		return err
	}
	if r.rules, err = loadShadow[outboundRuleKey, outboundRule](r.obj.Rules); err != nil {
		return err
	}
	if r.probes, err = loadShadow[outboundProbeKey, outboundProbe](r.obj.Probes); err != nil {
		return err
	}
	r.mappedProbes, err = loadShadow[outboundProbeKey, outboundProbeKey](r.obj.MappedProbes)
	return err
}

func loadShadow[K comparable, V comparable](m *ebpf.Map) (shadow[K, V], error) {
	s := make(shadow[K, V])
	return s, each(m, func(k K, v V) { s[k] = v })
}

// batch is how many entries of a map are read or written by one system call.
const batch = 1024

// each calls f with each entry of a map, which nobody changes meanwhile.
func each[K comparable, V comparable](m *ebpf.Map, f func(K, V)) error {
	size := int(min(m.MaxEntries(), batch))
	keys, values := make([]K, size), make([]V, size)
	var at ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&at, keys, values, nil)
		if errors.Is(err, ebpf.ErrNotSupported) { // by this kernel, for such a map
			return eachAlone(m, f)
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) { // there are no more
			return fmt.Errorf("read %s: %w", m, err)
		}
		for i := range n {
			f(keys[i], values[i])
		}
		if err != nil {
			return nil
		}
	}
}

func eachAlone[K comparable, V comparable](m *ebpf.Map, f func(K, V)) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		f(k, v)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read %s: %w", m, err)
	}
	return nil
}

// split moves the entries that match out of s.
func (s shadow[K, V]) split(match func(K, V) bool) shadow[K, V] {
	others := make(shadow[K, V])
	for k, v := range s {
		if match(k, v) {
			others[k] = v
			delete(s, k)
		}
	}
	return others
}

// steps are what a map holds on its way from have to s: once those that are first are there, and then once all is as in s but for
// those of have that are first.
func (s shadow[K, V]) steps(have shadow[K, V], first func(K, V) bool) (one, two shadow[K, V]) {
	one, two = maps.Clone(have), maps.Clone(s)
	for k, v := range s {
		if first(k, v) {
			one[k] = v
		}
	}
	for k, v := range have {
		if _, stays := s[k]; !stays && first(k, v) {
			two[k] = v
		}
	}
	return one, two
}

// sync removes what is not wanted and then writes what differs. What it could not write stays to be written.
func (s shadow[K, V]) sync(name string, m *ebpf.Map, want map[K]V) error {
	var errs []error
	for k := range s {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove from %s: %w", name, err))
			continue
		}
		delete(s, k)
	}
	var keys []K
	var values []V
	for k, v := range want {
		if have, ok := s[k]; !ok || have != v {
			keys, values = append(keys, k), append(values, v)
		}
	}
	for first := 0; first < len(keys); first += batch {
		end := min(first+batch, len(keys))
		errs = append(errs, s.write(name, m, keys[first:end], values[first:end])...)
	}
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

// write writes entries by one system call, or, where some cannot be written, or the kernel has none for such a map, each alone.
func (s shadow[K, V]) write(name string, m *ebpf.Map, keys []K, values []V) (errs []error) {
	together := false
	if len(keys) > 1 {
		_, err := m.BatchUpdate(keys, values, nil)
		together = err == nil
	}
	for i := range keys {
		if !together {
			if err := m.Put(&keys[i], &values[i]); err != nil {
				errs = append(errs, fmt.Errorf("write to %s (%d of %d entries in use): %w", name, len(s), m.MaxEntries(), err))
				continue
			}
		}
		s[keys[i]] = values[i]
	}
	return errs
}

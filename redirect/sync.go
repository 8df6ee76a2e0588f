package redirect

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Destination is one address that is redirected.
type Destination struct {
	Addr     netip.Addr
	Port     uint16 // 0: every port
	Instance bool   // an instance's own address: dialled plain while the daemon is gone, if on_failure is "open"
}

// Action is what an inbound connection meets.
type Action uint32

// The actions of a Rule.
const (
	Steer      = Action(outboundRuleActionRULE_STEER)      // a mesh port: to the inbound listener
	Strict     = Action(outboundRuleActionRULE_STRICT)     // plaintext is refused
	Permissive = Action(outboundRuleActionRULE_PERMISSIVE) // plaintext is let in and reported
	Untouched  = Action(outboundRuleActionRULE_OPEN)       // not ours
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

// SetDestinations makes the redirected addresses exactly those given, by diff: an address that changes hands does so in
// one step. The ranges are those of virtual IPs: what is in one and no destination is refused.
func (r *Redirect) SetDestinations(dests []Destination, ranges []netip.Prefix) error {
	want := make(map[outboundDestinationKey]outboundDestination, len(dests))
	for _, d := range dests {
		if d.Addr.IsLoopback() || d.Addr.IsUnspecified() || d.Addr.IsMulticast() || d.Addr.IsLinkLocalUnicast() {
			return fmt.Errorf("redirect %s: loopback, unspecified, multicast and link-local addresses are never redirected", d.Addr)
		}
		v := outboundDestination{}
		if d.Instance {
			v.Flags = uint32(outboundDestFlagDEST_INSTANCE)
		}
		want[outboundDestinationKey{Ip: toAddr(d.Addr), Port: swap(d.Port)}] = v
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(
		r.dests.sync("destinations", r.obj.Destinations, want),
		r.ranges.sync("virtual ranges", r.obj.VirtualRanges, rangeKeys(ranges)),
	)
}

// SetPlaintextFrom makes the networks whose plaintext strict ports take exactly those given, by diff.
func (r *Redirect) SetPlaintextFrom(networks []netip.Prefix) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plaintext.sync("plaintext networks", r.obj.PlaintextFrom, rangeKeys(networks))
}

func rangeKeys(ranges []netip.Prefix) map[outboundRangeKey]uint32 {
	keys := make(map[outboundRangeKey]uint32, len(ranges))
	for _, p := range ranges {
		bits := p.Bits()
		if p.Addr().Is4() {
			bits += 96 // of the v4-mapped form
		}
		keys[outboundRangeKey{Prefixlen: uint32(bits), Ip: toAddr(p.Masked().Addr())}] = 1
	}
	return keys
}

// SetRules makes the inbound rules exactly those given, by diff, but for those of namespaces that an earlier daemon guarded
// and this one has not opened: they stay until Prune.
func (r *Redirect) SetRules(rules []Rule) error {
	want := make(map[outboundRuleKey]outboundRule, len(rules))
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
		if r.inherited[key.Netns] {
			want[key] = rule
		}
	}
	return r.rules.sync("rules", r.obj.Rules, want)
}

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
	if r.plaintext, err = loadShadow[outboundRangeKey, uint32](r.obj.PlaintextFrom); err != nil {
		return err
	}
	if r.grants, err = loadShadow[outboundGrantKey, outboundGrant](r.obj.Grants); err != nil {
		return err
	}
	r.rules, err = loadShadow[outboundRuleKey, outboundRule](r.obj.Rules)
	return err
}

func loadShadow[K comparable, V comparable](m *ebpf.Map) (shadow[K, V], error) {
	s := make(shadow[K, V])
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		s[k] = v
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", m, err)
	}
	return s, nil
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
	for k, v := range want {
		if have, ok := s[k]; ok && have == v {
			continue
		}
		if err := m.Put(k, v); err != nil {
			errs = append(errs, fmt.Errorf("write to %s (%d of %d entries in use): %w", name, len(s), m.MaxEntries(), err))
			continue
		}
		s[k] = v
	}
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

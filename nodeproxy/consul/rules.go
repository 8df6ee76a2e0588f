package consul

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// policy compiles the intentions, or returns the last policy if they are the same.
func (b *builder) policy(generation uint64) (*policy.Policy, error) {
	names := b.data.resolved() // of which some are in other datacenters only
	for name := range b.services {
		names[name] = true
	}
	b.destinations, b.httpLike = slices.Sorted(maps.Keys(names)), make(map[string]bool)
	for _, name := range b.destinations {
		if isHTTP(b.protocol(name)) {
			b.httpLike[name] = true
		}
	}
	var all []policy.Intention
	all, b.reported = b.intentions()
	for _, rule := range b.reported {
		b.reportIntention(rule)
	}
	if b.last != nil && b.last.IsOf(b.byDefault(), b.local(), b.httpLike, all) {
		return b.last, nil
	}
	return policy.Compile(generation, b.byDefault(), b.local(), b.httpLike, all)
}

func (b *builder) byDefault() policy.Action {
	if cmp.Or(b.data.agent.defaultIntention, b.data.defaultACL) == "allow" {
		return policy.Allow
	}
	return policy.Deny
}

func (b *builder) local() policy.Identity {
	return policy.Identity{TrustDomain: b.data.roots.trustDomain}
}

// intentions are those of all destinations, and the rules of which something is to be reported.
func (b *builder) intentions() (all []policy.Intention, reported []rule) {
	n := 0
	for _, rules := range b.data.intentions {
		n += len(rules)
	}
	all = make([]policy.Intention, 0, n)
	seen := make(map[ruleKey]bool, n)
	for _, name := range b.destinations {
		came, reports := b.intentionsWith(name, seen) // those of "*" come with every name
		all, reported = append(all, came...), append(reported, reports...)
	}
	return all, reported
}

// intentionsWith are those that came with one name, but for those seen, and the rules of which something is to be reported.
func (b *builder) intentionsWith(name string, seen map[ruleKey]bool) (all []policy.Intention, reported []rule) {
	rules, read := b.data.intentions[name]
	if !read { // until it is known who may connect, nobody may
		return []policy.Intention{{
			Source: policy.Wildcard, Destination: name, Action: policy.Deny, Origin: "the intentions are not known yet",
		}}, nil
	}
	for _, rule := range rules {
		if rule.sameness {
			continue
		}
		if key := rule.key(); seen[key] {
			continue
		} else {
			seen[key] = true
		}
		if rule.SourcePeer != "" {
			rule.SourceDomain = b.domainOf(rule.SourcePeer)
		}
		if rule.why() != "" || rule.isOfStranger() {
			reported = append(reported, rule)
		}
		all = append(all, rule.Intention)
	}
	return all, reported
}

// restate is last, which b built, with the intentions of d. nil: what is to be reported of them differs, and b is as it was.
func (b *builder) restate(d *data, last *catalog.Snapshot, generation uint64, now time.Time) (snap *catalog.Snapshot, err error) {
	before := b.data
	next := *before
	next.intentions = d.intentions
	b.data = &next
	defer func() {
		if snap == nil {
			b.data = before
		}
	}()
	p, err := b.restated(before, last.Policy, generation)
	if p == nil && err == nil {
		all, reported := b.intentions()
		if !slices.Equal(reported, b.reported) {
			return nil, nil
		}
		p, err = policy.Compile(generation, b.byDefault(), b.local(), b.httpLike, all)
	}
	if err != nil {
		return nil, err
	}
	return last.WithPolicy(p, generation, now), nil
}

// restated is last, made of what was known before, with what has changed of single destinations; nil if more has, or there is
// something to report.
func (b *builder) restated(before *data, last *policy.Policy, generation uint64) (*policy.Policy, error) {
	was := *b
	was.data = before
	changed := make(map[string][]policy.Intention)
	for _, name := range b.destinations {
		if isSame(before, b.data, name) {
			continue
		}
		old, reportedOld := was.intentionsWith(name, make(map[ruleKey]bool))
		all, reported := b.intentionsWith(name, make(map[ruleKey]bool))
		ofAll := func(in policy.Intention) bool { return in.Destination == policy.Wildcard }
		ofOne := func(in policy.Intention) bool { return !ofAll(in) }
		changed[name] = slices.DeleteFunc(slices.Clone(all), ofAll)
		if len(reported)+len(reportedOld) > 0 || !slices.Equal(slices.DeleteFunc(old, ofOne), slices.DeleteFunc(all, ofOne)) {
			return nil, nil
		}
	}
	return last.With(generation, changed)
}

// isSame says whether the intentions of a name are the very ones that they were.
func isSame(before, now *data, name string) bool {
	old, wasRead := before.intentions[name]
	rules, read := now.intentions[name]
	return wasRead == read && len(old) == len(rules) && (len(rules) == 0 || &old[0] == &rules[0])
}

func (b *builder) reportIntention(rule rule) {
	if rule.isOfStranger() {
		b.problem(rule.Destination, "unsupported", "intention %s => %s: the trust domain of peer %q is not known, so it matches nobody", rule.Source, rule.Destination, rule.SourcePeer)
	}
	why := rule.why()
	if why == "" {
		return
	}
	kind := "unsupported"
	if rule.Permissions || rule.JWT {
		kind = "l7-ignored"
		if svc := b.services[rule.Destination]; svc != nil && !slices.Contains(svc.IgnoredL7, "service-intentions") {
			svc.IgnoredL7 = append(svc.IgnoredL7, "service-intentions")
		}
	}
	b.problem(rule.Destination, kind, "intention %s => %s: %s", rule.Source, rule.Destination, why)
}

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
)

// Policy is a compiled set of intentions. It is immutable.
type Policy struct {
	generation uint64
	def        Action
	local      Identity
	to         map[string]rules // by destination
	peers      map[string]bool  // trust domains that intentions name
	httpLike   map[string]bool
}

// rules are the intentions for one destination, in order of precedence: those of one source each, by source, and those of all.
type rules struct{ named, all []Intention }

// Why says what decided. Its String is a sentence.
type Why uint8

const (
	ByDefault          Why = iota // no intention matches
	ByIntention                   // the intention's own action
	ByPermissions                 // the intention has HTTP permissions, which L4 cannot check: deny
	ByJWT                         // the intention wants a JWT of an http-like destination, which L4 cannot check: deny
	ByForeignDomain               // the source's trust domain is not ours, and no intention names it: deny
	ByForeignPartition            // the source's partition is not ours: deny
	ByNoName                      // source or destination has no name, or a wildcard for one: deny
)

func (w Why) String() string {
	switch w {
	case ByDefault:
		return "no intention matches, so the default decides"
	case ByIntention:
		return "the intention with the highest precedence that matches decides"
	case ByPermissions:
		return "the intention has HTTP permissions, which cannot be checked at L4: denied"
	case ByJWT:
		return "the intention requires a JWT, which cannot be checked at L4: denied"
	case ByForeignDomain:
		return "the source's trust domain is not this mesh's, nor of a peer that an intention names: denied"
	case ByForeignPartition:
		return "the source's partition is not this mesh's: denied"
	case ByNoName:
		return "the source or the destination does not name a service: denied"
	}
	return ""
}

// Verdict is the decision on one pair.
type Verdict struct {
	Allowed    bool
	Intention  *Intention // nil when no intention decided
	Why        Why
	Generation uint64
}

// Compile makes a Policy of intentions. def decides where none matches. local gives the trust domain and partition of this mesh; identities of
// any other are denied, but for the trust domains of peers that intentions name. httpLike holds the services whose protocol is HTTP or built on it. The errors of all intentions
// are joined, each naming the Origin.
//
// An intention for a peer or another partition is kept and shown, and never matches an identity of ours; nor does one of ours
// match a peer's.
func Compile(generation uint64, def Action, local Identity, httpLike map[string]bool, intentions []Intention) (*Policy, error) {
	p := &Policy{generation: generation, def: def, local: local, httpLike: maps.Clone(httpLike)}
	var err error
	if p.to, err = compiled(intentions); err != nil {
		return nil, err
	}
	p.peers = p.namedDomains()
	return p, nil
}

// With is what Compile makes with other intentions for some destinations, the keys of changed, and those of p for all others. It takes
// time for those that have changed, and little for each of the others.
func (p *Policy) With(generation uint64, changed map[string][]Intention) (*Policy, error) {
	next := *p
	next.generation, next.to = generation, maps.Clone(p.to)
	for destination, intentions := range changed {
		of, err := compiled(intentions)
		if err != nil {
			return nil, err
		}
		next.to[destination] = of[destination]
		if len(intentions) == 0 {
			delete(next.to, destination)
		}
	}
	next.peers = next.namedDomains()
	return &next, nil
}

// compiled checks intentions, and sorts them by destination and precedence.
func compiled(intentions []Intention) (map[string]rules, error) {
	sizes := make(map[string]int)
	for i := range intentions {
		sizes[intentions[i].Destination]++
	}
	room := make([]Intention, len(intentions))
	to, parts := make(map[string]rules, len(sizes)), make(map[string][]Intention, len(sizes))
	for destination, n := range sizes {
		parts[destination], room = room[:0:n], room[n:]
	}
	for i := range intentions {
		destination := intentions[i].Destination
		parts[destination] = append(parts[destination], intentions[i])
	}
	var errs []error
	for _, destination := range slices.Sorted(maps.Keys(parts)) {
		part := parts[destination]
		slices.SortStableFunc(part, byPrecedence)
		errs = append(errs, check(part)...)
		n := len(part)
		for n > 0 && part[n-1].Source == Wildcard {
			n--
		}
		to[destination] = rules{part[:n:n], part[n:]}
	}
	return to, errors.Join(errs...)
}

// check finds what is wrong with the intentions for one destination.
func check(sorted []Intention) (errs []error) {
	first := 0 // of the same source
	for i := range sorted {
		in := &sorted[i]
		if err := in.check(); err != nil {
			errs = append(errs, err)
			continue
		}
		if sorted[first].Source != in.Source {
			first = i
		}
		for j := range sorted[first:i] {
			if before := &sorted[first+j]; before.isOfSame(in) {
				errs = append(errs, fmt.Errorf("%s: intention %s => %s is already defined at %s: remove one of them", in.Origin, in.Source, in.Destination, before.Origin))
				break
			}
		}
	}
	return errs
}

// isOfSame says whether in and o are for the same sources, which have the same name.
func (in *Intention) isOfSame(o *Intention) bool {
	return in.SourcePeer == o.SourcePeer && orDefault(in.SourceNamespace) == orDefault(o.SourceNamespace) && samePartition(in.SourcePartition, o.SourcePartition)
}

// namedDomains are the trust domains of the peers that intentions name.
func (p *Policy) namedDomains() map[string]bool {
	domains := make(map[string]bool)
	for _, of := range p.to {
		for _, list := range [][]Intention{of.named, of.all} {
			for i := range list {
				if in := &list[i]; in.SourcePeer != "" && in.SourceDomain != "" && in.SourceDomain != p.local.TrustDomain {
					domains[in.SourceDomain] = true
				}
			}
		}
	}
	return domains
}

// IsOf says whether p is what Compile makes of these, but for the generation.
func (p *Policy) IsOf(def Action, local Identity, httpLike map[string]bool, intentions []Intention) bool {
	if p.def != def || p.local != local || p.Len() != len(intentions) || !maps.Equal(p.httpLike, httpLike) {
		return false
	}
	to, err := compiled(intentions)
	return err == nil && maps.EqualFunc(p.to, to, func(a, b rules) bool {
		return slices.Equal(a.named, b.named) && slices.Equal(a.all, b.all)
	})
}

func (in *Intention) check() error {
	for _, field := range []struct{ what, name string }{{"source", in.Source}, {"destination", in.Destination}} {
		if field.name == "" {
			return fmt.Errorf("%s: intention %s => %s has no %s", in.Origin, in.Source, in.Destination, field.what)
		}
		if field.name != Wildcard && strings.Contains(field.name, Wildcard) {
			return fmt.Errorf("%s: intention %s => %s: %s %q is a partial wildcard: write the whole name, or \"*\" for every service",
				in.Origin, in.Source, in.Destination, field.what, field.name)
		}
	}
	for _, name := range []string{in.SourceNamespace, in.SourcePartition, in.SourcePeer} {
		if strings.Contains(name, Wildcard) {
			return fmt.Errorf("%s: intention %s => %s: %q: only services may be wildcards", in.Origin, in.Source, in.Destination, name)
		}
	}
	return nil
}

// precedence is Consul's, as it numbers them without namespaces.
func (in *Intention) precedence() int {
	switch {
	case in.Source != Wildcard && in.Destination != Wildcard:
		return 9
	case in.Destination != Wildcard:
		return 8
	case in.Source != Wildcard:
		return 6
	}
	return 5
}

func byPrecedence(a, b Intention) int {
	return cmp.Or(cmp.Compare(b.precedence(), a.precedence()), cmp.Compare(a.Destination, b.Destination), cmp.Compare(a.Source, b.Source))
}

func samePartition(a, b string) bool { return orDefault(a) == orDefault(b) }

// Decide says whether src may connect to the service dst of this mesh. It does not allocate.
func (p *Policy) Decide(src Identity, dst string) Verdict {
	if why := p.stranger(src, dst); why != ByDefault {
		return Verdict{Why: why, Generation: p.generation}
	}
	for _, r := range p.candidates(src, dst) {
		if in := p.find(src, r); in != nil {
			why := p.apply(in, dst)
			return Verdict{Allowed: why == ByIntention && in.Action == Allow, Intention: in, Why: why, Generation: p.generation}
		}
	}
	return Verdict{Allowed: p.def == Allow, Why: ByDefault, Generation: p.generation}
}

// stranger says why no intention can let src in, or ByDefault when one could.
func (p *Policy) stranger(src Identity, dst string) Why {
	switch {
	case src.TrustDomain != p.local.TrustDomain && !p.peers[src.TrustDomain]:
		return ByForeignDomain
	case !samePartition(src.Partition, p.local.Partition):
		return ByForeignPartition
	case src.Service == "", src.Service == Wildcard, dst == "", dst == Wildcard:
		return ByNoName
	}
	return ByDefault
}

// apply says whether in's own action holds for the destination dst, or what about it cannot be checked.
func (p *Policy) apply(in *Intention, dst string) Why {
	switch {
	case in.Permissions:
		return ByPermissions
	case in.JWT && p.httpLike[dst]:
		return ByJWT
	}
	return ByIntention
}

// pair is a source and a destination, as intentions name them.
type pair struct{ source, destination string }

// candidates lists what could match, in order of precedence.
func (p *Policy) candidates(src Identity, dst string) [4]pair {
	return [4]pair{{src.Service, dst}, {Wildcard, dst}, {src.Service, Wildcard}, {Wildcard, Wildcard}}
}

// find is the intention for a pair that concerns src, or nil.
func (p *Policy) find(src Identity, of pair) *Intention {
	here := p.to[of.destination].named
	if of.source == Wildcard {
		here = p.to[of.destination].all
	}
	first := sort.Search(len(here), func(i int) bool { return here[i].Source >= of.source })
	for i := first; i < len(here) && here[i].Source == of.source; i++ {
		if p.concerns(&here[i], src) {
			return &here[i]
		}
	}
	return nil
}

// concerns says whether in is about sources where src is: in our own trust domain and partition, or in that of the peer it names.
func (p *Policy) concerns(in *Intention, src Identity) bool {
	if orDefault(in.SourceNamespace) != orDefault(src.Namespace) {
		return false
	}
	if in.SourcePeer != "" {
		return in.SourceDomain == src.TrustDomain && in.SourceDomain != p.local.TrustDomain
	}
	return src.TrustDomain == p.local.TrustDomain && samePartition(in.SourcePartition, p.local.Partition)
}

// Explanation is a Verdict with its reasons, for people.
type Explanation struct {
	Verdict
	Considered []*Intention // every intention that matches, in order of precedence: the first decides
	Sentence   string
}

// Explain is Decide with all that was considered.
func (p *Policy) Explain(src Identity, dst string) Explanation {
	e := Explanation{Verdict: p.Decide(src, dst)}
	if p.stranger(src, dst) == ByDefault {
		for _, r := range p.candidates(src, dst) {
			if in := p.find(src, r); in != nil {
				e.Considered = append(e.Considered, in)
			}
		}
	}
	switch {
	case e.Intention != nil && e.Why == ByIntention && len(e.Considered) == 1:
		e.Sentence = fmt.Sprintf("%s decides: it is the only one that matches", e.Intention)
	case e.Intention != nil && e.Why == ByIntention:
		e.Sentence = fmt.Sprintf("%s decides: it has the highest precedence of %d that match", e.Intention, len(e.Considered))
	case e.Intention != nil:
		e.Sentence = fmt.Sprintf("%s matches first; %s", e.Intention, e.Why)
	case e.Why == ByDefault:
		e.Sentence = fmt.Sprintf("%s: %s", e.Why, p.def)
	default:
		e.Sentence = e.Why.String()
	}
	return e
}

// Generation is the number that Compile was given.
func (p *Policy) Generation() uint64 { return p.generation }

// Default is the action where no intention matches.
func (p *Policy) Default() Action { return p.def }

// Len is the number of intentions.
func (p *Policy) Len() int {
	n := 0
	for _, of := range p.to {
		n += len(of.named) + len(of.all)
	}
	return n
}

// Intentions lists all intentions in order of precedence. The slice is the caller's.
func (p *Policy) Intentions() []Intention {
	list := make([]Intention, 0, p.Len())
	for _, of := range p.to {
		list = append(append(list, of.named...), of.all...)
	}
	slices.SortStableFunc(list, byPrecedence)
	return list
}

// String is "web => api (allow), intentions.hcl:3".
func (in *Intention) String() string {
	var peer, partition, namespace, origin string
	if in.SourcePeer != "" {
		peer = "peer " + in.SourcePeer + " "
	}
	if !isDefault(in.SourcePartition) {
		partition = in.SourcePartition + "/"
	}
	if !isDefault(in.SourceNamespace) {
		namespace = in.SourceNamespace + "/"
	}
	action := in.Action.String()
	switch {
	case in.Permissions:
		action = "permissions"
	case in.JWT:
		action += ", with a JWT"
	}
	if in.Origin != "" {
		origin = ", " + in.Origin
	}
	return peer + partition + namespace + in.Source + " => " + in.Destination + " (" + action + ")" + origin
}

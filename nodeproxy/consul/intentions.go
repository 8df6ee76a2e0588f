package consul

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/policy"
)

// maxQuery is how long the query of one question may be, in bytes. Consul reads a header of 1 MiB.
const maxQuery = 128 << 10

// The instances of all services are read, or cannot be, before the intentions of those of other nodes are first asked for. settleNames
// is how long names are collected at least; lookNames is for what cannot be read, which nothing tells of.
const (
	settleNames = 20 * time.Millisecond
	lookNames   = time.Second
)

// intention is what is used of one, out of some five times as much.
type intention struct {
	SourceName, SourceNS, SourcePartition, SourcePeer, SourceSamenessGroup string

	DestinationName string
	Action          api.IntentionAction
	Permissions     []json.RawMessage
	JWT             json.RawMessage
}

// matchAll keeps the intentions of all services in the mesh current, until ctx ends, by few queries of many names each.
func (r *run) matchAll(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	type query struct {
		list
		stop context.CancelFunc
	}
	var running []query
	defer func() {
		for _, q := range running {
			q.stop()
		}
	}()
	sorter := newSorter()
	all := false // the names are all asked about
	for {
		d := r.world.current()
		all = all || !r.isReading(&d) // each name that is read would have others asked about again
		if d.agent != nil && d.local != nil {
			wanted := sorter.lists(&d, r.leaves.needed(), all)
			goes := func(q query) bool { // a list that was not believed about one of its names so far begins anew
				return slices.ContainsFunc(wanted, func(l list) bool { return slices.Equal(l.names, q.names) && l.own == q.own }) &&
					(q.own || !slices.ContainsFunc(q.names, func(name string) bool { return d.apart[name] && !sorter.apart[name] }))
			}
			for _, q := range running {
				if !goes(q) {
					q.stop()
				}
			}
			running = slices.DeleteFunc(running, func(q query) bool { return !goes(q) })
			r.forgetIntentions(wanted, sorter.apart)
			for _, l := range wanted {
				if slices.ContainsFunc(running, func(q query) bool { return slices.Equal(l.names, q.names) && l.own == q.own }) {
					continue
				}
				asking, stop := context.WithCancel(ctx)
				running = append(running, query{l, stop})
				tasks.Go(func() { r.ask.watch(asking, r.matchTopic(asking, l)) })
			}
		}
		var look <-chan time.Time
		if !all {
			look = time.After(lookNames)
		}
		pause(ctx, settleNames)
		select {
		case <-ctx.Done():
			return
		case <-r.known:
		case <-look:
		}
	}
}

// isReading says whether services of the datacenter have not been read yet, and may be.
func (r *run) isReading(d *data) bool {
	return d.looks == nil || slices.ContainsFunc(d.names, func(name string) bool {
		return d.services[name] == nil && !r.world.hopeless(serviceFault(name), r.patience())
	})
}

// destinations are the names to ask about: of this node's services, and of others.
func destinations(d *data, needed []string) (own, others map[string]bool) {
	own, others = make(map[string]bool), make(map[string]bool)
	for _, name := range needed {
		own[name] = true
	}
	for _, s := range d.local {
		if s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil {
			own[s.Proxy.DestinationServiceName] = true
		} else if s.Connect != nil && s.Connect.Native {
			own[s.Service] = true
		}
	}
	for name, s := range d.services {
		if len(s.instances) > 0 && !own[name] {
			others[name] = true
		}
	}
	for name := range d.resolved() {
		if !own[name] {
			others[name] = true
		}
	}
	return own, others
}

// list is names that are asked about together.
type list struct {
	names []string
	own   bool // they are of this node's services: what another list says of them does not count
}

// sorter divides names into lists. When the intentions of one name change, Consul looks all names of its list up again, twice, and sends all
// that it finds: hence lists are short, above all those of this node's services, and a name stays in its list whichever others come
// and go. A name that becomes one of this node's services stays in the list of the others too, and is left out of what that asks next.
type sorter struct {
	parts    uint32          // of the others' names, a power of two, which only rises
	ownParts uint32          // of this node's, the same
	apart    map[string]bool // this node's
	others   map[string]bool
}

const (
	fewNames = 128 // that a list has at most, on average, unless there would be more than maxLists
	maxLists = 32  // without those that a query's length asks for

	fewOwn = 32 // the same of lists of this node's services, of which there are one or maxOwn
	maxOwn = 8
)

func newSorter() *sorter {
	return &sorter{parts: 1, ownParts: 1, apart: make(map[string]bool), others: make(map[string]bool)}
}

// lists are those to ask about now: with all, others than this node's too.
func (s *sorter) lists(d *data, needed []string, all bool) []list {
	own, others := destinations(d, needed)
	s.apart = own
	if len(own) > fewOwn {
		s.ownParts = maxOwn
	}
	lists := divide(own, s.ownParts, true)
	if !all {
		return lists
	}
	maps.DeleteFunc(s.others, func(name string, _ bool) bool { return !own[name] && !others[name] })
	maps.Copy(s.others, others)
	for s.parts < maxLists && int(s.parts)*fewNames < len(s.others) {
		s.parts *= 2
	}
	return append(lists, divide(s.others, s.parts, false)...)
}

// divide sorts names into lists by their hash.
func divide(names map[string]bool, parts uint32, own bool) (lists []list) {
	by := make([]map[string]bool, parts)
	for name := range names {
		h := fnv.New32a()
		h.Write([]byte(name))
		i := h.Sum32() % parts
		if by[i] == nil {
			by[i] = make(map[string]bool)
		}
		by[i][name] = true
	}
	for _, part := range by {
		for _, names := range split(part) {
			lists = append(lists, list{names, own})
		}
	}
	return lists
}

// split sorts names into lists that fit into a query each.
func split(names map[string]bool) [][]string {
	var lists [][]string
	size := maxQuery
	for _, name := range slices.Sorted(maps.Keys(names)) {
		length := len("&name=") + len(url.QueryEscape(name))
		if size += length; size > maxQuery {
			lists, size = append(lists, nil), length
		}
		lists[len(lists)-1] = append(lists[len(lists)-1], name)
	}
	return lists
}

func matchFault(names []string) string {
	if len(names) == 1 {
		return "the intentions of " + names[0]
	}
	return fmt.Sprintf("the intentions of %s and %d others", names[0], len(names)-1)
}

// matchTopic is the intentions of names, as long as asking lasts: later another list has some of them, which knows better.
func (r *run) matchTopic(asking context.Context, l list) topic {
	var names []string // that were asked about last
	return topic{what: matchFault(l.names), every: 20 * time.Millisecond,
		ask: func() question {
			names = l.names
			if !l.own {
				names = r.world.current().notApart(names)
			}
			return question{path: "/v1/connect/intentions/match", params: url.Values{"by": {"destination"}, "name": names}}
		},
		apply: func(a *answer) error {
			var found map[string][]intention
			if err := decode(a, &found); err != nil {
				return err
			}
			read := make(map[string][]rule, len(names))
			for _, name := range names {
				read[name] = rulesOf(name, found[name])
			}
			stranger := false
			r.world.intend(func(d *data) (policy, more bool) {
				if asking.Err() != nil {
					return false, false
				}
				more = d.defaultACL != a.defaultPolicy
				d.defaultACL = a.defaultPolicy
				for name, rules := range read {
					if d.apart[name] != l.own {
						continue
					}
					if old, known := d.intentions[name]; !known || !slices.Equal(old, rules) { // else they stay the very ones
						policy, d.intentions[name] = true, rules
					}
					stranger = stranger || slices.ContainsFunc(rules, func(in rule) bool { return in.SourcePeer != "" && !d.knowsPeer(in.SourcePeer) })
				}
				return policy, more
			})
			if stranger {
				wake(r.lookNow)
			}
			return nil
		},
		failed: func() { wake(r.known) }}
}

// notApart are those of names that are not asked about apart, or all where that would be none.
func (d data) notApart(names []string) []string {
	others := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return d.apart[name] })
	if len(others) == 0 {
		return names
	}
	return others
}

// forgetIntentions drops what is not asked for any more, and notes what is, and what of it apart.
func (r *run) forgetIntentions(wanted []list, apart map[string]bool) {
	names := make(map[string]bool)
	for _, l := range wanted {
		for _, name := range l.names {
			names[name] = true
		}
	}
	r.world.intend(func(d *data) (policy, more bool) {
		before := len(d.intentions)
		maps.DeleteFunc(d.intentions, func(name string, _ []rule) bool { return !names[name] })
		d.asked, d.apart = wanted, apart
		return len(d.intentions) < before, false
	})
}

// rule is an intention in the policy's form.
type rule struct {
	policy.Intention
	sameness bool // its source is a sameness group
}

// rulesOf turns the intentions of destination into rules. They share the text of their origin.
func rulesOf(destination string, all []intention) []rule {
	list := make([]rule, len(all))
	for i := range all {
		list[i] = all[i].rule(destination)
		if i > 0 && list[i].Origin == list[i-1].Origin {
			list[i].Origin = list[i-1].Origin
		}
	}
	return list
}

// rule turns an intention of destination into the policy's. Consul finds those of a service whatever the case of the entry's
// name, and so do all proxies that ask for them: the name that was asked for counts.
func (in *intention) rule(destination string) rule {
	if in.DestinationName == policy.Wildcard {
		destination = policy.Wildcard
	}
	r := rule{sameness: in.SourceSamenessGroup != "", Intention: policy.Intention{
		Source: in.SourceName, Destination: destination, Origin: "service-intentions " + in.DestinationName,
		SourceNamespace: in.SourceNS, SourcePartition: in.SourcePartition, SourcePeer: in.SourcePeer,
		Permissions: len(in.Permissions) > 0, JWT: len(in.JWT) > 0 && string(in.JWT) != "null",
	}}
	if in.Action == api.IntentionActionAllow {
		r.Action = policy.Allow
	}
	return r
}

// ruleKey tells a rule from others.
type ruleKey struct{ source, namespace, partition, peer, destination string }

func (r *rule) key() ruleKey {
	return ruleKey{r.Source, r.SourceNamespace, r.SourcePartition, r.SourcePeer, r.Destination}
}

// isOfStranger says whether r's source is in a peer of which too little is known.
func (r *rule) isOfStranger() bool { return r.SourcePeer != "" && r.SourceDomain == "" }

// why says what about r cannot be honoured, "" for nothing.
func (r *rule) why() string {
	switch {
	case r.Permissions:
		return "its Permissions cannot be checked at L4, so the pair is denied"
	case r.JWT:
		return "its JWT cannot be checked at L4, so the pair is denied where the destination speaks HTTP"
	case r.sameness:
		return "sameness groups are not supported, so it matches nobody"
	case strings.Contains(r.SourceNamespace, policy.Wildcard), strings.Contains(r.SourcePartition, policy.Wildcard):
		return "its source is a wildcard of namespaces or partitions, so it matches nobody"
	}
	return ""
}

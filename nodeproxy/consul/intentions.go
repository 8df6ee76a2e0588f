package consul

import (
	"context"
	"encoding/json"
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
// is how long names are collected meanwhile; lookNames is for what cannot be read, which nothing tells of.
const (
	settleNames = 20 * time.Millisecond
	lookNames   = time.Second
)

// intention adds to the library's struct what it leaves out.
type intention struct {
	api.Intention
	JWT json.RawMessage
}

// matchAll keeps the intentions of all services in the mesh current, until ctx ends. All names are in one query, or few:
// those of this node's own services first, so that they do not depend on what else the token may read.
func (r *run) matchAll(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	type query struct {
		names []string
		stop  context.CancelFunc
	}
	var running []query
	defer func() {
		for _, q := range running {
			q.stop()
		}
	}()
	all := false // the names are all asked about
	for {
		d := r.world.current()
		wanted, own := destinations(&d, r.leaves.needed())
		if all = all || !r.isReading(&d); !all { // each name that is read would have those before it asked about again
			wanted = wanted[:own]
		}
		if d.agent != nil && d.local != nil {
			for i := range max(len(wanted), len(running)) {
				switch {
				case i >= len(wanted):
					running[i].stop()
					continue
				case i < len(running) && slices.Equal(running[i].names, wanted[i]):
					continue
				case i < len(running):
					running[i].stop()
				default:
					running = append(running, query{})
				}
				asking, stop := context.WithCancel(ctx)
				running[i] = query{wanted[i], stop}
				tasks.Go(func() { r.ask.watch(asking, r.matchTopic(wanted[i])) })
			}
			running = running[:len(wanted)]
			r.forgetIntentions(wanted)
		}
		var look <-chan time.Time
		if !all {
			pause(ctx, settleNames)
			look = time.After(lookNames)
		}
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

// destinations are the names to ask about, in as many lists as there are queries. The first lists, so many, are of this node's
// services.
func destinations(d *data, needed []string) (lists [][]string, ofOwn int) {
	own := make(map[string]bool)
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
	others := make(map[string]bool)
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
	lists = split(own)
	return append(lists, split(others)...), len(lists)
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
	return "the intentions of " + names[0] + " to " + names[len(names)-1]
}

func (r *run) matchTopic(names []string) topic {
	params := url.Values{"by": {"destination"}, "name": names}
	return topic{what: matchFault(names), every: 20 * time.Millisecond,
		ask: func() question { return question{path: "/v1/connect/intentions/match", params: params} },
		apply: func(a *answer) error {
			var found map[string][]intention
			if err := decode(a, &found); err != nil {
				return err
			}
			stranger := false
			r.world.update(func(d *data) bool {
				d.defaultACL = a.defaultPolicy
				for _, name := range names {
					d.intentions[name] = rulesOf(name, found[name])
					stranger = stranger || slices.ContainsFunc(d.intentions[name], func(in rule) bool { return in.SourcePeer != "" && !d.knowsPeer(in.SourcePeer) })
				}
				return true
			})
			if stranger {
				wake(r.lookNow)
			}
			return nil
		}}
}

// forgetIntentions drops what is not asked for any more.
func (r *run) forgetIntentions(wanted [][]string) {
	names := make(map[string]bool)
	for _, list := range wanted {
		for _, name := range list {
			names[name] = true
		}
	}
	r.world.update(func(d *data) bool {
		before := len(d.intentions)
		maps.DeleteFunc(d.intentions, func(name string, _ []rule) bool { return !names[name] })
		return len(d.intentions) < before
	})
}

// rule is an intention in the policy's form. The library's takes five times the memory.
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

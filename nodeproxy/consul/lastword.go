package consul

import (
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// serfHealth is the check that Consul has of each node's agent.
const serfHealth = "serfHealth"

// blame says why an instance is critical where that says nothing about its application. unheard: checks have not run yet, as
// all have not when an agent restarts, which calls them critical until then. agentless: its node's agent is not reachable.
// Both can be. Whoever registers without an agent means what it writes.
func blame(checks api.HealthChecks) (unheard, agentless bool) {
	hasAgent := false
	for _, c := range checks {
		isAgent := c.CheckID == serfHealth
		hasAgent = hasAgent || isAgent
		switch {
		case c.Status != api.HealthCritical:
		case isAgent:
			agentless = true
		case isSilent(c):
			unheard = true
		default:
			return false, false
		}
	}
	return unheard && hasAgent, agentless
}

// isSilent says whether a critical check has not run: it has nothing to say, or still says what it persisted when it passed
// (loadChecks in agent/agent.go of Consul), or misses a service that the agent has not loaded yet (agent/checks/alias.go).
func isSilent(c *api.HealthCheck) bool {
	if c.CheckID == "_node_maintenance" || strings.HasPrefix(c.CheckID, "_service_maintenance:") || saysEnding(c) {
		return false // their reason is elsewhere
	}
	output := c.Output
	if rest, isAlias := strings.CutPrefix(output, "Aliased check "); isAlias {
		_, output, _ = strings.Cut(rest, " failing: ")
	}
	return output == "" || passed.MatchString(output) || missing.MatchString(output)
}

// passed matches what Consul's checks say when they pass (agent/checks of Consul).
var passed = regexp.MustCompile(`^(No checks found\.|All checks passing\.|(TCP|TCP\+TLS|UDP) connect \S+: Success|HTTP \S+ \S+: 2\d\d .*|HTTP2 ping was successful|gRPC check \S+: success)(\s|$)`)

var missing = regexp.MustCompile(`^Service \S+ could not be found on node`)

// maxSilence is how long an unheard instance may count as healthy: most checks run more often. A check that somebody calls
// critical without a word, as one with a TTL can be, is believed after it.
const maxSilence = 30 * time.Second

// keepLastWord makes instances of a service that are unheard as healthy as they were last known to be, for maxSilence: by old,
// which may be nil, or by an earlier daemon. Those that lack their agents, too, stay no more than agentless. One that was never
// heard of is not healthy.
func (r *run) keepLastWord(name string, old *service, found []endpoint) {
	for i := range found {
		e := &found[i]
		if !e.unheard {
			continue
		}
		e.silent = time.Now()
		if old != nil {
			if j := slices.IndexFunc(old.instances, e.is); j >= 0 && old.instances[j].unheard && !old.instances[j].agentless {
				e.silent = old.instances[j].silent
			}
		}
		was := time.Since(e.silent) < maxSilence && r.wasHealthy(name, old, e)
		e.healthy, e.agentless = was && !e.agentless, was && e.agentless
	}
}

// is says whether e and o are one instance at two times.
func (e *endpoint) is(o endpoint) bool { return o.node == e.node && o.proxyID == e.proxyID }

func (r *run) wasHealthy(name string, old *service, e *endpoint) bool {
	if old != nil {
		return slices.ContainsFunc(old.instances, func(was endpoint) bool {
			return e.is(was) && (was.healthy || was.agentless)
		})
	}
	if r.earlier == nil || r.earlier.snap.Services[name] == nil {
		return false
	}
	for _, was := range r.earlier.snap.Services[name].Instances {
		if was.Node == e.node && was.ID == e.id {
			return was.Healthy
		}
	}
	return false
}

// callLast makes the instances of services that have none that is healthy healthy, if all that is wrong with them is that their
// workloads are being stopped, or else that their agents are not reachable. Services that fail over do that instead.
func (b *builder) callLast() {
	for name, svc := range b.services {
		if slices.ContainsFunc(svc.Instances, func(i *catalog.Instance) bool { return i.Healthy }) {
			continue
		}
		if res := b.resolvers[name]; res != nil && len(res.Failover) > 0 {
			continue
		}
		var nodes []string
		ending := false
		for _, inst := range svc.Instances {
			if b.ending[inst] {
				inst.Healthy, ending = true, true
			}
		}
		for _, inst := range svc.Instances {
			if b.agentless[inst] && !ending {
				inst.Healthy = true
				nodes = append(nodes, inst.Node)
			}
		}
		if len(nodes) > 0 {
			slices.Sort(nodes)
			b.problem(name, "unreachable", "no instance of %q is healthy: those are called whose checks passed before the Consul agents of their nodes were lost: see the agents of %s", name, strings.Join(slices.Compact(nodes), ", "))
		}
	}
}

package consul

import (
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// unheard says whether an instance is critical only because of checks that have not run yet. An agent that restarts calls
// every check critical until then, without a word: that says nothing about the instance. Whoever registers without an agent
// means what it writes.
func unheard(checks api.HealthChecks) bool {
	silent, hasAgent := false, false
	for _, c := range checks {
		hasAgent = hasAgent || c.CheckID == serfHealth
		if c.Status != api.HealthCritical {
			continue
		}
		if !isSilent(c) {
			return false
		}
		silent = true
	}
	return silent && hasAgent
}

// serfHealth is the check that Consul has of each node's agent.
const serfHealth = "serfHealth"

// agentless says whether an instance is critical only because its node's agent is not reachable, which is not the
// application's fault.
func agentless(checks api.HealthChecks) bool {
	lost := false
	for _, c := range checks {
		if c.Status == api.HealthCritical {
			if c.CheckID != serfHealth {
				return false
			}
			lost = true
		}
	}
	return lost
}

func isSilent(c *api.HealthCheck) bool {
	switch {
	case c.CheckID == "_node_maintenance", strings.HasPrefix(c.CheckID, "_service_maintenance:"):
		return false // their reason is elsewhere
	case c.Output == "":
		return true
	}
	return strings.HasPrefix(c.Output, "Aliased check ") && strings.HasSuffix(c.Output, " failing: ") // and the other has no output
}

// maxSilence is how long an unheard instance may count as healthy: most checks run more often. A check that somebody calls
// critical without a word, as one with a TTL can be, is believed after it.
const maxSilence = 30 * time.Second

// keepLastWord makes instances of a service that are unheard as healthy as they were last known to be, for maxSilence: by old,
// which may be nil, or by an earlier daemon. One that was never heard of is not healthy.
func (r *run) keepLastWord(name string, old *service, found []endpoint) {
	for i := range found {
		e := &found[i]
		if !e.unheard {
			continue
		}
		e.silent = time.Now()
		if old != nil {
			if j := slices.IndexFunc(old.instances, e.is); j >= 0 && old.instances[j].unheard {
				e.silent = old.instances[j].silent
			}
		}
		e.healthy = time.Since(e.silent) < maxSilence && r.wasHealthy(name, old, e)
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

// callAgentless makes the instances of services that have none that is healthy healthy, if all that is wrong with them is
// that their agents are not reachable. Services that fail over do that instead.
func (b *builder) callAgentless() {
	for name, svc := range b.services {
		if slices.ContainsFunc(svc.Instances, func(i *catalog.Instance) bool { return i.Healthy }) {
			continue
		}
		if res := b.resolvers[name]; res != nil && len(res.Failover) > 0 {
			continue
		}
		var nodes []string
		for _, inst := range svc.Instances {
			if b.agentless[inst] {
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

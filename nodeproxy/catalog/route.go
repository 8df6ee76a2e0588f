package catalog

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/policy"
)

// Route says where calls go: the discovery chain of a service, or of an upstream.
type Route struct {
	Targets []*Target // never empty; the first that has a healthy instance is used
	Balance Balance
}

// Balance is how one of a target's instances is chosen.
type Balance string

// The policies of a service-resolver's LoadBalancer.
const (
	LeastRequest Balance = ""            // the less busy of two that are drawn
	RoundRobin   Balance = "round_robin" // one after the other
	Random       Balance = "random"
	SourceHash   Balance = "source_hash" // always the same for a source address, as long as it is there: maglev and ring_hash
)

// Target is the instances that may serve a call, under one identity.
type Target struct {
	Service    string
	Subset     string  // "" is all of the service
	Datacenter string  // "" is the snapshot's
	Peered     *Peered // nil: it is of this cluster

	Instances      []*Instance
	ConnectTimeout time.Duration // to one instance, 0 means the node's own limit

	// Gateway is how Instances of another datacenter are reached, where the caller's configuration does not say. In a
	// route of RouteOf it is how they are, and Instances are the gateways where it is through any.
	Gateway GatewayMode

	// Unreachable says why no instance can be dialled, whatever its health, and what to do; "" when they can.
	Unreachable string
}

// String names t as an SNI does: subset.service.datacenter, without what is empty, or service.external.peer.
func (t *Target) String() string {
	if t.Peered != nil {
		return t.Service + ".external." + t.Peered.Peer
	}
	return strings.Join(slices.DeleteFunc([]string{t.Subset, t.Service, t.Datacenter}, func(s string) bool { return s == "" }), ".")
}

// Usable says whether t has an instance that may be dialled.
func (t *Target) Usable() bool {
	return t.Unreachable == "" && slices.ContainsFunc(t.Instances, (*Instance).Usable)
}

// Usable says whether inst may be dialled: it is healthy and speaks mTLS.
func (inst *Instance) Usable() bool { return inst.Healthy && inst.Mesh.IsValid() }

// Preferred is the target that calls go to now, by health alone. Without a usable one it is the first.
func (r *Route) Preferred() *Target {
	if i := slices.IndexFunc(r.Targets, (*Target).Usable); i >= 0 {
		return r.Targets[i]
	}
	return r.Targets[0]
}

// GatewayMode is whether what is in another datacenter is reached through mesh gateways, and through whose.
type GatewayMode string

// The modes of a config entry's MeshGateway.
const (
	GatewayUnset  GatewayMode = "" // left to the next configuration that says; after the last: none
	GatewayNone   GatewayMode = "none"
	GatewayLocal  GatewayMode = "local"  // those of the caller's datacenter
	GatewayRemote GatewayMode = "remote" // those of the target's
)

// Through says whether the way goes through gateways.
func (m GatewayMode) Through() bool { return m == GatewayLocal || m == GatewayRemote }

// Upstream is an address at which one workload reaches a service, because its own registration says so.
type Upstream struct {
	At         netip.AddrPort // what the workload dials; it may be loopback
	Socket     string         // or the path of a unix socket
	SocketMode uint32         // permissions of that; 0: it is the workload's own user's
	Name       string         // of the service, or of the prepared query
	Query      bool
	Route
	Config CallConfig
}

// CallConfig is how a service calls another. The zero value of each field leaves it to the node.
type CallConfig struct {
	ConnectTimeout time.Duration // goes before the target's
	MaxConnections int           // of one workload, at once
	Ejection       *Ejection
	Gateway        GatewayMode // goes before the target's
}

// Ejection is when an instance that fails is not dialled for a while (PassiveHealthCheck).
type Ejection struct {
	Failures int           // in a row
	Base     time.Duration // for how long, times the ejections so far
	Interval time.Duration // it comes back at a multiple of it; 0 at once
	Percent  int           // of a target's instances that may be ejected at once; one always may
}

// over is c where it says something, else base.
func (c CallConfig) over(base CallConfig) CallConfig {
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, base.ConnectTimeout)
	c.MaxConnections = cmp.Or(c.MaxConnections, base.MaxConnections)
	c.Ejection = cmp.Or(c.Ejection, base.Ejection)
	c.Gateway = cmp.Or(c.Gateway, base.Gateway)
	return c
}

// Calls is how one service calls others: UpstreamConfig of its service-defaults.
type Calls struct {
	Defaults  CallConfig
	Overrides map[string]CallConfig // by the service that is called
}

// Call is how caller calls to.
func (s *Snapshot) Call(caller string, to Destination) CallConfig {
	var c CallConfig
	if calls := s.Calls[caller]; calls != nil {
		c = calls.Defaults
		if to.Upstream == nil || !to.Upstream.Query {
			c = calls.Overrides[to.Name()].over(c)
		}
	}
	if to.Upstream != nil {
		c = to.Upstream.Config.over(c)
	}
	return c
}

// TargetIdentity is the SPIFFE ID that the instances of t must have.
func (s *Snapshot) TargetIdentity(t *Target) policy.Identity {
	if t.Peered != nil {
		return t.Peered.Identity
	}
	id := s.Identity(t.Service)
	id.Datacenter = cmp.Or(t.Datacenter, id.Datacenter)
	return id
}

// Upstream finds what at stands for where a workload serves these local instances. Of several, the one of the first
// instance counts.
func (s *Snapshot) Upstream(instances []string, at netip.AddrPort) (Destination, bool) {
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	for _, id := range instances {
		for _, up := range s.Upstreams[id] {
			if up.Socket == "" && up.At == at {
				return Destination{Service: s.Services[up.Name], Upstream: up}, true
			}
		}
	}
	return Destination{}, false
}

// UpstreamSocket is Upstream for the path of a unix socket.
func (s *Snapshot) UpstreamSocket(instances []string, path string) (Destination, bool) {
	for _, id := range instances {
		for _, up := range s.Upstreams[id] {
			if path != "" && up.Socket == path {
				return Destination{Service: s.Services[up.Name], Upstream: up}, true
			}
		}
	}
	return Destination{}, false
}

// AllTargets yields every target of s, and each service with its own instances, as they are reached from here: directly,
// and through gateways. One may come several times.
func (s *Snapshot) AllTargets() iter.Seq[*Target] {
	return func(yield func(*Target) bool) {
		var all []*Route
		for _, svc := range s.Services {
			all = append(all, svc.Route(), svc.to(svc.Instances...))
		}
		for _, upstreams := range s.Upstreams {
			for _, up := range upstreams {
				all = append(all, &up.Route)
			}
		}
		for _, route := range all {
			for _, t := range route.Targets {
				for _, mode := range []GatewayMode{GatewayNone, GatewayLocal, GatewayRemote} {
					if !yield(s.reach(t, mode)) {
						return
					}
					if !t.isAway() {
						break
					}
				}
			}
		}
	}
}

// Route is where calls to the virtual addresses of svc go.
func (svc *Service) Route() *Route {
	if svc.Chain != nil {
		return svc.Chain
	}
	return svc.to(svc.Instances...)
}

// IsWhole says whether t is svc itself, with each of its instances.
func (svc *Service) IsWhole(t *Target) bool {
	return t.Service == svc.Name && t.Subset == "" && !t.isAway() && t.Unreachable == "" &&
		slices.EqualFunc(t.Instances, svc.Instances, func(a, b *Instance) bool {
			return a.ID == b.ID && a.Node == b.Node && a.Healthy == b.Healthy
		})
}

// to is the route to some of the instances of svc itself.
func (svc *Service) to(instances ...*Instance) *Route {
	return &Route{Targets: []*Target{{Service: svc.Name, Instances: instances, ConnectTimeout: svc.ConnectTimeout}}}
}

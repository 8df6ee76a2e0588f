// Package catalog holds the immutable Snapshot of all that a node knows of its mesh, and the contract of the sources that make one.
//
// A Snapshot is built whole by New, checked there, and never changed afterwards: readers keep it as long as they like
// without a lock. The package does no I/O.
package catalog

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/policy"
)

// Source makes snapshots: from a directory (package file) or from Consul.
type Source interface {
	// Run delivers a snapshot whenever something changed, in rising Generation, one call of deliver at a time, until ctx
	// ends. It returns nil then, or the error that keeps the source from ever delivering. What is only temporarily
	// wrong (a broken file, a server that is down) is not an error of Run: it is reported by Health, and the last good
	// snapshot stays in force.
	Run(ctx context.Context, deliver func(*Snapshot)) error

	// Need replaces the set of services that workloads of this node run as. The source keeps a leaf for each and
	// delivers a snapshot that has them. It may be called at any time, before and during Run, and does not block.
	Need(services []string)

	// Health says how fresh the source's data is and what is wrong with it now.
	Health() Health
}

// Caller is a Source that keeps the instances of a service fresher while workloads of this node call it.
type Caller interface {
	// Called says that a workload of this node is connecting to service. It may be called for every connection: it is
	// cheap, does not block, and what is called once in ten minutes stays fresh.
	Called(service string)
}

// Restorer is a Source that can begin with what an earlier daemon knew.
type Restorer interface {
	// Restore gives the source a snapshot of this node that was last known to be current at updated, before Run. While the
	// source cannot make one itself it delivers just this; its own have higher generations. Leaves of it that are still
	// valid are used until there are newer ones. An error says why it is not used.
	Restore(snap *Snapshot, updated time.Time) error
}

// Yielder is a Source that changes something outside of its process.
type Yielder interface {
	// Yield ends that, while the source runs: the node's next daemon does it from now on. It delivers as before.
	Yield()
}

// Ender is a Source that tells other nodes of this one's instances.
type Ender interface {
	// Ending says of each instance that workloads serve whether all of them are being stopped, each time that changes: such are to
	// get no new connections. It does not block.
	Ending(served map[string]bool)
}

// Health is a source's state as status shows it.
type Health struct {
	Kind     string    // "file" or "consul"
	Location string    // the directory or address
	Updated  time.Time // when the data in force was last known to be current
	Err      error     // what keeps newer data out, nil when all is well
	Restored bool      // the data in force is what an earlier daemon knew
}

// Snapshot is everything a node knows of its mesh at one moment. It is immutable.
type Snapshot struct {
	Generation  uint64 // rises with every snapshot of a source
	Taken       time.Time
	Node        string
	TrustDomain string // without scheme, as in the SPIFFE IDs
	Datacenter  string

	Roots  []*x509.Certificate         // every root to trust, the signing one first
	Leaves map[string]*tls.Certificate // by service name; chain with intermediates, Leaf parsed

	Services map[string]*Service
	Policy   *policy.Policy

	// VirtualRanges are the ranges from which virtual IPs are given out: an address in one that belongs to no service
	// is refused, so that it never leaves the node in plaintext.
	VirtualRanges []netip.Prefix

	// ClusterIPs are those of their Services' Ports that come from Kubernetes, with the services that they stand for.
	ClusterIPs map[netip.AddrPort]string

	// Contested are addresses that several services claim as their own virtual one: connections to them are refused.
	Contested []netip.AddrPort

	// Calls is how services of this node call others, by the caller's name; what is not there is left to the node.
	Calls map[string]*Calls

	// Gateways are the mesh gateways of datacenters to which calls go, and of this one: by datacenter, "" is the snapshot's.
	Gateways map[string][]*Instance

	// Peers are the other clusters whose services may be called, or may call.
	Peers []Peer

	// MeshOnly refuses connections of workloads to whatever is not in the mesh (MeshDestinationsOnly), but for Outside.
	MeshOnly bool
	Outside  []netip.AddrPort

	// Upstreams are addresses at which workloads that serve an instance, one of this node, reach services: by its ID.
	Upstreams map[string][]*Upstream

	// Labelled are the instances of this node that ask, in their registration, to be workloads.
	Labelled []Registered

	TLS TLS

	// Agents are where Consul's agents answer, which hand out identities: to everybody, unless ACLs are on.
	Agents []netip.AddrPort
	ACLs   bool

	// Problems are configuration that is ignored, refused or made stricter, for status and check.
	Problems []Problem

	virtual   map[netip.Addr]*Service
	ports     map[netip.AddrPort]*Service
	instances map[netip.AddrPort]*Instance
	mesh      map[netip.AddrPort]*Instance
	made      *struct{ _ byte } // by New, for this snapshot and those that are made of it
}

// Service is one name of the mesh.
type Service struct {
	Name       string
	Protocol   string // service-defaults Protocol, "tcp" when unset
	Virtual    []netip.Addr
	Ports      []netip.AddrPort // addresses that stand for the service on one port each: tagged "virtual", or ClusterIPs
	Instances  []*Instance
	MaxInbound int // MaxInboundConnections per instance, 0 is no limit

	Chain *Route // where calls to its virtual addresses go; nil: to the service itself

	ConnectTimeout time.Duration // service-resolver ConnectTimeout, 0 means the node's own limit
	Subsets        []string      // service-resolver Subsets: a client may name one in its SNI

	// IgnoredL7 names the HTTP-level configuration of this service that an L4 proxy cannot honour.
	IgnoredL7 []string
}

// Instance is one place where a service runs.
type Instance struct {
	ID         string
	Service    string
	Node       string
	Datacenter string // "" is the snapshot's
	Peer       string // "" is this cluster
	Local      bool   // on this node
	Healthy    bool   // by its checks; instances of other nodes are healthy until a dial fails

	Address netip.AddrPort // what the application is registered as
	Mesh    netip.AddrPort // where Connect mTLS is spoken for this instance alone; zero: it speaks no mTLS, undialable

	// Delivery is where the application listens, as its definition says: LocalServiceAddress and LocalServicePort. The
	// zero Addr means wherever the workload itself listens on Address's port. DeliverySocket, a path, goes before it.
	Delivery       netip.AddrPort
	DeliverySocket string

	// Native is a service that speaks Connect mTLS itself, at Mesh: its port is never steered and nothing is delivered to it,
	// and it has no Address, for plaintext must never be sent there.
	Native bool

	// Gateway is a place at which a gateway stands for the service, and for others: it tells them apart by SNI. It has a Mesh
	// address only, and makes no tunnels.
	Gateway bool

	// Probed are the ports at which a prober of this node checks the instance: the application's, or the mesh port.
	Probed []uint16

	// Tunnels is an instance that another nodeproxy serves: tunnels to it may be tried.
	Tunnels bool

	Permissive bool // plaintext is let in on the application's own port
	Tags       []string
	Meta       map[string]string
}

// Registered is an instance as it is registered, whether or not it is in the mesh.
type Registered struct {
	ID      string
	Service string
	Address netip.AddrPort // of the application
	Meta    map[string]string
}

// MetaMesh is the key of an instance's meta that asks for it to be a workload.
const MetaMesh = "nodeproxy"

// Problem is one thing in the mesh's configuration that an operator should know.
type Problem struct {
	Service string // "" when it concerns no single service
	Kind    string // "l7-ignored", "refused", "unsupported", "cluster-ip"
	Text    string // one sentence: what, where (file:line), and what to do
}

// New checks a snapshot and builds its indexes. It takes ownership of s. The errors of all that is wrong are joined.
func New(s Snapshot) (*Snapshot, error) {
	s.made = new(struct{ _ byte })
	s.virtual = make(map[netip.Addr]*Service, len(s.Services))
	s.ports = make(map[netip.AddrPort]*Service)
	s.instances = make(map[netip.AddrPort]*Instance)
	s.mesh = make(map[netip.AddrPort]*Instance)
	var errs []error
	for name, svc := range s.Services {
		if name != svc.Name {
			errs = append(errs, fmt.Errorf("service %q is filed under %q", svc.Name, name))
		}
		for _, ip := range svc.Virtual {
			if other, taken := s.virtual[ip]; taken {
				errs = append(errs, fmt.Errorf("virtual IP %s belongs to both %q and %q", ip, other.Name, name))
			}
			s.virtual[ip] = svc
		}
		for _, at := range svc.Ports {
			if other, taken := s.ports[at]; taken {
				errs = append(errs, fmt.Errorf("virtual address %s belongs to both %q and %q", at, other.Name, name))
			}
			s.ports[at] = svc
		}
		for _, inst := range svc.Instances {
			errs = append(errs, s.indexInstance(svc, inst)...)
		}
		errs = append(errs, checkRoute(name, svc.Route())...)
	}
	for _, upstreams := range s.Upstreams {
		for _, up := range upstreams {
			errs = append(errs, checkRoute(up.Name, &up.Route)...)
		}
	}
	for _, svc := range s.Services {
		for _, inst := range svc.Instances {
			if owner, taken := s.ports[inst.Address]; taken && inst.Address.IsValid() {
				errs = append(errs, fmt.Errorf("instance %q has address %s, a virtual address of %q", inst.ID, inst.Address, owner.Name))
			}
			if owner, taken := s.virtual[inst.Address.Addr()]; taken {
				errs = append(errs, fmt.Errorf("instance %q has address %s, the virtual IP of %q", inst.ID, inst.Address.Addr(), owner.Name))
			}
		}
	}
	if s.Policy == nil {
		errs = append(errs, errors.New("snapshot has no policy"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &s, nil
}

// WithPolicy is s with other intentions, as a newer snapshot. All else is shared.
func (s *Snapshot) WithPolicy(p *policy.Policy, generation uint64, taken time.Time) *Snapshot {
	next := *s
	next.Policy, next.Generation, next.Taken = p, generation, taken
	return &next
}

// WithLeaves is s with other certificates, as a newer snapshot. All else is shared.
func (s *Snapshot) WithLeaves(leaves map[string]*tls.Certificate, generation uint64, taken time.Time) *Snapshot {
	next := *s
	next.Leaves, next.Generation, next.Taken = leaves, generation, taken
	return &next
}

// SameCatalog says whether WithPolicy and WithLeaves made one of s and other of the other: services and addresses are the same.
func (s *Snapshot) SameCatalog(other *Snapshot) bool {
	return other != nil && s.made != nil && s.made == other.made
}

func (s *Snapshot) indexInstance(svc *Service, inst *Instance) []error {
	var errs []error
	if inst.Service != svc.Name {
		errs = append(errs, fmt.Errorf("instance %q of %q is listed under %q", inst.ID, inst.Service, svc.Name))
	}
	for _, at := range []struct {
		addr  netip.AddrPort
		index map[netip.AddrPort]*Instance
	}{{inst.Address, s.instances}, {inst.Mesh, s.mesh}} {
		if !at.addr.IsValid() || inst.Gateway {
			continue
		}
		if other, taken := at.index[at.addr]; taken {
			errs = append(errs, fmt.Errorf("%s is claimed by instance %q of %q and instance %q of %q: give one of them another address or port",
				at.addr, other.ID, other.Service, inst.ID, inst.Service))
		}
		at.index[at.addr] = inst
	}
	return errs
}

// checkRoute checks that each target of a route is under one identity.
func checkRoute(of string, route *Route) []error {
	var errs []error
	if len(route.Targets) == 0 {
		errs = append(errs, fmt.Errorf("a route of %q has no target", of))
	}
	for _, t := range route.Targets {
		for _, inst := range t.Instances {
			if inst.Service != t.Service || inst.Datacenter != t.Datacenter || inst.Peer != t.peer() {
				errs = append(errs, fmt.Errorf("instance %q of %q is in target %s", inst.ID, inst.Service, t))
			}
		}
	}
	return errs
}

// Destination is what an application's destination address stands for.
type Destination struct {
	Service  *Service  // nil for an upstream that is no service of this datacenter
	Instance *Instance // nil: any healthy instance will do
	Upstream *Upstream // nil: it is the same for every workload
}

// Name is what was dialled: the service's or the upstream's.
func (d Destination) Name() string {
	if d.Upstream != nil {
		return d.Upstream.Name
	}
	return d.Service.Name
}

// Route is where a call goes. One of an instance's own address goes to that instance.
func (d Destination) Route() *Route {
	switch {
	case d.Upstream != nil:
		return &d.Upstream.Route
	case d.Instance != nil:
		return d.Service.to(d.Instance)
	}
	return d.Service.Route()
}

// Resolve says what to stands for: a virtual IP on any port, another virtual address on its own, or the exact address of
// one instance. IPv4 and its v4-mapped form are the same address.
func (s *Snapshot) Resolve(to netip.AddrPort) (Destination, bool) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if svc, ok := s.virtual[to.Addr()]; ok {
		return Destination{Service: svc}, true
	}
	if svc, ok := s.ports[to]; ok {
		return Destination{Service: svc}, true
	}
	if inst, ok := s.instances[to]; ok {
		return Destination{Service: s.Services[inst.Service], Instance: inst}, true
	}
	return Destination{}, false
}

// Canaries are addresses that belong to no service, one at the end of each virtual range. They are redirected to the proxy
// like a virtual IP, and refused there: a connection to one shows that the way into the mesh works, and reaches nobody.
func (s *Snapshot) Canaries() []netip.Addr {
	var all []netip.Addr
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	for _, r := range s.VirtualRanges {
		for ip := lastOf(r); r.Contains(ip); ip = ip.Prev() {
			if _, given := s.virtual[ip]; !given && ip != broadcast {
				all = append(all, ip)
				break
			}
		}
	}
	return all
}

func lastOf(r netip.Prefix) netip.Addr {
	raw := r.Addr().AsSlice()
	for bit := max(r.Bits(), 0); bit < len(raw)*8; bit++ {
		raw[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(raw)
	return last
}

// InstanceByMesh returns the instance whose mTLS address is at.
func (s *Snapshot) InstanceByMesh(at netip.AddrPort) (*Instance, bool) {
	inst, ok := s.mesh[netip.AddrPortFrom(at.Addr().Unmap(), at.Port())]
	return inst, ok
}

// LocalInstances lists the instances of this node, by ID.
func (s *Snapshot) LocalInstances() []*Instance {
	var local []*Instance
	for _, svc := range s.Services {
		for _, inst := range svc.Instances {
			if inst.Local {
				local = append(local, inst)
			}
		}
	}
	slices.SortFunc(local, func(a, b *Instance) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return local
}

// Identity is the SPIFFE ID of service in this mesh.
func (s *Snapshot) Identity(service string) policy.Identity {
	return policy.Identity{TrustDomain: s.TrustDomain, Namespace: "default", Datacenter: s.Datacenter, Service: service}
}

// IsServiceName says whether a workload can be a service of that name. It becomes a segment of a SPIFFE ID.
func IsServiceName(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == '/' || r == '*' || r == 0x7f })
}

// Package workload knows which local service owns a cgroup, a network namespace and a socket.
//
// A workload is one cgroup with one outbound identity and any number of services by port. Providers claim workloads; the Manager grants the claims, finds
// the network namespaces of the workloads' processes and keeps the kernel (package redirect) in line.
package workload

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/dns"
)

// Mode says what an inbound plaintext connection to a workload's port meets.
type Mode uint8

const (
	Strict     Mode = iota // refused, counted
	Permissive             // let in, counted
)

func (m Mode) String() string {
	if m == Permissive {
		return "permissive"
	}
	return "strict"
}

// Mesh says what is done for a workload.
type Mesh uint8

const (
	Enabled  Mesh = iota // its connections are redirected, its ports guarded
	Observe              // nothing is redirected or refused: what would be is reported
	Disabled             // it is left alone, also inside an enrolled cgroup
)

func (m Mesh) String() string { return [...]string{"enabled", "observe", "disabled"}[m] }

// Claim is a provider's statement that a cgroup is a workload of a service.
type Claim struct {
	Cgroup   string     // absolute path of a directory on cgroup2
	Service  string     // whose identity its connections have; may be "" where Mesh is Disabled
	Also     []string   `json:",omitempty"` // further services that others reach in it, on ports of their own
	Name     string     `json:",omitempty"` // what people know it by, where that is not the cgroup: "pod shop/web-1"
	Provider string     // "config", "enroll", "systemd", "xattr", "kubernetes", "containers", "consul"; shown in status
	Mode     *Mode      // nil: the node's inbound.mode
	Access   Access     `json:",omitempty"` // to Consul's agents
	Mesh     Mesh       `json:",omitzero"`
	Ports    []uint16   `json:",omitempty"` // guarded besides those of the service's instances
	Exclude  Exclusions `json:",omitzero"`
	DNS      *bool      `json:",omitempty"` // whether names of the mesh are answered; nil: as dns.enabled says
	Proxied  bool       `json:",omitempty"` // no connection of its, either way, goes direct within the node
	Probed   []uint16   `json:",omitempty"` // to which probers may connect besides those of its service's instances
	Mapped   []Mapping  `json:",omitempty"` // ports of the node that lead to it
	Sockets  bool       `json:",omitempty"` // it has no processes: a service manager listens in it, in the node's network namespace
	Ending   bool       `json:",omitempty"` // it is being stopped: others are told, and nothing else changes
	Invalid  string     `json:",omitempty"` // why its labels cannot be understood: it is refused, and changes nothing
	Denied   string     `json:",omitempty"` // why it may not be that service: it is refused, and ends an enrolment
}

// Exclusions is what of a workload's connections is as if it were not enrolled.
type Exclusions struct {
	InboundPorts     []uint16       // not guarded
	OutboundPorts    []uint16       // not redirected, whatever the address
	OutboundNetworks []netip.Prefix // not redirected, whatever the port
}

// Mapping is an address of the node whose connections are led into a workload's network namespace by rules of the kernel or by
// somebody's proxy, as the published port of a container is.
type Mapping struct {
	Node netip.AddrPort // the unspecified address is every one of its family
	To   netip.AddrPort // in the namespace
}

// services are all that others reach in it.
func (c Claim) services() []string { return append([]string{c.Service}, c.Also...) }

// agrees says whether two claims of one cgroup ask for the same.
func (c Claim) agrees(o Claim) bool {
	return c.Service == o.Service && slices.Equal(c.Also, o.Also) && c.Mesh == o.Mesh && c.Access == o.Access && c.Proxied == o.Proxied && c.Sockets == o.Sockets && same(c.Mode, o.Mode) && same(c.DNS, o.DNS) && slices.Equal(c.Ports, o.Ports) && slices.Equal(c.Probed, o.Probed) && slices.Equal(c.Mapped, o.Mapped) &&
		slices.Equal(c.Exclude.InboundPorts, o.Exclude.InboundPorts) &&
		slices.Equal(c.Exclude.OutboundPorts, o.Exclude.OutboundPorts) &&
		slices.Equal(c.Exclude.OutboundNetworks, o.Exclude.OutboundNetworks)
}

func same[T comparable](a, b *T) bool {
	return (a == nil) == (b == nil) && (a == nil || *a == *b)
}

// Provider claims workloads.
type Provider interface {
	// Name is short and stable: it is shown in status and orders conflicting claims.
	Name() string
	// Run calls claim with the whole set of the provider's claims, first at once and then on every change, until ctx ends.
	Run(ctx context.Context, claim func([]Claim)) error
}

// Reporter is a Provider that knows when it does not see what it should.
type Reporter interface {
	Provider
	// Problem says what is wrong now and what to do, or nil. The claims made before stay in force meanwhile.
	Problem() error
}

// Workload is one granted claim. It is immutable; a claim that changes becomes a new Workload with a new ID.
type Workload struct {
	ID       uint32 // the kernel's name for it; never used again while our pins exist
	Cgroup   string
	Name     string   // what people know it by; "" where that is the cgroup
	Service  string   // whose identity its connections have
	Also     []string // further services that others reach in it
	Provider string
	Mode     Mode
	Mesh     Mesh
	Proxied  bool // no connection of its, either way, goes direct within the node
}

// Services are all that others reach in it, the one whose identity its connections have first.
func (w *Workload) Services() []string { return append([]string{w.Service}, w.Also...) }

// Application is where the connections of a local instance are delivered to, and whether that would succeed now.
type Application struct {
	Service  string
	Instance string
	Cgroup   string // of a workload that serves it
	Target   string // an address, or the path of a unix socket
	Err      error  // nil: a listener of the workload's own is there
}

// Namespace is a network namespace in which the daemon listens for workloads.
type Namespace struct {
	Cookie uint64 // SO_NETNS_COOKIE
	Inode  uint64 // of /proc/PID/ns/net
	Host   bool   // the daemon's own
}

// Origin is where an application's redirected connection was going, and whose it is.
type Origin struct {
	Workload    *Workload
	Instances   []string // of the workload's Service that it serves, by ID, in order: their upstreams are its own
	Namespace   *Namespace
	Client      netip.AddrPort // the application's own address as it would have been seen by the destination
	Destination netip.AddrPort // what the application dialled; IPv4 is never v4-mapped
	Socket      string         // the unix socket of an upstream that it connected to instead, "" for none
	PID         uint32
	Comm        string
	Cookie      uint64 // socket cookie of the application's socket
}

// Served is one local instance together with the workloads that may serve it in one network namespace.
type Served struct {
	Instance  string // instance ID
	Service   string
	Namespace *Namespace
	Workloads []*Workload
}

// Handler is called by a running Manager. All methods may be called concurrently.
type Handler interface {
	// ServeOutbound and ServeInbound accept from ln until it is closed, which the Manager does when ns or the daemon goes.
	// Connections outlive the call: their owner is the Handler.
	ServeOutbound(ns *Namespace, ln *net.TCPListener)
	ServeInbound(ns *Namespace, ln *net.TCPListener)

	// ServeUpstream accepts from ln, a unix socket of a workload, until it is closed. origin says whose a connection is.
	ServeUpstream(ln *net.UnixListener, origin func(*net.UnixConn) (*Origin, error))

	// Settle waits until what applications have begun is open or has failed, or ctx ends. No more of it is accepted by then.
	Settle(ctx context.Context)

	// Ending lists the instances here whose workloads are all being stopped, by ID in order, each time that changes. It does not block.
	Ending(instances []string)

	// Need says which services have workloads here, each time the set changes. It does not block.
	Need(services []string)

	// Verdict reports a connection that the kernel itself refused, or let in as plaintext. It does not block.
	Verdict(v KernelVerdict)

	// Direct reports a change of a connection that does not pass the proxy. It does not block.
	Direct(c DirectConnection)
}

// KernelVerdict is a decision that a BPF program took, or the end of a connection older than its workload's enrolment.
type KernelVerdict struct {
	Inbound     bool
	Allowed     bool // plaintext let in by permissive mode
	Observed    bool // nothing was done: Reason is why it would have been refused, or "" where it would have been redirected
	Reason      catalog.Reason
	Workload    *Workload // whose connection or port; nil when it is gone
	Source      netip.AddrPort
	Destination netip.AddrPort
	PID         uint32 // 0 inbound
	Comm        string
}

// State is what a Manager has done, for status.
type State struct {
	Workloads []WorkloadState
	Refused   []RefusedClaim
	Problems  []catalog.Problem // of the node's, not of one workload
	Providers []ProviderProblem
	Pins      string // directory
	Heartbeat time.Time
	Links     int
	Repairs   uint64 // of what somebody else changed in the kernel, since the daemon started
	Maps      []MapFill
	Counters  map[string]uint64 // the programs' own, since the maps were made
	Queries   *dns.Counts       // nil: DNS is not enabled
	Direct    DirectState
}

// WorkloadState is one enrolled workload.
type WorkloadState struct {
	Workload   *Workload
	State      string // "protected", "empty", "waiting", "unprotected", "leaving"
	Detail     string // what is wrong and what to do, when there is something
	Foreign    string // what kind of another proxy's rules redirect what it sends: redirect.ForeignRule's
	Namespaces []*Namespace
	Instances  []string
	Processes  int
	DNS        string // "on", "off: why", "" where DNS is not enabled
}

// RefusedClaim is a claim that was not granted.
type RefusedClaim struct {
	Claim Claim
	Why   string
}

// ProviderProblem is why a provider's claims may not be what they should be.
type ProviderProblem struct {
	Provider string
	Err      error
}

// MapFill is how full one map is.
type MapFill struct {
	Name         string
	Entries, Max int
}

// Package admin is the daemon's window for operators: the HTTP API on a unix socket, its client, the wire types of
// status, trace and explain, and the metrics. It never touches the data path: a slow reader loses trace lines, counted,
// and nothing else.
//
// The wire types are additive: fields are added, never renamed or removed, within /v1.
package admin

import (
	"cmp"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// Verdict is the decision on a connection.
type Verdict string

const (
	Allowed Verdict = "allowed"
	Denied  Verdict = "denied" // refused or cut, whatever the Reason
)

// The events of a connection. One that was opened is closed once; one that was denied was never open. A connection
// that is cut by a policy change closes with Verdict Denied.
const (
	EventOpen     = "open"
	EventClose    = "close"
	EventDenied   = "denied"
	EventObserved = "observed" // of a workload that is only watched: Verdict and Reason are what it would have met in the mesh
	EventHandover = "handover" // trace only: another daemon took over the node, as Detail says; no connection
	EventDropped  = "dropped"  // trace only: no connection, only Time and Dropped are set
)

// Direction is seen from the workload.
type Direction string

const (
	Outbound Direction = "outbound"
	Inbound  Direction = "inbound"
)

// Path is the way the bytes go.
type Path string

const (
	PathMTLS      Path = "mtls"      // plain Connect mTLS
	PathTunnel    Path = "tunnel"    // a stream of a warm tunnel between two nodeproxies
	PathDirect    Path = "direct"    // within the node, authorised in the kernel, not through the proxy
	PathPlaintext Path = "plaintext" // let in by permissive mode, or refused by strict mode
	PathNone      Path = "none"      // refused before a path was chosen
)

// Connection is one line of trace or of the access log.
type Connection struct {
	Event       string         `json:"event"` // EventOpen, EventClose, EventDenied; in a trace also EventDropped
	Time        time.Time      `json:"time"`
	ID          uint64         `json:"id"` // of the connection in this daemon; 0 when the kernel refused it
	Direction   Direction      `json:"direction"`
	Source      Endpoint       `json:"source"`
	Destination Endpoint       `json:"destination"`
	Path        Path           `json:"path"`
	Verdict     Verdict        `json:"verdict"`
	Reason      catalog.Reason `json:"reason,omitempty"`     // why denied or cut
	Detail      string         `json:"detail,omitempty"`     // the error in words
	Intention   string         `json:"intention,omitempty"`  // which intention decided: "web => api (allow), intentions.hcl:3"
	Generation  uint64         `json:"generation,omitempty"` // of the policy that decided
	// Sequence rises with every verdict of this daemon, so that verdicts of two generations can be put in order.
	Sequence uint64        `json:"sequence,omitempty"`
	Sent     uint64        `json:"sent"`     // bytes from the source to the destination
	Received uint64        `json:"received"` // bytes from the destination to the source
	Duration time.Duration `json:"duration_ns"`
	Repeated uint64        `json:"repeated,omitempty"` // access log only: how many more of the same were not logged
	// Handshake is how long TLS took, in an open or denied event; 0 where there was none.
	Handshake time.Duration `json:"handshake_ns,omitempty"`
	// RTT is the smoothed round trip time of a direct connection, in its close event.
	RTT time.Duration `json:"rtt_ns,omitempty"`
	// Dropped is, in an EventDropped line, how many events this reader of the trace was too slow for.
	Dropped uint64 `json:"dropped,omitempty"`
}

// Endpoint is one side of a connection.
type Endpoint struct {
	Service  string `json:"service,omitempty"`
	Instance string `json:"instance,omitempty"`
	Target   string `json:"target,omitempty"`   // what the service was resolved to, as subset.service.datacenter, where that differs
	Gateway  string `json:"gateway,omitempty"`  // the gateway's instance through which the bytes go, in the place of one of the service
	Identity string `json:"identity,omitempty"` // SPIFFE ID as authenticated
	Address  string `json:"address,omitempty"`  // ip:port; of a destination, what the application dialled
	Peer     string `json:"peer,omitempty"`     // ip:port actually dialled, when it differs
	Workload string `json:"workload,omitempty"` // cgroup path
	PID      uint32 `json:"pid,omitempty"`
	Comm     string `json:"comm,omitempty"`
}

// Sandbox is the network namespace of a pod, for POST /v1/sandbox/start and /v1/sandbox/stop.
type Sandbox struct {
	Namespace string `json:"namespace"` // of Kubernetes
	Pod       string `json:"pod"`
	UID       string `json:"uid"`
	Network   string `json:"network"` // a path at which the daemon finds the network namespace
}

// SandboxState answers POST /v1/sandbox/start.
type SandboxState struct {
	Meshed bool   `json:"meshed"`            // the pod is to be in the mesh
	NotYet string `json:"not_yet,omitempty"` // why it may not start
}

// Status answers GET /v1/status.
type Status struct {
	Version      string        `json:"version"`
	MapABI       int           `json:"map_abi"`
	Node         string        `json:"node"`
	Started      time.Time     `json:"started"`
	PID          int           `json:"pid"` // as the daemon sees itself
	Source       SourceStatus  `json:"source"`
	Policy       PolicyStatus  `json:"policy"`
	Workloads    []Workload    `json:"workloads"`
	Refused      []Refused     `json:"refused_claims"`
	Services     []Service     `json:"services"`
	Certificates []Certificate `json:"certificates"`
	Kernel       Kernel        `json:"kernel"`
	Connections  Connections   `json:"connections"`
	SameNode     SameNode      `json:"same_node"`
	Problems     []Problem     `json:"problems"`
	// Canaries are addresses that are redirected like virtual IPs, and belong to no service.
	Canaries []string `json:"canaries"`
	Store    Store    `json:"store"`
	// Observed is what the connections of workloads with mesh = observe would have met, since the daemon started.
	Observed []Observation `json:"observed"`
	// Goroutines of the daemon: what an idle one has more after a day than after a minute is a leak.
	Goroutines int `json:"goroutines"`
	// Stopping: no new connections are taken, the live ones may end by themselves.
	Stopping bool `json:"stopping,omitempty"`
	// Handover says from whom this daemon has the node; absent where no daemon ran when it started.
	Handover *Handover `json:"handover,omitempty"`
	// DNS counts the name queries of workloads; absent where dns.enabled is false.
	DNS *Queries `json:"dns,omitempty"`
}

// Health answers GET /v1/health.
type Health struct {
	NotReady string `json:"not_ready,omitempty"` // why nothing is served yet
	Hung     string `json:"hung,omitempty"`      // why the daemon is taken for hung
}

// Handover is how this daemon took over from the one before.
type Handover struct {
	From     string    `json:"from"` // its version
	PID      int       `json:"pid"`  // 0 where it is not seen from here
	At       time.Time `json:"at"`
	Draining bool      `json:"draining,omitempty"` // it still carries connections, or waits for limits.drain
}

// Queries counts name queries since the start of the daemon.
type Queries struct {
	Answered  uint64 `json:"answered"`  // from the mesh's definitions
	Forwarded uint64 `json:"forwarded"` // answered by the name server that the workload asked
	Failed    uint64 `json:"failed"`    // malformed, without an answer in time, or one too many
}

// SourceStatus is the control plane as this node sees it.
type SourceStatus struct {
	Kind       string    `json:"kind"`
	Location   string    `json:"location"`
	Generation uint64    `json:"generation"` // 0: no snapshot yet
	Updated    time.Time `json:"updated"`
	Error      string    `json:"error,omitempty"`
	// Restored: in force is what an earlier daemon of this node knew; the source has not answered this one yet.
	Restored bool `json:"restored,omitempty"`
}

// Store is where the last snapshot is kept for a daemon that starts while the source is away.
type Store struct {
	Kind       string    `json:"kind"`             // "kernel memory (BPF map)", or "none"
	Generation uint64    `json:"generation"`       // of the snapshot that is kept; 0: this daemon has kept none yet
	Bytes      int       `json:"bytes"`            // its size
	Written    time.Time `json:"written"`          // when
	Detail     string    `json:"detail,omitempty"` // why nothing is kept, or need be
}

// PolicyStatus is the newest policy that is in force on every path: the proxy decides by it, and what it denies of the
// connections that do not pass the proxy is ended. Verdicts may be of a newer one already.
type PolicyStatus struct {
	Generation uint64 `json:"generation"` // 0: none yet
	Default    string `json:"default"`    // "allow" or "deny"
	Intentions int    `json:"intentions"`
}

// Workload is one enrolled cgroup.
type Workload struct {
	ID         uint32   `json:"id"`
	Service    string   `json:"service"`               // whose identity its connections have
	Also       []string `json:"also_serves,omitempty"` // further services that others reach in it
	Cgroup     string   `json:"cgroup"`
	Name       string   `json:"name,omitempty"` // what people know it by, where that is not the cgroup: "pod shop/web-1"
	Provider   string   `json:"provider"`
	Mesh       string   `json:"mesh"` // "enabled", "observe", "disabled"
	Mode       string   `json:"mode"`
	State      string   `json:"state"` // "protected", "empty" (no process), "waiting" (for a certificate), "unprotected", "leaving" (un-enrolled, the hooks are not detached yet)
	Detail     string   `json:"detail,omitempty"`
	Foreign    string   `json:"foreign_redirect,omitempty"` // another proxy's rules redirect what it sends: how that proxy's chains begin ("CONSUL_PROXY_"), or "redirect"
	Namespaces []uint64 `json:"network_namespaces"`         // inodes
	Instances  []string `json:"instances"`                  // of the services, served from here
	Processes  int      `json:"processes"`
	DNS        string   `json:"dns,omitempty"` // "on", "off: why"; absent where dns.enabled is false
}

// Services names all that others reach in w, Service first, with commas.
func (w *Workload) Services() string {
	return strings.Join(append([]string{w.Service}, w.Also...), ",")
}

// Known is what people know w by.
func (w *Workload) Known() string { return cmp.Or(w.Name, w.Cgroup) }

// Unprotected says whether processes of w run outside the mesh although they were claimed for it.
func (w *Workload) Unprotected() bool { return w.State == "unprotected" || w.State == "waiting" }

// Refused is a claim that was not granted.
type Refused struct {
	Cgroup   string   `json:"cgroup"`
	Name     string   `json:"name,omitempty"`
	Service  string   `json:"service"`
	Also     []string `json:"also_serves,omitempty"`
	Provider string   `json:"provider"`
	Why      string   `json:"why"`
}

// Known is what people know the workload by.
func (r *Refused) Known() string { return cmp.Or(r.Name, r.Cgroup) }

// Services names all that the claim asked for, Service first, with commas.
func (r *Refused) Services() string { return strings.Join(append([]string{r.Service}, r.Also...), ",") }

// Service is one name of the mesh.
type Service struct {
	Name      string     `json:"name"`
	Virtual   []string   `json:"virtual_ips"`
	Ports     []string   `json:"virtual_addresses,omitempty"` // ip:port
	Instances []Instance `json:"instances"`
	Balance   string     `json:"balance,omitempty"` // "" is the less busy of two
	Targets   []Target   `json:"targets,omitempty"` // where its calls go, where a service-resolver says
}

// Target is one place where calls go. Of several, the first that has a healthy instance is in use.
type Target struct {
	Name      string     `json:"name"`     // subset.service.datacenter, without what is the default
	Identity  string     `json:"identity"` // that its instances must have
	InUse     bool       `json:"in_use"`
	Instances []Instance `json:"instances"`
	Why       string     `json:"unreachable,omitempty"` // why no instance can be dialled
	// Gateway is "local" or "remote" where the way goes through mesh gateways, which are Instances then.
	Gateway string `json:"mesh_gateway,omitempty"`
}

// Instance is one place where a service runs.
type Instance struct {
	ID      string `json:"id"`
	Node    string `json:"node"`
	Local   bool   `json:"local"`
	Address string `json:"address,omitempty"`      // of the application; it may have none
	Mesh    string `json:"mesh_address,omitempty"` // where it can be dialled
	Healthy bool   `json:"healthy"`
	Gateway bool   `json:"gateway,omitempty"` // it stands for instances that are behind it
	Ejected string `json:"ejected,omitempty"` // why it is not dialled now, after failed dials
}

// Certificate is the leaf of one local service.
type Certificate struct {
	Service   string    `json:"service"`
	Identity  string    `json:"identity"`
	Serial    string    `json:"serial,omitempty"` // in hexadecimal, as openssl shows it
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Error     string    `json:"error,omitempty"`
}

// Application is where the connections of a local instance are delivered to.
type Application struct {
	Service  string `json:"service"`
	Instance string `json:"instance"`
	Workload string `json:"workload"`
	Target   string `json:"target,omitempty"` // an address, or the path of a unix socket
	Error    string `json:"error,omitempty"`  // why nothing would be delivered now
}

// Kernel is what is pinned.
type Kernel struct {
	Pins      string      `json:"pins"`
	Heartbeat time.Time   `json:"heartbeat"`
	Links     int         `json:"links"`
	Repairs   uint64      `json:"repairs"` // of what somebody else changed there, since the daemon started
	Maps      []KernelMap `json:"maps"`
	// Counters are the programs' own, since the maps were made: also while no daemon ran.
	Counters map[string]uint64 `json:"counters"`
}

// Names of Counters.
const (
	CounterUnprotectedUDP = "unprotected_udp" // datagrams to the ports of workloads: they are let in
	CounterEventsLost     = "events_lost"     // verdicts of the kernel that the trace does not show: the daemon was too slow
)

// KernelMap is the fill of one map.
type KernelMap struct {
	Name    string `json:"name"`
	Entries int    `json:"entries"`
	Max     int    `json:"max"`
}

// Connections counts the live ones.
type Connections struct {
	Active int    `json:"active"`
	Max    int    `json:"max"`
	Opened uint64 `json:"opened"`
	Denied uint64 `json:"denied"`
	// Tunnels are those without a stream: they are not among Active.
	Tunnels Tunnels `json:"idle_tunnels"`
	// SourceAddressRejected counts the streams whose source address was claimed and not shown to the application.
	SourceAddressRejected uint64 `json:"source_address_rejected,omitempty"`
}

// Tunnels counts tunnels; each has one socket, and an inbound one a goroutine.
type Tunnels struct {
	Outbound int `json:"outbound"`
	Inbound  int `json:"inbound"`
}

// SameNode is the path of connections between workloads of this node.
type SameNode struct {
	Path      Path   `json:"path"` // PathDirect, where explain does not say otherwise of a pair, or PathMTLS
	NotDirect string `json:"not_direct,omitempty"`
	Grants    int    `json:"grants"`   // addresses that workloads may dial directly
	Active    int    `json:"active"`   // direct connections
	Settling  bool   `json:"settling"` // not every pair has been looked at yet
}

// Problem is something the operator should know.
type Problem struct {
	Service string `json:"service,omitempty"`
	Kind    string `json:"kind"`
	Text    string `json:"text"`
}

// Observation counts the connections of a pair, of which one side is only watched, that would have met the same in the mesh.
type Observation struct {
	Source      string         `json:"source"`      // "": no workload of this node
	Destination string         `json:"destination"` // "": no service
	Direction   Direction      `json:"direction"`
	Verdict     Verdict        `json:"verdict"`
	Reason      catalog.Reason `json:"reason,omitempty"` // why it would have been denied
	Connections uint64         `json:"connections"`
	Last        time.Time      `json:"last"`
	Example     string         `json:"example"` // addresses of the last one
}

// Explanation answers GET /v1/explain?source=S&destination=D.
type Explanation struct {
	Source      string     `json:"source"`
	Destination string     `json:"destination"`
	Allowed     bool       `json:"allowed"`
	Why         string     `json:"why"`                 // one sentence
	Intention   string     `json:"intention,omitempty"` // the one that decides
	Considered  []string   `json:"considered"`          // every intention that matches, in order of precedence
	Generation  uint64     `json:"generation"`
	Path        Path       `json:"path"`
	Gateway     string     `json:"gateway,omitempty"`    // a gateway's instance through which they may go
	NotDirect   string     `json:"not_direct,omitempty"` // why it is not PathDirect, where the destination has an instance on this node
	Virtual     []string   `json:"virtual_ips"`
	Instances   []Instance `json:"instances"`
	Targets     []Target   `json:"targets,omitempty"` // of the discovery chain, where it is not just the service
	Balance     string     `json:"balance,omitempty"`
	Missing     []string   `json:"missing"` // what would make the connection fail now, each with what to do
	Ignored     []string   `json:"ignored"` // HTTP-level configuration of the destination that an L4 proxy cannot honour
}

// EnrollRequest is the body of POST /v1/enroll and /v1/unenroll.
type EnrollRequest struct {
	Cgroup  string   `json:"cgroup"`
	Service string   `json:"service,omitempty"`
	Also    []string `json:"also_serves,omitempty"` // further services that others reach in it
	Mode    string   `json:"mode,omitempty"`        // "strict", "permissive" or "" for the node's
}

// Package config reads the daemon's configuration: one file, or a directory of them, in HCL or JSON; checked and with
// defaults filled in. It only reads. A key that is unknown, set twice, out of range, or whose mechanism this version
// does not have, is an error that names file and line; nothing is silently accepted.
package config

import (
	"cmp"
	"log/slog"
	"net/netip"
	"strings"
	"time"
)

// Mode says what plaintext to a workload's port meets.
type Mode string

const (
	Strict     Mode = "strict"     // refused
	Permissive Mode = "permissive" // let in, counted
)

// Config is a complete, checked configuration.
type Config struct {
	Node    Node
	Source  FileSource
	Consul  *ConsulSource // nil: Source is the source
	Cgroups []Cgroup      // the workloads.cgroup blocks, by label
	Systemd bool          // units with a section [X-NodeProxy] are workloads
	Xattr   bool          // cgroups with attributes trusted.nodeproxy.* are workloads
	Pods    *Kubernetes   // labelled pods are workloads; nil: they are not
	Inbound Inbound

	Containers *Containers // labelled containers are workloads; nil: they are not
	Registered bool        // instances whose meta in Consul says so are workloads

	VirtualCIDRs []netip.Prefix // where addresses tagged "virtual" are believed, with Consul

	Tunnels     bool // to and from other nodeproxies
	Direct      bool // same_node = "direct": within the node the kernel authorises, where it can
	PreferLocal bool // instances of this node before others
	// FailOpen is on_failure = "open": while no daemon runs, instances are dialled in plaintext and strict ports are open.
	FailOpen bool

	// Existing is how long workloads keep the connections that they have when they are enrolled; nil: until they end.
	Existing *time.Duration

	DNS    bool // names of the mesh are answered in workloads
	Limits Limits
	Log    Log
	Admin  Admin
	State  State
}

// Location is where the source is: a directory, or an agent's address.
func (c *Config) Location() string {
	if c.Consul != nil {
		return cmp.Or(c.Consul.Address, strings.Join(c.Consul.Servers, ", "))
	}
	return c.Source.Path
}

// Node is who this node is in the mesh.
type Node struct {
	Name    string     // a DNS label
	Address netip.Addr // where other nodes reach it
}

// FileSource is the source "file" block.
type FileSource struct {
	Path       string       // the directory of definitions
	VirtualIPs netip.Prefix // from which services get their virtual IPs
}

// ConsulSource is the source "consul" block. Paths are "" where they are not set.
type ConsulSource struct {
	Address                   string   // of the node's agent: host:port, or a URL with http, https or unix; "" where there is none
	Servers                   []string // where there is no agent: host:port, or URLs with http or https
	ServicesDir               string   // and where the node's services are defined then
	AuthMethod, BearerToken   string   // the latter the path of a file
	TokenFile, TokenDir       string
	Datacenter                string // "" is the agent's
	CAFile, CertFile, KeyFile string
	VirtualIPs                netip.Prefix // from which Consul's servers give out virtual IPs
}

// Cgroup is one workload that the configuration names.
type Cgroup struct {
	Label   string
	Path    string // absolute, on cgroup2; it need not exist yet
	Service string
	Also    []string // also_serves: further services that others reach in it
	Mode    Mode     // "" is the node's
	Consul  string   // consul_access: "allow", "refuse", or "" for what fits
}

// Kubernetes is the workloads.kubernetes block.
type Kubernetes struct {
	Node       string // this node's name in the cluster
	Kubeconfig string // "" is what Kubernetes gives to a pod
	// Namespaces are the services that pods of each namespace may be. A pod's is its service account's name.
	Namespaces map[string][]string
	// DaemonSet is of which the daemon is a pod, "" where it is none.
	DaemonSet, DaemonSetNamespace string
	// CNI is where the plugin is installed that holds the start of pods until they are protected; nil: it is not.
	CNI *CNI
}

// CNI is the workloads.kubernetes.cni block.
type CNI struct{ ConfDir, BinDir string }

// Containers is the workloads.containers block.
type Containers struct {
	Allow  []string // the services that containers may be
	Engine string   // "docker" or "containerd": which API is spoken at the socket
	Socket string   // path of the engine's
}

// Inbound is how connections from other nodes come in.
type Inbound struct {
	Mode                Mode
	FirstPort, LastPort uint16 // given to local instances to speak mTLS on

	PlaintextFrom []netip.Prefix // networks whose plaintext strict ports take

	Probers []string // cgroup2 directories of those who check applications in plaintext, besides Consul's agent
}

// Limits bound what the daemon holds and how long it waits.
type Limits struct {
	Connections, PerWorkload int // live at once
	Handshake, Connect       time.Duration
	Idle                     time.Duration // without a byte either way; 0 is for ever
	Drain                    time.Duration // how long live connections may go on after SIGTERM
}

// Log is what is logged, and how.
type Log struct {
	Level  slog.Level
	Format string // "text" or "json"
	Access string // "none", "denied" or "all"
}

// Admin is how operators reach the daemon.
type Admin struct {
	Socket  string // absolute path
	Metrics string // host:port, "" for none
}

// State is where the daemon keeps what outlives it.
type State struct {
	Dir  string
	Pins string // on a bpffs; the node's own are below it
}

# Every key of nodeproxy's configuration, with its default unless it says "required" or "example".
# HCL version 1, or the same in JSON. --config takes this file, or a directory whose .hcl and .json files are merged; no key may
# be set in two of them. Unknown keys are errors. "nodeproxy check --config PATH" tries a configuration without running it;
# changes take effect when the daemon is restarted.
#
# Lines that begin with "not yet:" are keys of which this version has no mechanism. It refuses them, and accepts them only with
# the value that stands for "off".

# Who this node is in the mesh. What is not set is taken from the environment, as the downward API fills it in: name from NODE_NAME
# (spec.nodeName, dots become hyphens), address from NODE_ADDRESS (status.hostIP). In the cluster the node is called as NODE_NAME
# says, or else as name does.
node {
  name    = "node-1"   # required: letters, digits and hyphens. Pins, definitions and the daemon's cgroup are named after it
  address = "10.0.0.5" # required: the IP address by which other nodes reach this one
}

# What the mesh is. Exactly one source is required.

# A directory of Consul's own service definitions and config entries, shared by all nodes of the mesh, with a built-in CA.
# Whoever can write there decides everything; whoever can read ca/key.pem can be any service.
source "file" {
  path        = "/etc/nodeproxy/mesh.d" # required
  virtual_ips = "240.0.0.0/8"           # every service gets an address from it. The same on all nodes
}

# Or Consul, by the client agent of this node: see docs/consul.md.
#
# source "consul" {
#   mode        = "agent"
#   address     = "127.0.0.1:8500"            # or http://, https://, unix:///path
#   token_file  = "/etc/nodeproxy/token"      # example
#   token_dir   = "/etc/nodeproxy/tokens.d"   # example: one file for each service, with the token for its certificate
#   datacenter  = "dc1"                       # example: an agent of another one is refused
#   ca_file     = "/etc/nodeproxy/ca.pem"     # example: whom to trust as the agent, with https://
#   cert_file   = "/etc/nodeproxy/cert.pem"   # example: what to show to the agent
#   key_file    = "/etc/nodeproxy/key.pem"    # example
#   virtual_ips = "240.0.0.0/4"
#   namespace   = "default"
#   partition   = "default"
#   not yet: namespace = "team"
#   not yet: partition = "team"
# }
#
# On a node without an agent it has, in the place of address:
#
#   mode              = "servers"
#   addresses         = ["https://10.0.0.11:8501", "https://10.0.0.12:8501"]
#   services_dir      = "/etc/nodeproxy/services.d"   # the node's service definitions
#   auth_method       = "nodes"                       # in the place of token_file
#   bearer_token_file = "/etc/nodeproxy/bearer"

# Which cgroups are which service. Others are not touched. "nodeproxy enroll" names more, without a restart.
workloads {
  cgroup "web" {                                          # example. The label is only a name for this block
    path    = "/sys/fs/cgroup/system.slice/web.service"   # required: on cgroup2. It need not exist yet
    service = "web"                                       # required: what it is, and calls others as
    also_serves = ["web-admin"]                           # example: further services that others reach in it, on ports of their own
    mode    = "strict"                                    # default: inbound.mode
    consul_access = "refuse"                              # default: allow where ACLs are on, and for native services
  }
  systemd {
    enabled = false # services with a section [X-NodeProxy] in their unit file or a drop-in: see docs/labels.md
  }
  xattr {
    enabled = false # cgroups with extended attributes trusted.nodeproxy.*: see docs/labels.md
  }
  kubernetes {
    enabled = false # pods of this node with the label nodeproxy.io/mesh, their own or their namespace's: see docs/labels.md
    kubeconfig = "/etc/kubernetes/nodeproxy.conf" # example: how the API server is reached; default: as a pod is
    cni {
      enabled  = false            # the start of pods is held until they are protected: see docs/kubernetes.md
      conf_dir = "/etc/cni/net.d" # the network configuration, of which the first list is the runtime's
      bin_dir  = "/opt/cni/bin"
    }
    namespace "shop" {           # example: one block for each namespace
      services = ["web", "cart"] # what its pods may be. A pod is what its service account is called
    }
  }
  containers {
    enabled = false # containers with labels nodeproxy.io/<key>: see docs/labels.md
    allow   = ["web", "cart"]    # example: what containers may be, whatever their labels say
    engine  = "docker"           # docker, podman too | containerd: its own, neither Docker's nor a kubelet's
    socket  = "/run/docker.sock" # of podman: "/run/podman/podman.sock"; with containerd "/run/containerd/containerd.sock"
  }
  consul {
    enabled = false # instances registered in Consul with meta nodeproxy = "enabled", tasks of Nomad among them: see docs/labels.md
  }
}

# What connections to workloads meet.
inbound {
  mode           = "strict"      # strict: plaintext is refused. permissive: it is let in, and counted
  ports          = "21500-21999" # each local instance gets one, to speak mTLS on. Not 21000-21255, which are Consul's agent's
  plaintext_from = []            # networks whose plaintext strict ports take, as ["10.0.0.0/28"]
  probers        = []            # cgroups of those who check applications in plaintext, besides the node's Consul agent
}

# How the bytes go between two workloads of this node. direct: from one application to the other, authorised in the kernel; where
# it is not possible (nodeproxy explain says why), and with mtls always, through the proxy.
same_node = "direct"
tunnels = true # warm connections between nodeproxies carry what is between nodes; false: plain Connect mTLS
# Instances of this node are tried before others. With false a virtual IP goes direct only if every healthy instance is on this node.
prefer_local = true

# While no daemon runs: closed refuses what needs one. open lets instances be dialled in plaintext and opens strict ports, and
# still refuses virtual IPs.
on_failure = "closed"

# With Consul: networks whose addresses stand for a service where its instances are tagged "virtual" with them, on the tagged
# port: Kubernetes ClusterIPs, as ["10.96.0.0/12"]. Virtual IPs assigned by hand may be in them too.
virtual_cidrs = []

# What becomes of connections that a workload has when it is enrolled. keep: they go on outside the mesh until they end. reset: those
# that the mesh would redirect or refuse are reset, the others go on. "10m": the same, that long after the enrolment, whether or
# not the daemon is restarted meanwhile; "reset" leaves those of workloads that an earlier daemon enrolled. Needs a kernel with CONFIG_INET_DIAG_DESTROY: see "nodeproxy check". MPTCP connections and sockets that were
# made before their process was in the cgroup are not found.
existing_connections = "keep"

# What is above a limit is refused with the reason "capacity". Durations have a unit: "500ms", "5s", "1h".
limits {
  connections  = 100000 # on the node. Each takes two file descriptors and a bit: see RLIMIT_NOFILE in "nodeproxy check"
  per_workload = 20000
  handshake    = "5s"
  connect      = "5s"   # of one attempt to reach an instance or the application
  idle         = "0s"   # without a byte either way; 0s: for ever
  drain        = "30s"  # how long live connections may go on after SIGTERM
}

# Answers the names of the mesh to workloads, whichever name server they ask: see docs/dns.md.
dns {
  enabled = false
}

# The log goes to stderr.
log {
  level  = "info"   # debug, info, warn, error
  format = "text"   # or json
  access = "denied" # which connections are logged: none, denied, all. Fields: docs/access-log.md
}

admin {
  socket  = "/run/nodeproxy/admin.sock" # for root only. The commands that ask the daemon take it as --socket
  metrics = "127.0.0.1:20210"           # Prometheus, at /metrics; "" for none. Names: docs/metrics.md
}

state {
  dir  = "/var/lib/nodeproxy"     # what was enrolled by hand; with Consul, the ports of sidecars; with Kubernetes, the pods; the containers
  pins = "/sys/fs/bpf/nodeproxy"  # on a bpffs. "nodeproxy cleanup" takes it as --pins
}

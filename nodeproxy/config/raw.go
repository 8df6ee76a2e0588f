package config

import "time"

// raw is the configuration as written. A field of type any is a key whose mechanism has not landed: whatever it
// holds, it is refused.
type raw struct {
	Node               rawNode      `hcl:"node"`
	Source             []rawSource  `hcl:"source"`
	Workloads          rawWorkloads `hcl:"workloads"`
	Inbound            rawInbound   `hcl:"inbound"`
	SameNode           string       `hcl:"same_node"`
	Tunnels            bool         `hcl:"tunnels"`
	PreferLocal        bool         `hcl:"prefer_local"`
	OnFailure          string       `hcl:"on_failure"`
	VirtualCIDRs       []string     `hcl:"virtual_cidrs"`
	ExistingConnection string       `hcl:"existing_connections"`
	Limits             rawLimits    `hcl:"limits"`
	DNS                rawDNS       `hcl:"dns"`
	Log                rawLog       `hcl:"log"`
	Admin              rawAdmin     `hcl:"admin"`
	State              rawState     `hcl:"state"`
}

type rawNode struct {
	Name    string `hcl:"name"`
	Address string `hcl:"address"`
}

type rawSource struct {
	Consul *rawConsul `hcl:"consul"`
	File   *rawFile   `hcl:"file"`
}

type rawConsul struct {
	Mode            string   `hcl:"mode"`
	Address         string   `hcl:"address"`
	Addresses       []string `hcl:"addresses"`
	ServicesDir     string   `hcl:"services_dir"`
	TokenFile       string   `hcl:"token_file"`
	TokenDir        string   `hcl:"token_dir"`
	Datacenter      string   `hcl:"datacenter"`
	Namespace       string   `hcl:"namespace"`
	Partition       string   `hcl:"partition"`
	CAFile          string   `hcl:"ca_file"`
	CertFile        string   `hcl:"cert_file"`
	KeyFile         string   `hcl:"key_file"`
	AuthMethod      string   `hcl:"auth_method"`
	BearerTokenFile string   `hcl:"bearer_token_file"`
	VirtualIPs      string   `hcl:"virtual_ips"`
}

type rawFile struct {
	Path       string `hcl:"path"`
	VirtualIPs string `hcl:"virtual_ips"`
}

type rawWorkloads struct {
	Kubernetes rawKubernetes        `hcl:"kubernetes"`
	Systemd    rawLabelled          `hcl:"systemd"`
	Containers rawContainers        `hcl:"containers"`
	Consul     rawLabelled          `hcl:"consul"`
	Xattr      rawLabelled          `hcl:"xattr"`
	Cgroup     map[string]rawCgroup `hcl:"cgroup"`
}

type rawLabelled struct {
	Enabled bool `hcl:"enabled"`
}

type rawContainers struct {
	Enabled bool     `hcl:"enabled"`
	Allow   []string `hcl:"allow"`
	Engine  string   `hcl:"engine"`
	Socket  string   `hcl:"socket"`
}

type rawKubernetes struct {
	Enabled    bool                    `hcl:"enabled"`
	Kubeconfig string                  `hcl:"kubeconfig"`
	CNI        rawCNI                  `hcl:"cni"`
	Namespace  map[string]rawNamespace `hcl:"namespace"`
}

type rawCNI struct {
	Enabled bool   `hcl:"enabled"`
	ConfDir string `hcl:"conf_dir"`
	BinDir  string `hcl:"bin_dir"`
}

type rawNamespace struct {
	Services []string `hcl:"services"`
}

type rawCgroup struct {
	Path    string   `hcl:"path"`
	Service string   `hcl:"service"`
	Also    []string `hcl:"also_serves"`
	Mode    string   `hcl:"mode"`
	Consul  string   `hcl:"consul_access"`
}

type rawInbound struct {
	Mode          string   `hcl:"mode"`
	Ports         string   `hcl:"ports"`
	PlaintextFrom []string `hcl:"plaintext_from"`
	Probers       []string `hcl:"probers"`
}

type rawLimits struct {
	Connections int           `hcl:"connections"`
	PerWorkload int           `hcl:"per_workload"`
	Handshake   time.Duration `hcl:"handshake"`
	Connect     time.Duration `hcl:"connect"`
	Idle        time.Duration `hcl:"idle"`
	Drain       time.Duration `hcl:"drain"`
}

type rawDNS struct {
	Enabled bool `hcl:"enabled"`
}

type rawLog struct {
	Level  string `hcl:"level"`
	Format string `hcl:"format"`
	Access string `hcl:"access"`
}

type rawAdmin struct {
	Socket  string `hcl:"socket"`
	Metrics string `hcl:"metrics"`
}

type rawState struct {
	Dir  string `hcl:"dir"`
	Pins string `hcl:"pins"`
}

const (
	defaultVirtualIPs    = "240.0.0.0/8"
	defaultConsulIPs     = "240.0.0.0/4" // Consul's own default
	defaultConsulAddress = "127.0.0.1:8500"
)

func defaults() raw {
	return raw{
		Inbound:            rawInbound{Mode: string(Strict), Ports: "21500-21999"},
		Tunnels:            true,
		SameNode:           "direct",
		PreferLocal:        true,
		OnFailure:          "closed",
		ExistingConnection: "keep",
		Workloads: rawWorkloads{
			Containers: rawContainers{Engine: dockerEngine},
			Kubernetes: rawKubernetes{CNI: rawCNI{ConfDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin"}},
		},
		Limits: rawLimits{Connections: 100000, PerWorkload: 20000, Handshake: 5 * time.Second, Connect: 5 * time.Second,
			Drain: 30 * time.Second},
		Log:   rawLog{Level: "info", Format: "text", Access: "denied"},
		Admin: rawAdmin{Socket: "/run/nodeproxy/admin.sock", Metrics: "127.0.0.1:20210"},
		State: rawState{Dir: "/var/lib/nodeproxy", Pins: "/sys/fs/bpf/nodeproxy"},
	}
}

package config

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/redirect"
)

const minimal = `node { name = "node-1"  address = "10.0.0.5" }
source "file" { path = "/etc/nodeproxy/mesh.d" }
`

// write makes a directory of the files and returns it.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func load(t *testing.T, text string) (*Config, error) {
	t.Helper()
	return Load(filepath.Join(write(t, map[string]string{"c.hcl": text}), "c.hcl"))
}

func mustLoad(t *testing.T, text string) *Config {
	t.Helper()
	c, err := load(t, text)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func cgroup2(t *testing.T) string {
	t.Helper()
	mount, err := redirect.CgroupMount()
	if err != nil {
		t.Skip(err)
	}
	return mount
}

func TestDefaultsAreThoseOfTheDocumentation(t *testing.T) {
	c := mustLoad(t, minimal)
	want := Config{
		Node:        Node{Name: "node-1", Address: netip.MustParseAddr("10.0.0.5")},
		Source:      FileSource{Path: "/etc/nodeproxy/mesh.d", VirtualIPs: netip.MustParsePrefix("240.0.0.0/8")},
		Inbound:     Inbound{Mode: Strict, FirstPort: 21500, LastPort: 21999},
		Direct:      true,
		Tunnels:     true,
		PreferLocal: true,
		Limits: Limits{Connections: 100000, PerWorkload: 20000, Handshake: 5 * time.Second, Connect: 5 * time.Second,
			Drain: 30 * time.Second},
		Log:   Log{Level: slog.LevelInfo, Format: "text", Access: "denied"},
		Admin: Admin{Socket: "/run/nodeproxy/admin.sock", Metrics: "127.0.0.1:20210"},
		State: State{Dir: "/var/lib/nodeproxy", Pins: "/sys/fs/bpf/nodeproxy"},
	}
	if len(c.Cgroups) != 0 {
		t.Errorf("cgroups = %v, want none", c.Cgroups)
	}
	if c.Cgroups = nil; !equal(*c, want) {
		t.Errorf("config = %+v\nwant     %+v", *c, want)
	}
}

func equal(a, b Config) bool {
	return a.Node == b.Node && a.Source == b.Source && reflect.DeepEqual(a.Inbound, b.Inbound) && a.Tunnels == b.Tunnels && a.Direct == b.Direct && a.PreferLocal == b.PreferLocal &&
		a.FailOpen == b.FailOpen && a.Limits == b.Limits && a.Log == b.Log && a.Admin == b.Admin && a.State == b.State
}

func TestEveryKeyOfTheDocumentationThatHasLandedIsHonoured(t *testing.T) {
	web := filepath.Join(cgroup2(t), "demo/web")
	c := mustLoad(t, `node { name = "n2"  address = "fd00::1" }
source "file" { path = "/m"  virtual_ips = "fd01::/64" }
workloads { cgroup "web" { path = "`+web+`"  service = "web"  also_serves = ["web-admin"]  mode = "permissive" } }
inbound { mode = "permissive"  ports = "22000-22001"  plaintext_from = ["10.0.0.0/8", "fd00::/64"]  probers = [] }
same_node = "mtls"
tunnels = false
prefer_local = false
on_failure = "open"
virtual_cidrs = []
existing_connections = "keep"
limits { connections = 10  per_workload = 5  handshake = "1s"  connect = "2s"  idle = "3s"  drain = "4s" }
dns { enabled = true }
log { level = "debug"  format = "json"  access = "all" }
admin { socket = "/run/a.sock"  metrics = "" }
state { dir = "/s"  pins = "/p" }
`)
	want := Config{
		Node:   Node{Name: "n2", Address: netip.MustParseAddr("fd00::1")},
		Source: FileSource{Path: "/m", VirtualIPs: netip.MustParsePrefix("fd01::/64")},
		Inbound: Inbound{Mode: Permissive, FirstPort: 22000, LastPort: 22001,
			PlaintextFrom: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/64")}},
		FailOpen: true, DNS: true,
		Limits: Limits{Connections: 10, PerWorkload: 5, Handshake: time.Second, Connect: 2 * time.Second, Idle: 3 * time.Second,
			Drain: 4 * time.Second},
		Log:   Log{Level: slog.LevelDebug, Format: "json", Access: "all"},
		Admin: Admin{Socket: "/run/a.sock"},
		State: State{Dir: "/s", Pins: "/p"},
	}
	if !equal(*c, want) {
		t.Errorf("config = %+v\nwant     %+v", *c, want)
	}
	if wantCgroup := (Cgroup{Label: "web", Path: web, Service: "web", Also: []string{"web-admin"}, Mode: Permissive}); len(c.Cgroups) != 1 || !reflect.DeepEqual(c.Cgroups[0], wantCgroup) {
		t.Errorf("cgroups = %v, want %v", c.Cgroups, wantCgroup)
	}
}

// documented is the sample of the documentation, with every key.
const documented = `node  { name = "node-1"  address = "10.0.0.5" }

source "consul" {            # exactly one source
  mode       = "agent"       # agent: the node's client agent | servers: no agent on the node
  address    = "127.0.0.1:8500"          # or unix:///…, https://…
  token_file = "/etc/nodeproxy/token"  token_dir = "/etc/nodeproxy/tokens.d"   # one file per service name
}
source "file" { path = "/etc/nodeproxy/mesh.d"  virtual_ips = "240.0.0.0/8" }   # Consul's own definitions, and a built-in CA

workloads {
  kubernetes { enabled = true  namespace "shop" { services = ["web", "cart"] } }
  systemd    { enabled = true }
  containers { enabled = true  allow = ["web"] }
  consul     { enabled = true }
  xattr      { enabled = true }
  cgroup "web" { path = "/sys/fs/cgroup/demo/web"  service = "web" }
}

inbound  { mode = "strict"  ports = "21500-21999"  plaintext_from = []  probers = [] }
same_node            = "direct"
tunnels              = true
prefer_local         = true
on_failure           = "closed"
virtual_cidrs        = ["10.96.0.0/12"]
existing_connections = "reset"
limits { connections = 100000  per_workload = 20000  handshake = "5s"  connect = "5s"  idle = "0s"  drain = "30s" }
dns    { enabled = true }
log    { level = "info"  format = "text"  access = "denied" }
admin  { socket = "/run/nodeproxy/admin.sock"  metrics = "127.0.0.1:20210" }
state  { dir = "/var/lib/nodeproxy"  pins = "/sys/fs/bpf/nodeproxy" }
`

func TestLabelsAreOffUnlessTheyAreEnabled(t *testing.T) {
	for text, want := range map[string][2]bool{
		"": {false, false}, "xattr {} systemd {}": {false, false}, "xattr { enabled = false }": {false, false},
		"xattr { enabled = true }": {true, false}, "systemd { enabled = true }": {false, true},
	} {
		c, err := load(t, minimal+"\nworkloads { "+text+" }")
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := [2]bool{c.Xattr, c.Systemd}; got != want {
			t.Errorf("%s: xattr, systemd = %v, want %v", text, got, want)
		}
	}
	if _, err := load(t, minimal+"\nworkloads { xattr { enable = true } }"); err == nil || !strings.Contains(err.Error(), "enable") {
		t.Errorf("an unknown key: %v", err)
	}
}

func TestPods(t *testing.T) {
	const pods = `
kubernetes {
  enabled = true
  namespace "shop" { services = ["web", "cart"] }
  namespace "billing" { services = ["invoices"] }
}`
	t.Setenv("NODE_NAME", "ip-10-0-0-5.internal")
	c, err := load(t, minimal+"\nworkloads { "+pods+" }")
	if err != nil {
		t.Fatal(err)
	}
	want := &Kubernetes{Node: "ip-10-0-0-5.internal", Namespaces: map[string][]string{"shop": {"web", "cart"}, "billing": {"invoices"}}}
	if !reflect.DeepEqual(c.Pods, want) {
		t.Errorf("pods = %+v, want %+v", c.Pods, want)
	}
	t.Setenv("POD_NAMESPACE", "mesh")
	t.Setenv("DAEMONSET_NAME", "nodeproxy")
	want.DaemonSetNamespace, want.DaemonSet = "mesh", "nodeproxy"
	if c, err = load(t, minimal+"\nworkloads { "+pods+" }"); err != nil || !reflect.DeepEqual(c.Pods, want) {
		t.Errorf("as a pod: %+v, %v, want %+v", c, err, want)
	}
	if c, err := load(t, minimal+"\nworkloads { "+strings.ReplaceAll(pods, "true", "false")+" }"); err != nil || c.Pods != nil {
		t.Errorf("not enabled: %+v, %v", c.Pods, err)
	}
	for text, want := range map[string]string{
		`kubernetes { enabled = true  namespace "shop" {} }`:                      "allows nothing",
		`kubernetes { enabled = true  namespace "Shop" { services = ["web"] } }`:  "no name of a namespace",
		`kubernetes { enabled = true  namespace "shop" { services = ["we/b"] } }`: `has "we/b"`,
		`kubernetes { enabled = true  namespace "shop" { service = ["web"] } }`:   "service",
		`kubernetes { enabled = true  kubeconfig = "here" }`:                      "absolute path",
	} {
		if _, err := load(t, minimal+"\nworkloads {\n"+text+"\n}"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want one with %q", text, err, want)
		}
	}
}

func TestTheNodeIsFoundInTheEnvironment(t *testing.T) {
	t.Setenv("NODE_NAME", "ip-10-0-0-5.internal")
	t.Setenv("NODE_ADDRESS", "10.0.0.5")
	c, err := load(t, `source "file" { path = "/etc/nodeproxy/mesh.d" }`)
	if err != nil {
		t.Fatal(err)
	}
	if c.Node.Name != "ip-10-0-0-5-internal" || c.Node.Address.String() != "10.0.0.5" {
		t.Errorf("node = %+v", c.Node)
	}
	if c, err = load(t, minimal); err != nil || c.Node.Name != "node-1" {
		t.Errorf("what is configured holds: %+v, %v", c, err)
	}
}

func TestExistingConnections(t *testing.T) {
	const never = -1
	for text, want := range map[string]time.Duration{
		"": never, `existing_connections = "keep"`: never, `existing_connections = "reset"`: 0, `existing_connections = "10m"`: 10 * time.Minute,
	} {
		c, err := load(t, minimal+"\n"+text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		got := time.Duration(never)
		if c.Existing != nil {
			got = *c.Existing
		}
		if got != want {
			t.Errorf("%s: connections end after %v, want %v", text, got, want)
		}
	}
}

func TestEveryDocumentedKeyIsKnown(t *testing.T) {
	_, err := load(t, documented)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"c.hcl:8: there is another source at ",
		"c.hcl:24: virtual_cidrs is for addresses that Consul has",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "unknown key") || strings.Contains(err.Error(), "not supported by this version") {
		t.Errorf("a documented key is unknown:\n%v", err)
	}
}

func TestInstancesAreFoundWhereConsulIsTheSource(t *testing.T) {
	const node, enabled = "node { name = \"n\"  address = \"10.0.0.1\" }\n", "\nworkloads { consul { enabled = true } }"
	if c, err := load(t, node+"source \"consul\" {}"+enabled); err != nil || !c.Registered {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := load(t, node+"source \"consul\" {}"); err != nil || c.Registered {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := load(t, minimal+enabled); err == nil || !strings.Contains(err.Error(), "workloads.consul is for what is registered in Consul") {
		t.Errorf("with the file source: %v", err)
	}
}

func TestContainersAreWhatIsAllowed(t *testing.T) {
	c, err := load(t, minimal+"\nworkloads { containers { enabled = true  allow = [\"web\", \"cart\"] } }")
	if want := (&Containers{Allow: []string{"web", "cart"}, Engine: "docker", Socket: "/run/docker.sock"}); err != nil || !reflect.DeepEqual(c.Containers, want) {
		t.Errorf("%+v, %v", c.Containers, err)
	}
	c, err = load(t, minimal+"\nworkloads { containers { enabled = true  allow = [\"web\"]  engine = \"containerd\" } }")
	if err != nil || c.Containers.Engine != "containerd" || c.Containers.Socket != "/run/containerd/containerd.sock" {
		t.Errorf("%+v, %v", c.Containers, err)
	}
	if c, err := load(t, minimal+"\nworkloads { containers { allow = [\"web\"] } }"); err != nil || c.Containers != nil {
		t.Errorf("they are not enabled: %+v, %v", c.Containers, err)
	}
	for text, want := range map[string]string{
		"":                                       "workloads.containers.allow is empty",
		"allow = [\"a b\"]":                      "has \"a b\"",
		"allow = [\"web\"]  socket = \"d.sock\"": "it must be an absolute path",
	} {
		if _, err := load(t, minimal+"\nworkloads { containers { enabled = true  "+text+" } }"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestTheConsulSource(t *testing.T) {
	node := "node { name = \"n\"  address = \"10.0.0.1\" }\n"
	c := mustLoad(t, node+`source "consul" {}`)
	want := ConsulSource{Address: "127.0.0.1:8500", VirtualIPs: netip.MustParsePrefix("240.0.0.0/4")}
	if c.Consul == nil || !reflect.DeepEqual(*c.Consul, want) {
		t.Errorf("by default %+v, want %+v", c.Consul, want)
	}
	c = mustLoad(t, node+`source "consul" {
  mode = "agent"  address = "https://consul:8501"  token_file = "/t"  token_dir = "/d"  datacenter = "dc2"  namespace = "default"  partition = "default"
  ca_file = "/ca"  cert_file = "/cert"  key_file = "/key"  virtual_ips = "241.0.0.0/8"
}`)
	want = ConsulSource{Address: "https://consul:8501", TokenFile: "/t", TokenDir: "/d", Datacenter: "dc2",
		CAFile: "/ca", CertFile: "/cert", KeyFile: "/key", VirtualIPs: netip.MustParsePrefix("241.0.0.0/8")}
	if c.Consul == nil || !reflect.DeepEqual(*c.Consul, want) {
		t.Errorf("all keys: %+v, want %+v", c.Consul, want)
	}
	c = mustLoad(t, node+`source "consul" {
  mode = "servers"  addresses = ["https://10.0.0.11:8501", "https://10.0.0.12:8501"]  services_dir = "/s"  auth_method = "nodes"  bearer_token_file = "/b"
}`)
	want = ConsulSource{Servers: []string{"https://10.0.0.11:8501", "https://10.0.0.12:8501"}, ServicesDir: "/s", AuthMethod: "nodes", BearerToken: "/b",
		VirtualIPs: netip.MustParsePrefix("240.0.0.0/4")}
	if c.Consul == nil || !reflect.DeepEqual(*c.Consul, want) {
		t.Errorf("without an agent: %+v, want %+v", c.Consul, want)
	}
	for text, want := range map[string]string{
		`mode = "servers"`:                        "source.consul.mode is \"servers\", and there is no address of one",
		`services_dir = "/s"`:                     "addresses and services_dir go with \"servers\"",
		`mode = "servers"  address = "unix:///s"`: "source.consul.addresses has \"unix:///s\"",
		`token_file = "/t"  auth_method = "m"  bearer_token_file = "/b"`: "remove one of them",
		`mode = "x"`:                "source.consul.mode is \"x\"",
		`auth_method = "k8s"`:       "source.consul.auth_method goes with bearer_token_file",
		`bearer_token_file = "/t"`:  "source.consul.auth_method goes with bearer_token_file",
		`namespace = "a"`:           "source.consul.namespace is not supported by this version yet",
		`partition = "a"`:           "source.consul.partition is not supported by this version yet",
		`token_file = "t"`:          "source.consul.token_file is \"t\"",
		`address = "ftp://x"`:       "source.consul.address has \"ftp://x\"",
		`cert_file = "/c"`:          "source.consul.cert_file goes with key_file",
		`virtual_ips = "240.0.0.1"`: "source.consul.virtual_ips is \"240.0.0.1\"",
		`colour = "red"`:            "unknown key",
	} {
		if _, err := load(t, node+"source \"consul\" {\n  "+text+"\n}"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", text, err, want)
		}
	}
}

func TestErrorsNameFileLineAndKey(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":         {minimal + "colour = true", `c.hcl:3: unknown key "colour"`},
		"unknown nested key":  {minimal + "\nlimits {\n  conections = 5\n}", `c.hcl:5: unknown key "conections"`},
		"case of a key":       {minimal + "Tunnels = false", `c.hcl:3: unknown key "Tunnels"`},
		"set twice":           {minimal + "prefer_local = true\nprefer_local = false", `c.hcl:4: "prefer_local" is set twice`},
		"broken HCL":          {minimal + "limits {", "c.hcl:3: read HCL"},
		"no node":             {`source "file" { path = "/m" }`, "c.hcl: node.name "},
		"name with a slash":   {"node {\n name = \"../x\"\n address = \"10.0.0.1\"\n}\nsource \"file\" { path = \"/m\" }", "c.hcl:2: node.name "},
		"address is a name":   {"node {\n name = \"x\"\n address = \"localhost\"\n}\nsource \"file\" { path = \"/m\" }", "c.hcl:3: node.address "},
		"unspecified address": {"node {\n name = \"x\"\n address = \"0.0.0.0\"\n}\nsource \"file\" { path = \"/m\" }", "c.hcl:3: node.address "},
		"no source":           {`node { name = "n"  address = "10.0.0.1" }`, "c.hcl: there is no source"},
		"relative source":     {"node { name = \"n\"  address = \"10.0.0.1\" }\nsource \"file\" {\n path = \"m\"\n}", "c.hcl:3: source.file.path "},
		"bad virtual IPs":     {"node { name = \"n\"  address = \"10.0.0.1\" }\nsource \"file\" {\n path = \"/m\"\n virtual_ips = \"240.0.0.1/8\"\n}", "c.hcl:4: source.file.virtual_ips "},
		"ports backwards":     {minimal + "inbound { ports = \"22000-21900\" }", "c.hcl:3: inbound.ports "},
		"the agent's ports":   {minimal + "inbound { ports = \"21200-21300\" }", "c.hcl:3: inbound.ports "},
		"ports too high":      {minimal + "inbound { ports = \"65000-65536\" }", "c.hcl:3: inbound.ports "},
		"one port":            {minimal + "inbound { ports = \"22000\" }", "c.hcl:3: inbound.ports "},
		"port 0":              {minimal + "inbound { ports = \"0-5\" }", "c.hcl:3: inbound.ports "},
		"unknown mode":        {minimal + "inbound { mode = \"lax\" }", "c.hcl:3: inbound.mode "},
		"plaintext_from":      {minimal + "inbound { plaintext_from = [\"10.0.0.0/8\", \"10.0.0.1/8\"] }", `c.hcl:3: inbound.plaintext_from has "10.0.0.1/8"`},
		"probers":             {minimal + "inbound { probers = [\"/proc\"] }", "c.hcl:3: inbound.probers has \"/proc\": not on cgroup2"},
		"unknown on_failure":  {minimal + "on_failure = \"ignore\"", "c.hcl:3: on_failure "},
		"bad existing":        {minimal + "existing_connections = \"drop\"", "c.hcl:3: existing_connections is \"drop\""},
		"existing backwards":  {minimal + "existing_connections = \"-1s\"", "c.hcl:3: existing_connections is \"-1s\""},
		"bad duration":        {minimal + "limits { handshake = \"5\" }", `c.hcl:3: "handshake"`},
		"negative idle":       {minimal + "limits { idle = \"-1s\" }", "c.hcl:3: limits.idle "},
		"no connections":      {minimal + "limits { connections = 0 }", "c.hcl:3: limits.connections "},
		"unknown level":       {minimal + "log { level = \"loud\" }", "c.hcl:3: log.level "},
		"unknown format":      {minimal + "log { format = \"xml\" }", "c.hcl:3: log.format "},
		"unknown access":      {minimal + "log { access = \"some\" }", "c.hcl:3: log.access "},
		"relative socket":     {minimal + "admin { socket = \"a.sock\" }", "c.hcl:3: admin.socket "},
		"long socket":         {minimal + "admin { socket = \"/" + strings.Repeat("s", 107) + "\" }", "c.hcl:3: admin.socket "},
		"metrics port":        {minimal + "admin { metrics = \"127.0.0.1\" }", "c.hcl:3: admin.metrics "},
		"relative pins":       {minimal + "state { pins = \"pins\" }", "c.hcl:3: state.pins "},
		"relative cgroup":     {minimal + "workloads {\n cgroup \"w\" { path = \"w\"  service = \"w\" }\n}", "c.hcl:4: workloads.cgroup.w.path "},
		"not on cgroup2":      {minimal + "workloads {\n cgroup \"w\" { path = \"/proc/w\"  service = \"w\" }\n}", "c.hcl:4: workloads.cgroup.w.path is /proc/w"},
		"cgroup's service":    {minimal + "workloads {\n cgroup \"w\" {\n service = \"a b\"\n}\n}", "c.hcl:5: workloads.cgroup.w.service "},
		"service named twice": {minimal + "workloads {\n cgroup \"w\" {\n service = \"a\"\n also_serves = [\"b\", \"a\"]\n}\n}", "c.hcl:6: workloads.cgroup.w.also_serves has \"a\""},
		"cgroup's mode":       {minimal + "workloads {\n cgroup \"w\" {\n mode = \"off\"\n}\n}", "c.hcl:5: workloads.cgroup.w.mode "},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v\nwant one with %q", err, c.want)
			}
		})
	}
}

func TestAllErrorsAreReportedAtOnceInOrder(t *testing.T) {
	_, err := load(t, minimal+"existing_connections = \"drop\"\nlog { level = \"x\" }\ninbound { mode = \"y\" }")
	if err == nil {
		t.Fatal("no error")
	}
	last := -1
	for _, want := range []string{"c.hcl:3: existing_connections", "c.hcl:4: log.level", "c.hcl:5: inbound.mode"} {
		i := strings.Index(err.Error(), want)
		if i <= last {
			t.Errorf("%q is missing or out of order in\n%v", want, err)
		}
		last = i
	}
}

func TestRootOfCgroup2IsNoWorkload(t *testing.T) {
	_, err := load(t, minimal+`workloads { cgroup "all" { path = "`+cgroup2(t)+`"  service = "web" } }`)
	if err == nil || !strings.Contains(err.Error(), "root of cgroup2") {
		t.Errorf("error = %v, want a refusal", err)
	}
}

func TestDirectoryMergesItsFiles(t *testing.T) {
	mount := cgroup2(t)
	c, err := Load(write(t, map[string]string{
		"a.hcl":     minimal + `workloads { cgroup "web" { path = "` + mount + `/web"  service = "web" } }`,
		"b.json":    `{"limits": {"idle": "9s"}, "workloads": {"cgroup": {"api": {"path": "` + mount + `/api", "service": "api"}}}}`,
		"c.hcl":     `limits { drain = "8s" }`,
		"README.md": "not configuration",
		".d.hcl":    "neither { is this",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Cgroups) != 2 || c.Cgroups[0].Label != "api" || c.Cgroups[1].Label != "web" {
		t.Errorf("cgroups = %v, want api and web", c.Cgroups)
	}
	if c.Limits.Idle != 9*time.Second || c.Limits.Drain != 8*time.Second || c.Limits.Connections != 100000 {
		t.Errorf("limits = %+v, want both files' and the defaults", c.Limits)
	}
}

func TestConflictsBetweenFilesNameBothPlaces(t *testing.T) {
	mount := cgroup2(t)
	for name, c := range map[string]struct{ a, b, want, also string }{
		"scalar": {"prefer_local = true", "\nprefer_local = true", `b.hcl:2: "prefer_local" is set already at `, "a.hcl:3"},
		"nested": {"limits {\n idle = \"1s\"\n}", "limits { idle = \"1s\" }", `b.hcl:1: "limits.idle" is set already at `, "a.hcl:4"},
		"label": {`workloads { cgroup "w" { path = "` + mount + `/a"  service = "a" } }`,
			`workloads { cgroup "w" { path = "` + mount + `/b"  service = "b" } }`, `b.hcl:1: "workloads.cgroup.w.path" is set already at `, "a.hcl:3"},
		"path": {`workloads { cgroup "v" { path = "` + mount + `/a"  service = "a" } }`,
			`workloads { cgroup "w" { path = "` + mount + `/a"  service = "b" } }`, `b.hcl:1: workloads.cgroup.w.path is ` + mount + `/a, which cgroup "v" at `, "a.hcl:3"},
		"source": {"", `source "file" { path = "/other" }`, `b.hcl:1: "source.file.path" is set already at `, "a.hcl:2"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(write(t, map[string]string{"a.hcl": minimal + c.a, "b.hcl": c.b}))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.also) {
				t.Errorf("error = %v\nwant %q and %q", err, c.want, c.also)
			}
		})
	}
}

func TestMissingAndEmptyPathsSayWhatToDo(t *testing.T) {
	if _, err := Load("/nonexistent/nodeproxy.hcl"); err == nil || !strings.Contains(err.Error(), "--config") {
		t.Errorf("error = %v, want a hint", err)
	}
	dir := t.TempDir()
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("error = %v, want one that names the directory", err)
	}
}

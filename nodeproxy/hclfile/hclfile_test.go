package hclfile

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sample is the documented configuration.
const sample = `
node  { name = "node-1"  address = "10.0.0.5" }

source "consul" {            # exactly one source
  mode       = "agent"       # agent: the node's client agent | servers: no agent on the node
  token_file = "/etc/nodeproxy/token"  token_dir = "/etc/nodeproxy/tokens.d"   # one file per service name
}
source "file" { path = "/etc/nodeproxy/mesh.d"  virtual_ips = "240.0.0.0/8" }   // a built-in CA

workloads {
  kubernetes { enabled = true  namespace "shop" { services = ["web", "cart"] } }
  systemd    { enabled = true }
  cgroup "web" { path = "/sys/fs/cgroup/demo/web"  service = "web" }
  cgroup "db"  { path = "/sys/fs/cgroup/demo/db"   service = "db" }
}

inbound  { mode = "strict"  ports = "21500-21999"  plaintext_from = []  probers = [] }   /* strict | permissive */
tunnels  = true
virtual_cidrs        = []
limits { connections = 100000  per_workload = 20000  handshake = "5s"  idle = "0s" }
`

type sampleConfig struct {
	Node struct {
		Name    string     `hcl:"name"`
		Address netip.Addr `hcl:"address"`
	} `hcl:"node"`
	Source []struct {
		Kind       string       `hcl:"kind,label"`
		Mode       string       `hcl:"mode"`
		TokenFile  string       `hcl:"token_file"`
		TokenDir   *string      `hcl:"token_dir"`
		Path       string       `hcl:"path"`
		VirtualIPs netip.Prefix `hcl:"virtual_ips"`
		Where      Block
	} `hcl:"source"`
	Workloads struct {
		Kubernetes *struct {
			Enabled   bool `hcl:"enabled"`
			Namespace []struct {
				Name     string   `hcl:"name,label"`
				Services []string `hcl:"services"`
			} `hcl:"namespace"`
		} `hcl:"kubernetes"`
		Systemd *struct {
			Enabled bool `hcl:"enabled"`
		} `hcl:"systemd"`
		Containers *struct {
			Enabled bool `hcl:"enabled"`
		} `hcl:"containers"`
		Cgroup []struct {
			Name    string `hcl:"name,label"`
			Path    string `hcl:"path"`
			Service string `hcl:"service"`
			Where   Block
		} `hcl:"cgroup"`
	} `hcl:"workloads"`
	Inbound struct {
		Mode          string   `hcl:"mode"`
		Ports         string   `hcl:"ports"`
		PlaintextFrom []string `hcl:"plaintext_from"`
		Probers       []string `hcl:"probers"`
		Where         Block
	} `hcl:"inbound"`
	Tunnels      bool     `hcl:"tunnels"`
	VirtualCIDRs []string `hcl:"virtual_cidrs"`
	Limits       struct {
		Connections uint32        `hcl:"connections"`
		PerWorkload int           `hcl:"per_workload"`
		Handshake   time.Duration `hcl:"handshake"`
		Connect     time.Duration `hcl:"connect"`
		Idle        time.Duration `hcl:"idle"`
	} `hcl:"limits"`
}

func decode(t *testing.T, path, data string, into any) error {
	t.Helper()
	f, err := Parse(path, []byte(data))
	if err != nil {
		return err
	}
	return f.Decode(into)
}

func TestDecodeTheDocumentedConfiguration(t *testing.T) {
	var c sampleConfig
	c.Limits.Connect = 7 * time.Second
	if err := decode(t, "np.hcl", sample, &c); err != nil {
		t.Fatal(err)
	}
	if c.Node.Name != "node-1" || c.Node.Address != netip.MustParseAddr("10.0.0.5") {
		t.Errorf("node: %+v", c.Node)
	}
	if len(c.Source) != 2 || c.Source[0].Kind != "consul" || *c.Source[0].TokenDir != "/etc/nodeproxy/tokens.d" ||
		c.Source[1].Kind != "file" || c.Source[1].VirtualIPs != netip.MustParsePrefix("240.0.0.0/8") || c.Source[1].Where.Pos.Line != 8 {
		t.Errorf("source: %+v", c.Source)
	}
	w := c.Workloads
	if w.Containers != nil || !w.Systemd.Enabled || w.Kubernetes.Namespace[0].Name != "shop" ||
		!reflect.DeepEqual(w.Kubernetes.Namespace[0].Services, []string{"web", "cart"}) {
		t.Errorf("workloads: %+v", w)
	}
	if len(w.Cgroup) != 2 || w.Cgroup[1].Name != "db" || w.Cgroup[1].Service != "db" || w.Cgroup[1].Where.Pos.String() != "np.hcl:14" {
		t.Errorf("cgroup: %+v", w.Cgroup)
	}
	if c.Inbound.Ports != "21500-21999" || c.Inbound.Probers == nil || !c.Inbound.Where.Has("probers") || c.Inbound.Where.Has("nope") {
		t.Errorf("inbound: %+v", c.Inbound)
	}
	if !c.Tunnels || c.Limits.Connections != 100000 || c.Limits.Handshake != 5*time.Second || c.Limits.Connect != 7*time.Second {
		t.Errorf("limits: %+v", c.Limits)
	}
}

func TestDecodeJSONAsHCL(t *testing.T) {
	var c sampleConfig
	err := decode(t, "np.json", `{
		"source": {"file": {"path": "/m", "virtual_ips": "240.0.0.0/8"}},
		"workloads": {"cgroup": {"web": {"path": "/a", "service": "web"}, "db": {"path": "/b", "service": "db"}},
			"kubernetes": {"enabled": true, "namespace": [{"shop": {"services": ["web"]}}]}},
		"inbound": {"mode": "permissive",
			"ports": null}
	}`, &c)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Source) != 1 || c.Source[0].Kind != "file" || len(c.Workloads.Cgroup) != 2 || c.Workloads.Cgroup[1].Service != "db" ||
		c.Workloads.Kubernetes.Namespace[0].Name != "shop" || c.Inbound.Mode != "permissive" || c.Inbound.Where.Key("mode").Line != 5 {
		t.Errorf("%+v", c)
	}
}

func TestMistakesNameFileAndLine(t *testing.T) {
	for _, c := range []struct{ name, data, want string }{
		{"unknown.hcl", "tunnels = true\nnode { nam = \"a\" }", `unknown.hcl:2: unknown key "nam" in block "node"; known keys: address, name`},
		{"top.hcl", "\nnodes { }", `top.hcl:2: unknown key "nodes" in the file; known keys: inbound, limits, node,`},
		{"case.hcl", "Node { }", `case.hcl:1: unknown key "Node"`},
		{"nested.hcl", "workloads {\n kubernetes {\n namespace \"a\" {\n x = 1 } } }", `nested.hcl:4: unknown key "x" in block "namespace"`},
		{"type.hcl", "tunnels = \"yes\"", `type.hcl:1: "tunnels" is a string: write true or false`},
		{"string.hcl", "node {\n name = 5 }", `string.hcl:2: "name" is a number, not a string`},
		{"number.hcl", "limits { connections = \"5\" }", `number.hcl:1: "connections" is a string: write a whole number`},
		{"range.hcl", "limits { connections = -1 }", `range.hcl:1: "connections" is -1: out of range`},
		{"huge.hcl", "limits { connections = 99999999999999999999 }", `huge.hcl:1:`},
		{"duration.hcl", "limits { idle = \"5\" }", `duration.hcl:1: "idle": "5" is no duration`},
		{"duration2.hcl", "limits { idle = 5 }", `duration2.hcl:1: "idle" is a number: write a duration`},
		{"list.hcl", "virtual_cidrs = \"10.0.0.0/8\"", `list.hcl:1: "virtual_cidrs" is a string: write it as a list`},
		{"element.hcl", "virtual_cidrs = [\"a\",\n 5]", `element.hcl:2: "virtual_cidrs" is a number`},
		{"block.hcl", "node = \"x\"", `block.hcl:1: "node" is a string: write it as a block`},
		{"text.hcl", "node { address = \"x\" }", `text.hcl:1: "address":`},
		{"twice.hcl", "tunnels = true\ntunnels = false", `twice.hcl:2: "tunnels" is set twice, first at line 1`},
		{"twice.json", "{\"tunnels\": true,\n\"tunnels\": true}", `twice.json:2: "tunnels" is set twice, first at line 1`},
		{"blocks.hcl", "node { name = \"a\" }\nnode { name = \"b\" }", `blocks.hcl:2: "node" is set twice, first at line 1`},
		{"label.hcl", "source { path = \"x\" }", `label.hcl:1: "source" wants one label`},
		{"nolabel.hcl", "source { }", `nolabel.hcl:1: "source" has no label`},
		{"labels.hcl", "source \"a\" \"b\" { path = \"x\" }", `labels.hcl:1: unknown key "b" in block "source"`},
		{"stray.hcl", "node \"x\" { name = \"a\" }", `stray.hcl:1: unknown key "x" in block "node"`},
		{"open.hcl", "tunnels = true\nnode {\n name = \"a\"\n", `open.hcl:2: read HCL: the '{' of this line is never closed`},
		{"closed.hcl", "node { } }", `closed.hcl:1: read HCL: expected a key, found "}"`},
		{"novalue.hcl", "tunnels =", `novalue.hcl:1: read HCL: expected a value, found the end of the file`},
		{"novalue2.hcl", "node { name = }", `novalue2.hcl:1: read HCL: expected a value, found "}"`},
		{"noassign.hcl", "\ntunnels\n", `noassign.hcl:3: read HCL: expected '=' or '{' after "tunnels"`},
		{"quote.hcl", "node { name = \"a }\n", `quote.hcl:1: read HCL: literal not terminated`},
		{"comma.hcl", "virtual_cidrs = [\"a\"\n\"b\"]", `comma.hcl:2: read HCL: expected ',' or ']' in a list`},
		{"deep.hcl", strings.Repeat("a {", 100), `deep.hcl:1: read HCL: nested more than 64 deep`},
		{"deeplist.hcl", "a = " + strings.Repeat("[", 1<<20), `deeplist.hcl:1: read HCL: nested more than 64 deep`},
		{"deeplabel.hcl", strings.Repeat("a ", 1<<20) + "{}", `deeplabel.hcl:1: read HCL: block with more than 64 labels`},
		{"deep.json", strings.Repeat(`{"a":`, 1<<19), `deep.json:1: read JSON: nested more than 64 deep`},
		{"syntax.json", "{\n\"a\": 1,,}", `syntax.json:2: read JSON: `},
		{"cut.json", "{\n\"node\": {", `cut.json:2: read JSON: unexpected end of the file`},
		{"empty.json", "", `empty.json:1: read JSON: unexpected end of the file`},
		{"tail.json", "{}\n{}", `tail.json:2: read JSON: data after the end`},
		{"array.json", "[]", `array.json:1: read JSON: expected an object, found a list`},
		{"other.yaml", "", `other.yaml: neither .hcl nor .json`},
		{"big.hcl", strings.Repeat("#", MaxSize+1), `big.hcl: larger than 4 MiB`},
	} {
		err := decode(t, c.name, c.data, new(sampleConfig))
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: %v\nwant %s", c.name, err, c.want)
		}
	}
}

func TestAllMistakesAreReportedInOrderOfLine(t *testing.T) {
	err := decode(t, "a.hcl", "limits { idle = 5 }\ntunnels = 1\nbad = 1\nnode { name = 5 }\ntunnels = 2", new(sampleConfig))
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != 5 {
		t.Fatalf("%d errors: %v", len(lines), err)
	}
	for i, line := range lines {
		if !strings.HasPrefix(line, fmt.Sprintf("a.hcl:%d:", i+1)) {
			t.Errorf("error %d is %s", i+1, line)
		}
	}
}

func TestStructsWithoutTagsTakeNamesAsConsulDoes(t *testing.T) {
	type entry struct {
		Kind        string
		MaxInbound  int
		PeerName    string `alias:"peer"`
		Sources     []*struct{ Name string }
		Subsets     map[string]struct{ OnlyPassing bool }
		Meta        map[string]string
		Config      map[string]any
		Timeout     *time.Duration
		Created     *time.Time
		Ratio       float64
		NotMentions *struct{ X int }
	}
	for name, data := range map[string]string{
		"a.hcl": `Kind = "k"
			MaxInbound = 3
			Sources = [ { Name = "a" },
			            { Name = "b" } ]
			Subsets = { v1 = { OnlyPassing = true } "v2" { } }
			Meta { a = "b" }
			Config { protocol = "http"  nested { a = [1, 2.5, "x", true] } }
			Timeout = "5s"
			Ratio = 2
			Created = "2020-01-02T03:04:05Z"
			PeerName = "p"`,
		"b.hcl": `kind = "k", max_inbound = 3
			sources { name = "a" }
			sources { name = "b" }
			subsets "v1" { only_passing = true }
			subsets "v2" { }
			meta = { "a" = "b" }
			config = { protocol = "http", nested = { a = [1, 2.5, "x", true, ] } }
			timeout = "5s"  ratio = 2.0  created = "2020-01-02T03:04:05Z"  peer = "p"`,
		"c.json": `{"Kind": "k", "maxinbound": 3, "Sources": [{"Name": "a"}, {"name": "b"}],
			"Subsets": {"v1": {"OnlyPassing": true}, "v2": {}}, "Meta": {"a": "b"},
			"Config": {"protocol": "http", "nested": {"a": [1, 2.5, "x", true]}},
			"Timeout": "5s", "Ratio": 2, "Created": "2020-01-02T03:04:05Z", "Peer": "p", "NotMentions": null}`,
	} {
		var e entry
		if err := decode(t, name, data, &e); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e.Kind != "k" || e.MaxInbound != 3 || e.PeerName != "p" || len(e.Sources) != 2 || e.Sources[1].Name != "b" ||
			!e.Subsets["v1"].OnlyPassing || len(e.Subsets) != 2 || e.Meta["a"] != "b" || *e.Timeout != 5*time.Second || e.Ratio != 2 ||
			e.Created.Year() != 2020 || e.NotMentions != nil {
			t.Errorf("%s: %+v", name, e)
		}
		want := map[string]any{"protocol": "http", "nested": map[string]any{"a": []any{int64(1), 2.5, "x", true}}}
		if !reflect.DeepEqual(e.Config, want) {
			t.Errorf("%s: config %#v, want %#v", name, e.Config, want)
		}
	}
	err := decode(t, "d.hcl", "Kind = \"k\"\nkind = \"j\"", new(entry))
	if err == nil || !strings.Contains(err.Error(), `d.hcl:2: "kind" is set twice`) {
		t.Errorf("two spellings of one key: %v", err)
	}
	err = decode(t, "e.hcl", "subsets \"v1\" {}\nsubsets \"v1\" {}\nmeta {}\nmeta {}", new(entry))
	if err == nil || !strings.Contains(err.Error(), `e.hcl:2: "v1" is set twice`) || !strings.Contains(err.Error(), `e.hcl:4: "meta" is set twice`) {
		t.Errorf("one label twice: %v", err)
	}
}

func TestPosAndMap(t *testing.T) {
	f, err := Parse("i.hcl", []byte("Kind = \"x\"\nSources = [\n {\n Name = \"a\" },\n { Name = \"b\"\n Action = \"deny\" } ]\nsources {\n name = \"c\" }"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		steps []any
		line  int
	}{
		{[]any{"kind"}, 1}, {[]any{"Sources"}, 2}, {[]any{"sources", 0}, 3}, {[]any{"sources", 0, "name"}, 4},
		{[]any{"Sources", 1, "Action"}, 6}, {[]any{"Sources", 1, "nope"}, 5}, {[]any{"Sources", 2, "name"}, 8}, {[]any{"Sources", 9}, 2}, {[]any{"nope"}, 0},
	} {
		if got := f.Pos(c.steps...); got.Line != c.line || got.File != "i.hcl" {
			t.Errorf("Pos(%v) = %v, want line %d", c.steps, got, c.line)
		}
	}
	for key, want := range map[string]string{"kind": "x", "Kind": "x", "Sources": "", "none": ""} {
		if got := f.String(key); got != want {
			t.Errorf("String(%s) = %q", key, got)
		}
	}
	g, err := Parse("g.hcl", []byte("a { x = 1 }\na { x = 2 }\nb = \"c\""))
	if err != nil {
		t.Fatal(err)
	}
	m, err := g.Map()
	want := map[string]any{"a": []any{map[string]any{"x": int64(1)}, map[string]any{"x": int64(2)}}, "b": "c"}
	if err != nil || !reflect.DeepEqual(m, want) {
		t.Errorf("Map() = %#v, %v", m, err)
	}
	g, err = Parse("g.hcl", []byte("a = [1]\na = 2"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Map(); err == nil || err.Error() != `g.hcl:2: "a" is set twice, first at line 1: remove one of them` {
		t.Errorf("a key set twice: %v", err)
	}
}

func TestReadRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe.hcl")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large.hcl")
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 1<<40); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		pipe: "not a regular file", dir: "not a regular file", large: "larger than 4 MiB", filepath.Join(dir, "none.hcl"): "no such file",
	} {
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("Read(%s): %v, want %q", path, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(true, []byte(sample))
	f.Add(true, []byte("a = <<EOF\nx\n  EOF\nb = <<-X\n y\n X\n c \"d\" \"e\" { f = [1, 0x10, 1e5, -3, .5, \"${x}\"] }"))
	f.Add(false, []byte(`{"a": {"b": [1, null, true, 2.5, "x"]}, "a": {}}`))
	f.Fuzz(func(t *testing.T, hcl bool, data []byte) {
		path := "f.json"
		if hcl {
			path = "f.hcl"
		}
		file, err := Parse(path, data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), path+":") {
				t.Fatalf("error without a place: %v", err)
			}
			return
		}
		_ = file.Decode(new(sampleConfig))
		_, _ = file.Map()
	})
}

package file

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// What is ignored or stricter than written must show among the problems, with file and line.
func TestWhatIsNotHonouredIsAProblem(t *testing.T) {
	d := dir(t, map[string]string{
		"stray.hcl": "",
		"nodes/node-1/api.hcl": `service { name = "api"  port = 8080
			weights { passing = 1 }
			connect { sidecar_service { tags = ["x"]
				proxy { upstreams = [ { destination_name = "db"  local_bind_port = 1 } ]
				config { a = 1 } } } } }`,
		"config/router.hcl":   "Kind = \"service-router\" Name = \"api\" Routes = [ { Destination { Service = \"x\" } } ]",
		"config/split.hcl":    "Kind = \"service-splitter\" Name = \"api\" Splits = [ { Weight = 100 } ]",
		"config/perm.hcl":     "Kind = \"service-intentions\" Name = \"api\"\nSources = [ { Name = \"web\"\n Permissions = [ { Action = \"allow\" HTTP { PathExact = \"/\" } } ] } ]",
		"config/jwt.json":     `{"Kind": "service-intentions", "Name": "*", "JWT": {"Providers": [{"Name": "okta"}]}, "Sources": [{"Name": "*", "Action": "allow"}]}`,
		"config/resolver.hcl": "Kind = \"service-resolver\" Name = \"api\" RequestTimeout = \"1s\"\nRedirect { Service = \"v2\" }\nLoadBalancer { LeastRequestConfig { ChoiceCount = 3 } }",
		"config/balance.hcl":  "Kind = \"service-resolver\" Name = \"v2\"\nLoadBalancer { LeastRequestConfig { ChoiceCount = 3 } }",
		"config/defaults.hcl": "Kind = \"service-defaults\" Name = \"api\" Protocol = \"http\" Mode = \"transparent\"\nRateLimits { InstanceLevel { RequestsPerSecond = 1 RequestsMaxBurst = 2 } }\nMeshGateway { Mode = \"local\" }",
		"config/proxy.hcl":    "Kind = \"proxy-defaults\" Name = \"global\"\nConfig { protocol = \"tcp\"\n envoy_x = 1 }",
		"config/mesh.hcl":     "Kind = \"mesh\"\nTransparentProxy { MeshDestinationsOnly = true }\nTLS { Incoming { TLSMinVersion = \"TLSv1_3\" }\n Outgoing { TLSMaxVersion = \"SSLv3\" } }",
		"config/peer.hcl":     "Kind = \"service-intentions\" Name = \"db\"\nSources = [ { Name = \"web\"\n Peer = \"east\"  Action = \"deny\" } ]",
		"config/gateway.hcl":  "Kind = \"ingress-gateway\" Name = \"gw\"",
	})
	snap := start(t, testConfig(d, "node-1")).first()
	got := problems(snap)
	for _, want := range []string{
		"stray.hcl is not read",
		"weights of service \"api\" is ignored: " + d + "/nodes/node-1/api.hcl:2",
		"tags of service \"api\"", "upstreams of service \"api\"", "config of service \"api\" is ignored: " + d + "/nodes/node-1/api.hcl:5",
		"api l7-ignored service-router of \"api\"", "api l7-ignored service-splitter of \"api\"",
		"the Permissions of web => api cannot be checked at L4, so the pair is denied (" + d + "/config/perm.hcl:2)",
		"the JWT of the intentions for \"*\"",
		"api l7-ignored RequestTimeout of service-resolver", "service-resolver of \"v2\": LeastRequestConfig.ChoiceCount 3 is not honoured",
		"v2 unknown-service service-resolver of api names \"v2\"",
		"api l7-ignored RateLimits of service-defaults", "MeshGateway of service-defaults is not honoured (" + d + "/config/defaults.hcl:3)",
		"Config envoy_x of proxy-defaults is not honoured (" + d + "/config/proxy.hcl:3)",
		"TLS.Outgoing of mesh: TLSMaxVersion \"SSLv3\" is not known: it limits nothing (" + d + "/config/mesh.hcl:",
		"no peers are known here",
		"ingress-gateway \"gw\" is ignored",
		"web unknown-service intention web => api names \"web\", which no node defines: check the name (" + d + "/config/perm.hcl:2)",
		"db unknown-service intention web => db names \"db\"",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no problem says %q", want)
		}
	}
	if !snap.MeshOnly || snap.TLS.Incoming.Min != tls.VersionTLS13 {
		t.Errorf("only the mesh is open: %v, TLS %+v", snap.MeshOnly, snap.TLS)
	}
	if strings.Contains(got, "Mode of service-defaults") || strings.Contains(got, "protocol of") {
		t.Error("what is honoured is reported as not honoured")
	}
	if t.Failed() {
		t.Log(got)
	}
	l7 := strings.Join(snap.Services["api"].IgnoredL7, ",")
	for _, want := range []string{"service-router", "service-splitter", "service-intentions Permissions", "service-defaults RateLimits"} {
		if !strings.Contains(l7, want) {
			t.Errorf("IgnoredL7 %s lacks %s", l7, want)
		}
	}
	for _, c := range []struct {
		src, dst string
		why      policy.Why
	}{{"web", "api", policy.ByPermissions}, {"x", "api", policy.ByJWT}, {"web", "db", policy.ByIntention}} {
		if v := snap.Policy.Decide(snap.Identity(c.src), c.dst); v.Why != c.why {
			t.Errorf("%s => %s: %+v, want %q", c.src, c.dst, v, c.why)
		}
	}
}

// Bad input of every kind: the error names file and line, and what is in force stays.
func TestBadInputKeepsTheLastGoodState(t *testing.T) {
	placed := strings.Replace(apiHCL, "port", `address = "10.0.0.2"  port`, 1)
	good := map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": placed, "config/api.hcl": webToAPI}
	for _, c := range []struct{ what, file, data, want string }{
		{"broken HCL", "config/api.hcl", "Kind = \"service-intentions\"\nName = ", "config/api.hcl:2: read HCL: expected a value"},
		{"a truncated file", "config/api.hcl", webToAPI[:len(webToAPI)-10], "config/api.hcl:3: read HCL:"},
		{"an empty config entry", "config/api.hcl", "", "config/api.hcl: has no Kind"},
		{"an empty definition", "nodes/node-2/api.hcl", "", "nodes/node-2/api.hcl: defines no service"},
		{"broken JSON", "config/new.json", "{\n", "config/new.json:1: read JSON"},
		{"an unknown key", "config/api.hcl", webToAPI + "\nSauces = []", "config/api.hcl:4: unknown key \"Sauces\" in the file; known keys: CreateIndex, JWT, Kind"},
		{"an unknown key of a source", "config/api.hcl", strings.Replace(webToAPI, "Action", "Akshun", 1), "config/api.hcl:3: unknown key \"Akshun\" in block \"Sources\""},
		{"an unknown key of a service", "nodes/node-2/api.hcl", "service { name = \"api\"\n prot = 1 }", "nodes/node-2/api.hcl:2: unknown key \"prot\" in block \"service\""},
		{"an oversized file", "config/big.hcl", "#" + strings.Repeat(" ", 5<<20), "config/big.hcl: larger than 4 MiB"},
		{"two services on one address", "nodes/node-1/x.hcl", "\nservice { name = \"x\" address = \"10.0.0.2\" port = 8080 }",
			"nodes/node-2/api.hcl:1: service \"api\" is at 10.0.0.2:8080, as is service \"x\" at "},
		{"a mesh port on another's port", "nodes/node-2/x.hcl", "service { name = \"x\" address = \"10.0.0.2\" port = 1 connect { sidecar_service { port = 8080 } } }", "nodes/node-2/x.hcl:1: service \"x\" is at 10.0.0.2:8080, as is service \"api\" at "},
		{"an ID twice", "nodes/node-2/b.hcl", "service { name = \"b\" id = \"api-1\" }", "nodes/node-2/b.hcl:1: service id \"api-1\" is already used on node \"node-2\" at "},
		{"an address among virtual IPs", "nodes/node-2/b.hcl", "service { name = \"b\" address = \"240.0.0.9\" port = 1 }", "nodes/node-2/b.hcl:1: service \"b\" is at 240.0.0.9:1, inside virtual_ips"},
		{"a loopback address", "nodes/node-2/b.hcl", "service { name = \"b\"\n address = \"127.0.0.1\" port = 1 }", "nodes/node-2/b.hcl:2: address 127.0.0.1 is a loopback address"},
		{"a host name", "nodes/node-2/b.hcl", "service { name = \"b\"\n address = \"host\" port = 1 }", "nodes/node-2/b.hcl:2: address \"host\" is not an IP address"},
		{"a bad port", "nodes/node-2/b.hcl", "service { name = \"b\"\n port = 70000 }", "nodes/node-2/b.hcl:2: \"port\" is 70000: out of range"},
		{"no name", "nodes/node-2/b.hcl", "service { port = 7 }", "nodes/node-2/b.hcl:1: service name is not set"},
		{"a wildcard name", "nodes/node-2/b.hcl", "service { name = \"*\" }", "nodes/node-2/b.hcl:1: service name \"*\" is not"},
		{"a proxy kind", "nodes/node-2/b.hcl", "service { name = \"b\"\n kind = \"connect-proxy\" }", "nodes/node-2/b.hcl:2: kind \"connect-proxy\" is not supported"},
		{"a namespace", "nodes/node-2/b.hcl", "service { name = \"b\"\n namespace = \"x\" }", "nodes/node-2/b.hcl:2: namespace \"x\""},
		{"a native sidecar", "nodes/node-2/b.hcl", "service { name = \"b\" port = 1 connect { native = true\n sidecar_service {} } }", "nodes/node-2/b.hcl:1: native does not go with sidecar_service"},
		{"a relative socket", "nodes/node-2/b.hcl", "service { name = \"b\" socket_path = \"a/b\" }", "nodes/node-2/b.hcl:1: socket path \"a/b\" is not absolute"},
		{"a script check", "nodes/node-2/b.hcl", "service { name = \"b\" check {\n args = [\"rm\"] interval = \"5s\" } }", "nodes/node-2/b.hcl:2: check with args is not supported"},
		{"a gRPC check", "nodes/node-2/b.hcl", "service { name = \"b\" checks = [ {\n grpc = \"a:1\" } ] }", "nodes/node-2/b.hcl:2: check with grpc is not supported"},
		{"an aimless check", "nodes/node-2/b.hcl", "service { name = \"b\"\n check { interval = \"5s\" } }", "nodes/node-2/b.hcl:2: a check has either tcp"},
		{"a check without port", "nodes/node-2/b.hcl", "service { name = \"b\" check {\n tcp = \"localhost\" } }", "nodes/node-2/b.hcl:2: tcp \"localhost\" is not host:port"},
		{"an unknown kind", "config/x.hcl", "\nKind = \"service-intention\" Name = \"x\"", "config/x.hcl:2: Kind \"service-intention\" is none of Consul's"},
		{"one entry twice", "config/b.hcl", webNoAPI, "config/b.hcl:1: service-intentions \"api\" is already written at "},
		{"one source twice", "config/api.hcl", strings.Replace(webToAPI, "]", ",\n { Name = \"web\" Action = \"deny\" } ]", 1), "api.hcl:4: intention web => api is already defined at api.hcl:3"},
		{"a partial wildcard", "config/b.hcl", strings.ReplaceAll(webToAPI, "api", "a*"), "b.hcl:3: intention web => a*"},
		{"no action", "config/b.hcl", "Kind = \"service-intentions\" Name = \"b\" Sources = [\n { Name = \"web\" } ]", "config/b.hcl:2: source \"web\" has no Action"},
		{"a wrong action", "config/b.hcl", "Kind = \"service-intentions\" Name = \"b\" Sources = [ { Name = \"web\"\n Action = \"Allow\" } ]", "config/b.hcl:2: Action \"Allow\" is neither"},
		{"no sources", "config/b.hcl", "Kind = \"service-intentions\" Name = \"b\"", "config/b.hcl:1: service-intentions \"b\" has no Sources"},
		{"permissive without leave", "config/b.hcl", "Kind = \"service-defaults\" Name = \"api\"\nMutualTLSMode = \"permissive\"", "config/b.hcl:2: MutualTLSMode \"permissive\" needs a mesh entry"},
		{"a second global", "config/b.hcl", "Kind = \"proxy-defaults\" Name = \"x\"", "config/b.hcl:1: proxy-defaults \"x\": the only one is called \"global\""},
		{"a bad duration", "config/b.hcl", "Kind = \"service-resolver\" Name = \"api\"\nConnectTimeout = 5", "config/b.hcl:2: \"ConnectTimeout\" is a number: write a duration"},
		{"another datacenter", "config/b.hcl", "Kind = \"service-resolver\" Name = \"api\"\nRedirect {\n Service = \"db\" Datacenter = \"dc2\" }", "config/b.hcl:2: Redirect: datacenter \"dc2\": the only one here is \"dc1\""},
		{"a bad filter", "config/b.hcl", "Kind = \"service-resolver\" Name = \"api\"\nSubsets \"v1\" {\n Filter = \"Service.Mata.x == 1\" }", "config/b.hcl:3: filter of subset \"v1\""},
		{"a peer to fail over to", "config/b.hcl", "Kind = \"service-resolver\" Name = \"api\"\nFailover \"*\" {\n Targets = [ { Peer = \"east\" } ] }", "config/b.hcl:2: Failover *: peer \"east\""},
		{"no such subset", "config/b.hcl", "\nKind = \"service-resolver\" Name = \"old\" Redirect { Service = \"api\" ServiceSubset = \"v1\" }", "config/b.hcl:2: service \"api\" has no subset \"v1\""},
		{"another partition", "config/b.hcl", "Kind = \"service-intentions\" Name = \"b\"\nPartition = \"x\" Sources = [ { Name = \"web\" Action = \"allow\" } ]", "config/b.hcl:2: Partition \"x\""},
		{"a wrong state", "state.json", "{", "state.json: unexpected EOF"},
		{"a state of another range", "state.json", `{"virtual_ips": {"api": "250.0.0.1"}}`, "the virtual IP 250.0.0.1 of \"api\" is not in 240.0.0.0/24"},
		{"an unreadable key", "ca/key.pem", "x", "ca/key.pem: not PEM"},
		{"another key", "ca/key.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "ca/key.pem: not a private key"},
		{"no root", "ca/root.pem", "", "ca/root.pem: not PEM"},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			d := dir(t, good)
			s := start(t, testConfig(d, "node-1"))
			s.Need([]string{"web"})
			snap := s.until("a leaf", func(s *catalog.Snapshot) bool { return s.Leaves["web"] != nil })
			put(t, d, c.file, c.data)
			if c.file == "ca/key.pem" {
				if err := os.Chmod(filepath.Join(d, c.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s.untilError(c.want)
			for len(s.snapshots) > 0 {
				t.Errorf("a snapshot was delivered: %+v", <-s.snapshots)
			}
			if s.Health().Updated.Before(snap.Taken) {
				t.Error("Health does not say when the data was good")
			}
			if !strings.HasPrefix(c.file, "nodes") && !strings.HasPrefix(c.file, "config/api") {
				return
			}
			put(t, d, c.file, good[c.file]+"\n#")
			if good[c.file] == "" {
				if err := os.Remove(filepath.Join(d, c.file)); err != nil {
					t.Fatal(err)
				}
			}
			s.untilHealthy()
		})
	}
}

func FuzzDefinitions(f *testing.F) {
	f.Add(true, true, []byte(apiHCL))
	f.Add(true, false, []byte(webToAPI))
	f.Add(false, true, []byte(`{"services": [{"name": "a", "port": 1, "checks": [{"tcp": "a:1"}], "connect": {"sidecar_service": {"proxy": {}}}}]}`))
	f.Add(false, false, []byte(`{"Kind": "mesh", "TransparentProxy": {}}`))
	f.Add(true, false, []byte("Kind = \"service-resolver\" Name = \"api\" Subsets \"v1\" { Filter = \"x\" }"))
	d := f.TempDir()
	cfg := testConfig(d, "node-1")
	a, err := newAuthority("x.consul", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, hcl, definition bool, data []byte) {
		name := "f.json"
		if hcl {
			name = "f.hcl"
		}
		sub := filepath.Join(d, configDir)
		if definition {
			sub = filepath.Join(d, nodesDir, "node-1")
		}
		defer os.Remove(filepath.Join(sub, name))
		if err := errors.Join(os.MkdirAll(sub, 0o755), os.WriteFile(filepath.Join(sub, name), data, 0o600)); err != nil {
			t.Fatal(err)
		}
		m, _, err := readMesh(d, "dc1", nil)
		if err != nil {
			if !strings.Contains(err.Error(), name) {
				t.Fatalf("an error without the file: %v", err)
			}
			return
		}
		st, err := (&state{}).complete().with(demandOf(&cfg, m), nil)
		if err != nil {
			t.Fatal(err)
		}
		w := &world{mesh: m, state: st, authority: a}
		if w.policy, err = compile(&cfg, m, a.trustDomain, 1); err != nil {
			return
		}
		if _, err := build(&cfg, w, nil, func(*instance) bool { return true }, 1, time.Now()); err != nil && !strings.Contains(err.Error(), name) {
			t.Fatalf("an error without the file: %v", err)
		}
	})
}

// A change of one file reads the whole directory again: this is what it costs with 10,000 intentions.
func BenchmarkReadTenThousandIntentions(b *testing.B) {
	files := make(map[string]string)
	for i := range 100 {
		var s strings.Builder
		fmt.Fprintf(&s, "Kind = \"service-intentions\"\nName = \"svc-%d\"\nSources = [\n", i)
		for j := range 100 {
			fmt.Fprintf(&s, "{ Name = \"src-%d\" Action = \"allow\" },\n", j)
		}
		files[fmt.Sprintf("config/i%d.hcl", i)] = s.String() + "]\n"
		files[fmt.Sprintf("nodes/node-1/s%d.hcl", i)] = fmt.Sprintf("service { name = \"svc-%d\" port = %d }", i, 1000+i)
	}
	d := dir(b, files)
	for b.Loop() {
		if _, _, err := readMesh(d, "dc1", nil); err != nil {
			b.Fatal(err)
		}
	}
}

package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

const patience = 20 * time.Second

// dir makes a mesh directory of files, whose names are relative.
func dir(t testing.TB, files map[string]string) string {
	t.Helper()
	d := t.TempDir()
	for name, data := range files {
		put(t, d, name, data)
	}
	return d
}

// put replaces a file by rename, as operators should.
func put(t testing.TB, dir, name, data string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	if err := errors.Join(os.WriteFile(tmp, []byte(data), 0o644), os.Rename(tmp, path)); err != nil {
		t.Fatal(err)
	}
}

func testConfig(dir, node string) Config {
	return Config{
		Dir: dir, Node: node, NodeAddress: netip.MustParseAddr("10.0.0." + node[len(node)-1:]),
		VirtualRange: netip.MustParsePrefix("240.0.0.0/24"), Ports: Ports{21500, 21599},
	}
}

// started is a running source and the snapshots it has delivered.
type started struct {
	*Source
	t         testing.TB
	snapshots chan *catalog.Snapshot
	last      *catalog.Snapshot
}

func start(t testing.TB, cfg Config, change ...func(*Source)) *started {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(s)
	}
	run := &started{Source: s, t: t, snapshots: make(chan *catalog.Snapshot, 1000)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(snap *catalog.Snapshot) { run.snapshots <- snap }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end with its context")
		}
	})
	return run
}

// until waits for a snapshot for which ok holds.
func (s *started) until(what string, ok func(*catalog.Snapshot) bool) *catalog.Snapshot {
	s.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case snap := <-s.snapshots:
			if s.last != nil && snap.Generation <= s.last.Generation {
				s.t.Fatalf("generation %d after %d", snap.Generation, s.last.Generation)
			}
			s.last = snap
			if ok(snap) {
				return snap
			}
		case <-deadline:
			s.t.Fatalf("no snapshot with %s; health: %v", what, s.Health().Err)
		}
	}
}

func (s *started) first() *catalog.Snapshot {
	s.t.Helper()
	return s.until("anything", func(*catalog.Snapshot) bool { return true })
}

// untilError waits for Health to hold all of want.
func (s *started) untilError(want ...string) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := s.Health().Err
		missing := ""
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("health is %v, want %q in it", err, missing)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (s *started) untilHealthy() {
	s.t.Helper()
	for deadline := time.Now().Add(patience); s.Health().Err != nil; <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("health is still %v", s.Health().Err)
		}
	}
}

func find(snap *catalog.Snapshot, service, id string) *catalog.Instance {
	if svc := snap.Services[service]; svc != nil {
		for _, inst := range svc.Instances {
			if inst.ID == id {
				return inst
			}
		}
	}
	return nil
}

func problems(snap *catalog.Snapshot) string {
	var b strings.Builder
	for _, p := range snap.Problems {
		fmt.Fprintln(&b, p.Service, p.Kind, p.Text)
	}
	return b.String()
}

func allow(snap *catalog.Snapshot, src, dst string) bool {
	return snap.Policy.Decide(snap.Identity(src), dst).Allowed
}

const (
	webHCL   = `service { name = "web" }`
	apiHCL   = `service { name = "api"  id = "api-1"  port = 8080 }`
	webToAPI = "Kind = \"service-intentions\"\nName = \"api\"\nSources = [ { Name = \"web\"  Action = \"allow\" } ]"
	webNoAPI = "Kind = \"service-intentions\"\nName = \"api\"\nSources = [ { Name = \"web\"  Action = \"deny\" } ]"
)

func TestSnapshotOfTwoNodes(t *testing.T) {
	d := dir(t, map[string]string{
		"nodes/node-1/web.hcl":  webHCL,
		"nodes/node-2/api.json": `{"service": {"Name": "api", "ID": "api-1", "Port": 8080, "Tags": ["v1"], "Meta": {"a": "b"}}}`,
		"nodes/node-2/more.hcl": `services {
			name = "db"  address = "10.9.0.1"  port = 5432
			connect { sidecar_service { port = 21999  proxy { local_service_port = 5433 } } }
		}
		services { id = "native-1" name = "native" port = 9000 connect { native = true } }
		services { name = "sock" socket_path = "/run/app.sock" }
		services { name = "sock2" port = 1 connect { sidecar_service { proxy { local_service_socket_path = "/run/b.sock" local_service_address = "10.9.0.3" } } } }`,
		"config/api.hcl":      webToAPI,
		"config/defaults.hcl": `Kind = "service-defaults" Name = "api" Protocol = "http" MaxInboundConnections = 5 MutualTLSMode = "permissive"`,
		"config/mesh.hcl":     `Kind = "mesh" AllowEnablingPermissiveMutualTLS = true`,
		"config/resolver.hcl": `Kind = "service-resolver" Name = "api" ConnectTimeout = "3s"`,
	})
	one := start(t, testConfig(d, "node-1"))
	one.Need([]string{"web"})
	two := start(t, testConfig(d, "node-2"))
	snap := one.until("a mesh address of api", func(s *catalog.Snapshot) bool {
		return find(s, "api", "api-1").Mesh.IsValid() && s.Leaves["web"] != nil
	})

	if snap.Node != "node-1" || snap.Datacenter != "dc1" || !strings.HasSuffix(snap.TrustDomain, ".consul") || len(snap.Roots) != 1 ||
		snap.VirtualRanges[0] != netip.MustParsePrefix("240.0.0.0/24") {
		t.Errorf("snapshot: %+v", snap)
	}
	api := find(snap, "api", "api-1")
	if api.Local || !api.Healthy || api.Node != "node-2" || api.Address.String() != "10.0.0.2:8080" || api.Mesh.Addr().String() != "10.0.0.2" ||
		api.Mesh.Port() < 21500 || api.Mesh.Port() > 21599 || !api.Permissive || api.Tags[0] != "v1" || api.Meta["a"] != "b" || api.Delivery.IsValid() {
		t.Errorf("api: %+v", api)
	}
	svc := snap.Services["api"]
	if svc.Protocol != "http" || svc.MaxInbound != 5 || svc.ConnectTimeout != 3*time.Second || len(svc.Virtual) != 1 || !snap.VirtualRanges[0].Contains(svc.Virtual[0]) {
		t.Errorf("api: %+v", svc)
	}
	db := find(snap, "db", "db")
	if db.Address.String() != "10.9.0.1:5432" || db.Mesh.String() != "10.9.0.1:21999" || db.Delivery.String() != "127.0.0.1:5433" || db.Permissive {
		t.Errorf("db: %+v", db)
	}
	if native := find(snap, "native", "native-1"); !native.Native || native.Address.IsValid() || native.Mesh.String() != "10.0.0.2:9000" {
		t.Errorf("native: %+v", native)
	}
	if sock := find(snap, "sock", "sock"); sock.Address.IsValid() || !sock.Mesh.IsValid() || sock.DeliverySocket != "/run/app.sock" {
		t.Errorf("sock: %+v", sock)
	}
	if sock := find(snap, "sock2", "sock2"); sock.DeliverySocket != "/run/b.sock" || sock.Delivery.String() != "10.9.0.3:1" {
		t.Errorf("sock2: %+v", sock)
	}
	if web := find(snap, "web", "web"); !web.Local || web.Address.IsValid() || web.Mesh.IsValid() {
		t.Errorf("web, which listens nowhere: %+v", web)
	}
	if !allow(snap, "web", "api") || allow(snap, "db", "api") {
		t.Error("the intention does not hold, or the default is not deny")
	}
	if v := snap.Policy.Decide(snap.Identity("web"), "api"); v.Intention.String() != "web => api (allow), api.hcl:3" {
		t.Errorf("intention: %s", v.Intention)
	}
	other := two.until("web", func(s *catalog.Snapshot) bool { return s.Services["web"] != nil })
	if other.TrustDomain != snap.TrustDomain || other.Services["api"].Virtual[0] != svc.Virtual[0] || find(other, "api", "api-1").Mesh != api.Mesh {
		t.Error("the nodes do not agree")
	}
}

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
		"config/resolver.hcl": "Kind = \"service-resolver\" Name = \"api\"\nRedirect { Service = \"v2\" }\nFailover \"*\" { Datacenters = [\"dc2\"] }\nSubsets \"v1\" { Filter = \"x\" }",
		"config/defaults.hcl": "Kind = \"service-defaults\" Name = \"api\" Protocol = \"http\" Mode = \"transparent\"\nRateLimits { InstanceLevel { RequestsPerSecond = 1 RequestsMaxBurst = 2 } }\nMeshGateway { Mode = \"local\" }",
		"config/proxy.hcl":    "Kind = \"proxy-defaults\" Name = \"global\"\nConfig { protocol = \"tcp\"\n envoy_x = 1 }",
		"config/mesh.hcl":     "Kind = \"mesh\"\nTransparentProxy { MeshDestinationsOnly = true }",
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
		"api unsupported Redirect of service-resolver is not honoured (" + d + "/config/resolver.hcl:2)",
		"Failover of service-resolver", "Subsets of service-resolver",
		"api l7-ignored RateLimits of service-defaults", "MeshGateway of service-defaults is not honoured (" + d + "/config/defaults.hcl:3)",
		"Config envoy_x of proxy-defaults is not honoured (" + d + "/config/proxy.hcl:3)",
		"TransparentProxy of mesh is not honoured",
		"no peers are known here",
		"ingress-gateway \"gw\" is ignored",
		"web unknown-service intention web => api names \"web\"",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no problem says %q", want)
		}
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

func TestFailingFromTheStartIsReportedAndRecovers(t *testing.T) {
	d := filepath.Join(t.TempDir(), "mesh.d")
	s := start(t, testConfig(d, "node-1"))
	s.untilError("mesh.d: no such file", "create it")
	put(t, d, "nodes/node-1/web.hcl", webHCL)
	s.until("web", func(s *catalog.Snapshot) bool { return s.Services["web"] != nil })
	s.untilHealthy()
}

func TestAFileWrittenInPlaceIsAppliedWhenItIsWhole(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": apiHCL, "config/api.hcl": webToAPI})
	s := start(t, testConfig(d, "node-1"))
	s.first()
	path := filepath.Join(d, "config/api.hcl")
	if err := os.Truncate(path, 20); err != nil {
		t.Fatal(err)
	}
	s.untilError("config/api.hcl:1")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = f.WriteString(webNoAPI); errors.Join(err, f.Close()) != nil {
		t.Fatal(err)
	}
	s.until("a denied web", func(s *catalog.Snapshot) bool { return !allow(s, "web", "api") })
	s.untilHealthy()
}

func TestADirectoryThatIsDeletedKeepsTheLastGoodState(t *testing.T) {
	d := dir(t, map[string]string{"mesh/nodes/node-1/web.hcl": webHCL, "mesh/nodes/node-2/api.hcl": apiHCL, "mesh/config/api.hcl": webToAPI})
	mesh, away := filepath.Join(d, "mesh"), filepath.Join(d, "away")
	s := start(t, testConfig(mesh, "node-1"))
	before := s.first()
	if err := os.Rename(mesh, away); err != nil {
		t.Fatal(err)
	}
	s.untilError("mesh: no such file")
	put(t, d, "mesh/nodes/node-1/web.hcl", webHCL)
	s.untilError("config: no such file", "restore it")
	put(t, d, "mesh/nodes/node-2/api.hcl", apiHCL)
	put(t, d, "mesh/config/api.hcl", webNoAPI)
	s.untilError("ca/root.pem is gone", "restore it")
	s.until("a denied web", func(s *catalog.Snapshot) bool { return !allow(s, "web", "api") })
	if err := errors.Join(os.RemoveAll(mesh), os.Rename(away, mesh)); err != nil {
		t.Fatal(err)
	}
	s.untilHealthy()
	after := s.until("an allowed web", func(s *catalog.Snapshot) bool { return allow(s, "web", "api") })
	if after.TrustDomain != before.TrustDomain || after.Services["api"].Virtual[0] != before.Services["api"].Virtual[0] {
		t.Error("the mesh is another one")
	}
}

// The time is from the rename of the file to the delivery; the bound is generous, for busy machines.
func TestAChangedIntentionIsDeliveredSoon(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": apiHCL, "config/api.hcl": webToAPI})
	s := start(t, testConfig(d, "node-1"))
	s.first()
	best := patience
	for i := range 6 {
		data, want := webNoAPI, false
		if i%2 == 1 {
			data, want = webToAPI, true
		}
		begin := time.Now()
		put(t, d, "config/api.hcl", data)
		s.until("the flip", func(s *catalog.Snapshot) bool { return allow(s, "web", "api") == want })
		best = min(best, time.Since(begin))
	}
	t.Logf("best of 6: %s", best)
	if best > time.Second { // the rescan alone would take 2 s
		t.Errorf("the fastest of 6 changes took %s", best)
	}
}

// What changes nothing, such as a comment's file touched, must not wake the node.
func TestNothingIsDeliveredWhenNothingChanged(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": apiHCL, "config/api.hcl": webToAPI})
	s := start(t, testConfig(d, "node-1"))
	generation := s.first().Generation
	put(t, d, "config/api.hcl", webToAPI+"\n# a comment")
	put(t, d, "config/README", "not ours")
	put(t, d, "nodes/node-1/db.hcl", `service { name = "db" }`)
	if snap := s.until("db", func(s *catalog.Snapshot) bool { return s.Services["db"] != nil }); snap.Generation != generation+1 {
		t.Errorf("generation %d after %d", snap.Generation, generation)
	}
}

func TestManyDaemonsStartOnOneEmptyDirectory(t *testing.T) {
	d := t.TempDir()
	const daemons = 8
	sources := make([]*started, daemons)
	var wg sync.WaitGroup
	for i := range daemons {
		wg.Go(func() {
			cfg := testConfig(d, fmt.Sprintf("node-%d", i+1))
			sources[i] = start(t, cfg)
			sources[i].Need([]string{"web"})
		})
	}
	wg.Wait()
	domains := make(map[string]bool)
	for _, s := range sources {
		snap := s.until("a leaf", func(s *catalog.Snapshot) bool { return s.Leaves["web"] != nil })
		domains[snap.TrustDomain+snap.Roots[0].SerialNumber.String()] = true
	}
	if len(domains) != 1 {
		t.Fatalf("%d roots: %v", len(domains), domains)
	}
	for i := range daemons {
		for j := range 3 {
			put(t, d, fmt.Sprintf("nodes/node-%d/svc-%d.hcl", i+1, j), fmt.Sprintf("service { name = \"s-%d-%d\" port = %d }", i, j, 8000+j))
		}
	}
	all := func(s *catalog.Snapshot) bool {
		n := 0
		for _, svc := range s.Services {
			if svc.Instances[0].Mesh.IsValid() && len(svc.Virtual) == 1 {
				n++
			}
		}
		return n == daemons*3
	}
	virtual := make(map[string]netip.Addr)
	for _, s := range sources {
		for name, svc := range s.until("all services placed", all).Services {
			if before, seen := virtual[name]; seen && before != svc.Virtual[0] {
				t.Errorf("%s has the virtual IPs %s and %s", name, before, svc.Virtual[0])
			}
			virtual[name] = svc.Virtual[0]
		}
	}
	info, err := os.Stat(filepath.Join(d, "ca/key.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key.pem: %v, %v", info.Mode(), err)
	}
	for _, sub := range []string{"", "ca"} {
		left, _ := filepath.Glob(filepath.Join(d, sub, ".*.*"))
		if len(left) > 0 {
			t.Errorf("temporary files left: %v", left)
		}
	}
}

func TestChecksDecideTheHealthOfLocalInstances(t *testing.T) {
	var status sync.Map
	status.Store("code", http.StatusOK)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodHead || r.Header.Get("X-Probe") != "yes" {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		code, _ := status.Load("code")
		w.WriteHeader(code.(int))
	}))
	defer server.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	d := dir(t, map[string]string{
		"nodes/node-1/a.hcl": fmt.Sprintf(`
			service { name = "http" port = 1 check { http = %q method = "HEAD" header { x-probe = ["yes"] } interval = "100ms" timeout = "5s" } }
			service { name = "tcp"  port = 2 check { tcp = %q interval = "100ms" } check { tcp = "made-up.host:1" interval = "100ms" } }
			service { name = "none" port = 3 check { tcp = %q interval = "100ms" } }
			service { name = "old" port = 4 check { tcp = %q interval = "1h" status = "passing" failures_before_critical = 3 } }
			service { name = "free" port = 5 }`, server.URL, ln.Addr(), closed.Addr(), closed.Addr()),
		"nodes/node-2/b.hcl": fmt.Sprintf(`service { name = "remote" port = 6 check { tcp = %q interval = "100ms" } }`, closed.Addr()),
	})
	cfg := testConfig(d, "node-1")
	var log bytes.Buffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	cfg.DialContext = func(ctx context.Context, id, network, address string) (net.Conn, error) {
		if address == "made-up.host:1" { // only the hook can know where that is
			if id != "tcp" {
				t.Errorf("dialled for %q", id)
			}
			address = ln.Addr().String()
		}
		var dialer net.Dialer
		return dialer.DialContext(ctx, network, address)
	}
	s := start(t, cfg)
	first := s.first()
	for name, want := range map[string]bool{"http": false, "tcp": false, "none": false, "old": true, "free": true, "remote": true} {
		if got := find(first, name, name).Healthy; got != want {
			t.Errorf("before the first check %s is healthy: %v", name, got)
		}
	}
	snap := s.until("healthy services", func(s *catalog.Snapshot) bool {
		return find(s, "http", "http").Healthy && find(s, "tcp", "tcp").Healthy
	})
	for name, want := range map[string]bool{"none": false, "old": true, "free": true, "remote": true} {
		if got := find(snap, name, name).Healthy; got != want {
			t.Errorf("%s is healthy: %v", name, got)
		}
	}
	if snap.Policy != first.Policy {
		t.Error("the policy was compiled anew although nothing but health changed")
	}
	status.Store("code", http.StatusFound)
	s.until("an unhealthy http", func(s *catalog.Snapshot) bool { return !find(s, "http", "http").Healthy })
	status.Store("code", http.StatusNoContent)
	s.until("a healthy http", func(s *catalog.Snapshot) bool { return find(s, "http", "http").Healthy })
	ln.Close()
	s.until("an unhealthy tcp", func(s *catalog.Snapshot) bool { return !find(s, "tcp", "tcp").Healthy })
	put(t, d, "nodes/node-1/a.hcl", `service { name = "tcp" port = 2 }`)
	s.until("a tcp without checks", func(s *catalog.Snapshot) bool { return find(s, "tcp", "tcp").Healthy })
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	for what, spoil := range map[string]func(*Config){
		"no directory":           func(c *Config) { c.Dir = "" },
		"no node":                func(c *Config) { c.Node = "" },
		"a node that is a path":  func(c *Config) { c.Node = "../x" },
		"no address":             func(c *Config) { c.NodeAddress = netip.Addr{} },
		"a loopback address":     func(c *Config) { c.NodeAddress = netip.MustParseAddr("127.0.0.1") },
		"no range":               func(c *Config) { c.VirtualRange = netip.Prefix{} },
		"the node in the range":  func(c *Config) { c.VirtualRange = netip.MustParsePrefix("10.0.0.0/8") },
		"no ports":               func(c *Config) { c.Ports = Ports{} },
		"ports in reverse order": func(c *Config) { c.Ports = Ports{2, 1} },
	} {
		cfg := testConfig("/x", "node-1")
		spoil(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", what)
		}
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
		m, err := readMesh(d)
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

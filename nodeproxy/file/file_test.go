package file

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
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
		"nodes/node-3/api.hcl": `services { id = "api-3" name = "api" address = "10.0.0.3" port = 8080 connect { sidecar_service { port = 21999 } } }`,
		"config/api.hcl":       webToAPI,
		"config/defaults.hcl":  `Kind = "service-defaults" Name = "api" Protocol = "http" MaxInboundConnections = 5 MutualTLSMode = "permissive"`,
		"config/mesh.hcl":      `Kind = "mesh" AllowEnablingPermissiveMutualTLS = true`,
		"config/resolver.hcl":  `Kind = "service-resolver" Name = "api" ConnectTimeout = "3s"`,
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
	if far := find(snap, "api", "api-3"); !api.Tunnels || find(snap, "native", "native-1").Tunnels || !far.Mesh.IsValid() || far.Tunnels {
		t.Errorf("tunnels are tried where no nodeproxy is, or not where one is: %+v", far)
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

func TestANodeWithoutDefinitionsIsAProblem(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL})
	if got := problems(start(t, testConfig(d, "node-1")).first()); strings.Contains(got, "unknown-node") {
		t.Errorf("node-1 is defined: %s", got)
	}
	if got := problems(start(t, testConfig(d, "node-2")).first()); !strings.Contains(got, "unknown-node nodes/node-2 defines no service") {
		t.Errorf("node-2 is not defined: %q", got)
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
	after := s.until("an allowed web", func(s *catalog.Snapshot) bool { // what is read while it is moved may have the intention alone
		return allow(s, "web", "api") && s.Services["api"] != nil
	})
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
	for range 2 { // the second look has begun after the change
		before := s.Health().Updated
		for deadline := time.Now().Add(patience); s.Health().Updated.Equal(before) && time.Now().Before(deadline); {
			<-time.After(5 * time.Millisecond)
		}
	}
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

func TestCallsFollowServiceResolvers(t *testing.T) {
	d := dir(t, map[string]string{
		"nodes/node-1/web.hcl": webHCL,
		"nodes/node-2/api.hcl": `services { name = "api" id = "api-1" port = 8080 meta { version = "v1" } connect { sidecar_service { port = 21998 } } }
			services { name = "api" id = "api-2" port = 8081 meta { version = "v2" } connect { sidecar_service { port = 21999 } } }
			services { name = "spare" port = 8082 connect { sidecar_service { port = 21997 } } }`,
		"config/api.hcl": `Kind = "service-resolver" Name = "api" DefaultSubset = "old" ConnectTimeout = "2s" LoadBalancer { Policy = "maglev" }
			Subsets "old" { Filter = "Service.Meta.version == v1" }
			Subsets "new" { Filter = "Service.Meta.version == v2" OnlyPassing = true }
			Failover "*" { Targets = [ { ServiceSubset = "new" }, { Service = "spare" } ] }`,
		"config/alias.hcl": `Kind = "service-resolver" Name = "alias" Redirect { Service = "api" ServiceSubset = "new" }`,
	})
	one := start(t, testConfig(d, "node-1"))
	one.Need([]string{"web"})
	start(t, testConfig(d, "node-2"))
	snap := one.until("addresses of both instances", func(s *catalog.Snapshot) bool {
		return find(s, "api", "api-1").Mesh.IsValid() && find(s, "api", "api-2").Mesh.IsValid()
	})
	describe := func(name string) (all string) {
		route := snap.Services[name].Route()
		for _, t := range route.Targets {
			all += t.String() + "["
			for _, inst := range t.Instances {
				all += inst.ID
			}
			all += "] " + t.ConnectTimeout.String() + " "
		}
		return all + string(route.Balance)
	}
	for name, want := range map[string]string{
		"api":   "old.api[api-1] 2s new.api[api-2] 2s spare[spare] 0s source_hash",
		"alias": "new.api[api-2] 2s spare[spare] 0s source_hash",
	} {
		if got := describe(name); got != want {
			t.Errorf("calls of %s go to %s, want %s", name, got, want)
		}
	}
	if svc := snap.Services["alias"]; len(svc.Virtual) != 1 || svc.Virtual[0] == snap.Services["api"].Virtual[0] {
		t.Errorf("the virtual IPs of alias are %s", svc.Virtual)
	}
	if got := strings.Join(snap.Services["api"].Subsets, " "); got != "new old" {
		t.Errorf("the subsets of api are %s", got)
	}
	if text := problems(snap); text != "" {
		t.Errorf("problems: %s", text)
	}
}

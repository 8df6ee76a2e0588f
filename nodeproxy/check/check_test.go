package check

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/redirect"
)

// want checks that one result has that verdict and text.
func want(t *testing.T, results []Result, verdict Verdict, text string) {
	t.Helper()
	for _, r := range results {
		if r.Verdict == verdict && strings.Contains(r.Name+": "+r.Text, text) {
			return
		}
	}
	t.Errorf("no %s with %q in %+v", verdict, text, results)
}

func TestMissingKernelFeatureFailsAndSaysWhatItCosts(t *testing.T) {
	results := Kernel([]redirect.Feature{{Name: "sockops"}, {Name: "sk_lookup", Err: errors.New("not supported"), Costs: "nothing works"}})
	want(t, results, OK, "kernel sockops")
	want(t, results, Failed, "kernel sk_lookup: not supported; nothing works")
	if Worst(results) != Failed {
		t.Errorf("worst = %s, want failed", Worst(results))
	}
}

func TestWithoutRootTheKernelIsOneLine(t *testing.T) {
	denied := fmt.Errorf("load program: %w", unix.EPERM)
	results := Kernel([]redirect.Feature{{Name: "cgroup2 mounted"}, {Name: "sockops", Err: denied}, {Name: "sk_lookup", Err: denied}, {Name: "load", Err: errors.New("map create: nonsense")}})
	want(t, results, Failed, "run as root")
	if len(results) != 1 {
		t.Errorf("results = %v, want one", results)
	}
}

func TestMissingCapabilityNamesTheCallThatNeedsIt(t *testing.T) {
	results := capabilityResults(1 << 12) // CAP_NET_ADMIN alone, see linux/capability.h
	want(t, results, OK, "CAP_NET_ADMIN")
	want(t, results, Failed, "CAP_SYS_ADMIN: missing; needed for bpf(2)")
	want(t, results, Warning, "CAP_DAC_READ_SEARCH: missing; needed for open_by_handle_at(2)")
}

func TestBrokenConfigurationFailsWithFileAndLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.hcl")
	if err := os.WriteFile(path, []byte("\ncolour = 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, r := Configuration(path)
	if cfg != nil {
		t.Error("a configuration in spite of the error")
	}
	want(t, []Result{r}, Failed, "c.hcl:2")
}

func TestFileLimitIsHeldAgainstTheConnections(t *testing.T) {
	want(t, []Result{fileLimitResult(1<<20, 1000)}, OK, "enough")
	r := fileLimitResult(5024, 100000)
	want(t, []Result{r}, Warning, "lower limits.connections to 1872")
}

func TestPinsMustBeOnABPFFilesystem(t *testing.T) {
	want(t, []Result{bpffs(filepath.Join(t.TempDir(), "not", "there"))}, Failed, "mount -t bpf")
}

func TestListenersInThePortRangeAreFound(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:53FC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0100007F:53FD 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 3 1
`
	got := listeners(strings.NewReader(table), 21500, 21999)
	if len(got) != 1 || got[0] != 21500 { // 0x53FC listens, 0x53FD (21501) is connected, 80 is outside
		t.Errorf("listeners = %v, want 21500", got)
	}
}

func TestSourceReportsItsErrorOrItsProblems(t *testing.T) {
	_, results := Source(t.Context(), func(context.Context) (*catalog.Snapshot, error) { return nil, errors.New("a.hcl:3: broken") })
	want(t, results, Failed, "a.hcl:3: broken")
	snap := &catalog.Snapshot{Problems: []catalog.Problem{{Kind: "unsupported", Text: "mesh gateway"}, {Service: "web", Text: "its own"}}}
	_, results = Source(t.Context(), func(context.Context) (*catalog.Snapshot, error) { return snap, nil })
	want(t, results, Warning, "mesh gateway")
	want(t, results, Warning, "configuration of web is ignored or refused: --service NAME")
	if len(results) != 3 {
		t.Errorf("results = %v, want the text of the problem of no service only", results)
	}
}

func TestServiceListsWhatIsIgnoredAndDenied(t *testing.T) {
	at := netip.MustParseAddrPort("10.0.0.1:21500")
	snap := &catalog.Snapshot{
		Services: map[string]*catalog.Service{
			"web": {Name: "web", IgnoredL7: []string{"service-router web"}, Virtual: []netip.Addr{netip.MustParseAddr("240.0.0.1")},
				Instances: []*catalog.Instance{{ID: "web-1", Mesh: at}, {ID: "web-2", Healthy: true}}},
			"db":  {Name: "db"},
			"api": {Name: "api", Virtual: []netip.Addr{netip.MustParseAddr("240.0.0.2")}, Instances: []*catalog.Instance{{ID: "api-1", Mesh: at}}},
		},
		Problems: []catalog.Problem{{Service: "web", Kind: "unsupported", Text: "permissions mean deny"}},
	}
	web := Service(snap, "web")
	want(t, web, Warning, "service-router web is ignored")
	want(t, web, Warning, "permissions mean deny")
	want(t, web, Warning, "web-2")
	if Worst(web) != Warning {
		t.Errorf("web has an instance that works, and is %s", Worst(web))
	}
	want(t, Service(snap, "db"), Failed, "no instance")
	want(t, Service(snap, "db"), Warning, "no virtual IP")
	if api := Service(snap, "api"); Worst(api) != OK || len(api) != 1 {
		t.Errorf("api = %v, want one ok", api)
	}
	want(t, Service(snap, "nope"), Failed, "api, db, web")
	snap.Problems = append(snap.Problems, catalog.Problem{Service: "nope", Kind: "unknown-service", Text: "an intention names it"})
	want(t, Service(snap, "nope"), Warning, "an intention names it")
}

func TestWorkloadsAreReportedAsTheDaemonSeesThem(t *testing.T) {
	results := Workloads(&admin.Status{
		Workloads: []admin.Workload{
			{Cgroup: "/c/web", Service: "web", State: "protected", Mode: "strict", DNS: "on"},
			{Cgroup: "/c/api", Service: "api", State: "waiting", Detail: "no certificate"},
			{Cgroup: "/c/db", Service: "db", State: "empty"},
			{Cgroup: "/c/cache", Service: "cache", State: "protected", DNS: "off: another process has port 15053"},
		},
		Refused: []admin.Refused{{Cgroup: "/c/x", Service: "bank", Why: "not allowed"}},
	})
	want(t, results, OK, "workload web (web): protected")
	want(t, results, Failed, "no certificate")
	want(t, results, Warning, "workload db (db): empty")
	want(t, results, OK, "dns web (web): on")
	want(t, results, Warning, "dns cache (cache): off, name queries pass as they are: another process has port 15053")
	want(t, results, Failed, "/c/x: may not be bank")
	want(t, Workloads(&admin.Status{}), Warning, "none is enrolled")
}

func TestHostAnswersEveryQuestion(t *testing.T) {
	results := Host(&config.Config{State: config.State{Pins: "/sys/fs/bpf/nodeproxy"}, Inbound: config.Inbound{FirstPort: 21500, LastPort: 21999}})
	for _, name := range []string{"bpffs", "RLIMIT_NOFILE", "inbound.ports", "IPv6"} {
		found := false
		for _, r := range results {
			found = found || r.Name == name && r.Text != "" && r.Verdict != ""
		}
		if !found {
			t.Errorf("no answer about %s in %v", name, results)
		}
	}
}

func TestTheTableOfPlatformsHasEveryFeatureAndTestsThatThereAre(t *testing.T) {
	text, err := os.ReadFile("../../docs/platforms.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range redirect.Probe() {
		if !strings.Contains(string(text), f.Name) {
			t.Errorf("it does not have the feature %q", f.Name)
		}
	}
	for _, c := range capabilities {
		if !strings.Contains(string(text), "`"+c.name+"`") {
			t.Errorf("it does not have %s", c.name)
		}
	}
	var tests []byte
	for _, path := range []string{"../../tests/vm/vm_test.go", "../../tests/deploy/systemd_test.go", "../../tests/kubernetes/node_test.go", "../../tests/e2e/capabilities_test.go"} {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, source...)
	}
	for _, name := range regexp.MustCompile("`(Test[A-Za-z]+)`").FindAllStringSubmatch(string(text), -1) {
		if !strings.Contains(string(tests), "func "+name[1]+"(") {
			t.Errorf("there is no %s", name[1])
		}
	}
}

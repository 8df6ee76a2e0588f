package workload

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// collect runs p until it has claimed once, and returns the claims and what ends it.
func collect(t *testing.T, p Provider) (claims <-chan []Claim, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan []Claim, 16)
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, func(c []Claim) { out <- append([]Claim(nil), c...) }) }()
	return out, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestWorkloadsEnrolledByHandOutliveTheDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "enrolled.json")
	m, err := NewManual(path)
	if err != nil {
		t.Fatal(err)
	}
	claims, stop := collect(t, m)
	if first := <-claims; len(first) != 0 {
		t.Fatalf("a new node has %v", first)
	}
	permissive := Permissive
	for _, c := range []Claim{{Cgroup: "/c/web/", Service: "web"}, {Cgroup: "/c/api", Service: "old"}, {Cgroup: "/c/api", Service: "api", Mode: &permissive}} {
		if err := m.Enroll(c); err != nil {
			t.Fatal(err)
		}
		<-claims
	}
	if err := m.Unenroll("/c/web"); err != nil {
		t.Fatal(err)
	}
	if left := <-claims; len(left) != 1 || left[0].Service != "api" {
		t.Errorf("told %v, want api alone", left)
	}
	if err := m.Unenroll("/c/web"); err == nil || !strings.Contains(err.Error(), "not enrolled by hand") {
		t.Errorf("un-enrolled twice: %v", err)
	}
	stop()

	again, err := NewManual(path)
	if err != nil {
		t.Fatal(err)
	}
	claims, stop = collect(t, again)
	defer stop()
	got := <-claims
	if len(got) != 1 || got[0].Cgroup != "/c/api" || got[0].Provider != "enroll" || got[0].Mode == nil || *got[0].Mode != Permissive {
		t.Errorf("after a restart: %+v", got)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file: %v, %v", st, err)
	}
}

func TestABrokenListOfWorkloadsIsNotOverwritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "enrolled.json")
	if err := os.WriteFile(path, []byte("[{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewManual(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, want an error naming the file", err)
	}
}

func TestGrants(t *testing.T) {
	m := &Manager{
		mount:  "/cg",
		cgroup: "/cg/system/nodeproxy",
		cfg:    Config{Providers: []Provider{Configured(nil), &Manual{}}},
		claims: map[string][]Claim{
			"enroll": {
				{Cgroup: "/cg/web", Service: "thief", Provider: "enroll"},
				{Cgroup: "/cg/api", Service: "api", Provider: "enroll"},
				{Cgroup: "/cg/same", Service: "same", Provider: "enroll"},
			},
			"config": {
				{Cgroup: "/cg/web", Service: "web", Provider: "config"},
				{Cgroup: "/cg", Service: "root", Provider: "config"},
				{Cgroup: "/cg/system", Service: "ancestor", Provider: "config"},
				{Cgroup: "/cg/system/nodeproxy", Service: "self", Provider: "config"},
				{Cgroup: "/cg/system/nodeproxy2", Service: "neighbour", Provider: "config"},
				{Cgroup: "/elsewhere", Service: "elsewhere", Provider: "config"},
				{Cgroup: "/cg/../etc", Service: "dots", Provider: "config"},
				{Cgroup: "/cg/same", Service: "same", Provider: "config"},
			},
		},
	}
	granted, refused := m.grants()
	var got []string
	for _, c := range granted {
		got = append(got, c.Service+" by "+c.Provider)
	}
	if want := "web by config, neighbour by config, same by config, api by enroll"; strings.Join(got, ", ") != want {
		t.Errorf("granted %v, want %s", got, want)
	}
	why := make(map[string]string)
	for _, r := range refused {
		why[r.Claim.Service] = r.Why
	}
	for service, part := range map[string]string{
		"thief": "config claims this cgroup", "root": "root cgroup", "ancestor": "daemon itself", "self": "daemon itself",
		"elsewhere": "not on cgroup2", "dots": "not on cgroup2",
	} {
		if !strings.Contains(why[service], part) {
			t.Errorf("%s: refused with %q, want %q in it", service, why[service], part)
		}
	}
	if len(refused) != 6 {
		t.Errorf("refused %v", refused)
	}
}

func TestProvidersInConflict(t *testing.T) {
	permissive := Permissive
	m := &Manager{
		mount: "/cg", cgroup: "/cg/nodeproxy",
		cfg: Config{Providers: []Provider{Configured(nil), &Manual{}}},
		claims: map[string][]Claim{
			"config": {
				{Cgroup: "/cg/equal", Service: "equal", Ports: []uint16{80}, Provider: "config"},
				{Cgroup: "/cg/mode", Service: "mode", Provider: "config"},
				{Cgroup: "/cg/out", Service: "out", Provider: "config"},
				{Cgroup: "/cg/ports", Service: "ports", Exclude: Exclusions{InboundPorts: []uint16{1}}, Provider: "config"},
				{Cgroup: "/cg/invalid", Service: "first", Invalid: "label mode is bad", Provider: "config"},
			},
			"enroll": {
				{Cgroup: "/cg/equal", Service: "equal", Ports: []uint16{80}, Provider: "enroll"},
				{Cgroup: "/cg/mode", Service: "mode", Mode: &permissive, Provider: "enroll"},
				{Cgroup: "/cg/out", Mesh: Disabled, Provider: "enroll"},
				{Cgroup: "/cg/ports", Service: "ports", Exclude: Exclusions{InboundPorts: []uint16{2}}, Provider: "enroll"},
				{Cgroup: "/cg/invalid", Service: "second", Provider: "enroll"},
				{Cgroup: "/cg/nothing", Provider: "enroll"},
			},
		},
	}
	granted, refused := m.grants()
	got := make(map[string]string)
	for _, c := range granted {
		got[c.Cgroup] = c.Service + " by " + c.Provider
	}
	for cgroup, want := range map[string]string{
		"/cg/equal": "equal by config", "/cg/mode": "mode by config", "/cg/out": "out by config", "/cg/ports": "ports by config",
		"/cg/invalid": "second by enroll", "/cg/nothing": "",
	} {
		if got[cgroup] != want {
			t.Errorf("%s is granted as %q, want %q", cgroup, got[cgroup], want)
		}
	}
	why := make(map[string]string)
	for _, r := range refused {
		why[r.Claim.Cgroup] += r.Claim.Provider + ": " + r.Why
	}
	for cgroup, part := range map[string]string{
		"/cg/mode": "enroll: config claims this cgroup for the same service with other settings", "/cg/out": `enroll: config claims this cgroup for service "out"`,
		"/cg/ports": "enroll: config claims", "/cg/invalid": "config: label mode is bad", "/cg/nothing": "enroll: it names no service",
	} {
		if !strings.HasPrefix(why[cgroup], part) {
			t.Errorf("%s: refused with %q, want %q", cgroup, why[cgroup], part)
		}
	}
	if len(refused) != 5 {
		t.Errorf("refused %v", refused)
	}
}

func TestACgroupIsTakenOutOnlyOfAnEnrolledOne(t *testing.T) {
	got := enrolments([]Claim{
		{Cgroup: "/cg/web", Service: "web"}, {Cgroup: "/cg/web/out", Mesh: Disabled}, {Cgroup: "/cg/web/out/deeper", Mesh: Disabled},
		{Cgroup: "/cg/webber", Mesh: Disabled}, {Cgroup: "/cg/alone", Mesh: Disabled},
		{Cgroup: "/cg/seen", Service: "seen", Mesh: Observe}, {Cgroup: "/cg/seen/out", Mesh: Disabled},
	})
	for cgroup, want := range map[string]bool{
		"/cg/web": true, "/cg/web/out": true, "/cg/web/out/deeper": true, "/cg/webber": false, "/cg/alone": false, "/cg/seen": true, "/cg/seen/out": true,
	} {
		if _, ok := got[cgroup]; ok != want {
			t.Errorf("%s is attached: %t, want %t", cgroup, ok, want)
		}
	}
}

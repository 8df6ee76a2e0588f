package main

import (
	"context"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/consul"
)

// TestScaleSmoke runs the whole scale benchmark, tiny, with both sources. The run itself fails if the daemon does not know every service,
// endpoint and intention, protect every workload, or cut the connection that an intention denies, and let it through again.
func TestScaleSmoke(t *testing.T) {
	consul.Require(t)
	if testing.Short() {
		t.Skip("slow: end to end")
	}
	binary, out := buildNodeproxy(t), t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var shown strings.Builder
	if err := run(ctx, []string{"scale", "-smoke", "-nodeproxy", binary, "-out", out}, &shown); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(out, "scale.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r scaleReport
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if want := 2 * 2; len(r.Measured) != want {
		t.Fatalf("%d measurements, want %d: two sizes with each source", len(r.Measured), want)
	}
	for _, m := range r.Measured {
		kinds := make(map[change]int)
		for _, c := range m.Changes {
			kinds[change{Path: c.Path, Allowed: c.Allowed}]++
			if c.Applied <= 0 {
				t.Errorf("%s source, %d services: an intention was in force %v ms after it was written", m.Source, m.Size.Services, c.Applied)
			}
		}
		for _, kind := range []change{{Path: admin.PathDirect}, {Path: admin.PathDirect, Allowed: true}, {Path: admin.PathMTLS}, {Path: admin.PathMTLS, Allowed: true}} {
			if kinds[kind] != 2 {
				t.Errorf("%s source, %d services: %d changes like %+v were measured, want 2", m.Source, m.Size.Services, kinds[kind], kind)
			}
		}
		if m.Ready <= 0 || m.Attach <= 0 || m.Restart <= 0 || m.Resident < 1<<20 || m.ResidentAfter < 1<<20 {
			t.Errorf("not everything was measured: %+v", m)
		}
	}
	if want := 2 * 3; len(r.Goals) != want { // the smallest size of a whole run is none of a tiny one
		t.Errorf("%d goals, want %d", len(r.Goals), want)
	}
	if text, err := os.ReadFile(filepath.Join(out, scalePlot)); err != nil || !strings.Contains(string(text), "</svg>") {
		t.Errorf("%s is no whole plot: %v", scalePlot, err)
	}
	markdown, err := os.ReadFile(filepath.Join(out, "scale.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(markdown), shown.String()) || !strings.Contains(shown.String(), "| start to ready") {
		t.Errorf("the Markdown does not end with the tables of the terminal:\n%s", shown.String())
	}
}

// The model must be the law that values follow, and say how far they are from it.
func TestFitFindsTheLawAndTheDeviation(t *testing.T) {
	xs := []float64{0.1, 0.2, 0.5, 1}
	for name, c := range map[string]struct {
		law      func(float64) float64
		power    bool
		tenTimes float64
	}{
		"line":     {func(x float64) float64 { return 30 + 100*x }, false, 1030},
		"constant": {func(float64) float64 { return 7 }, false, 7},
		"square":   {func(x float64) float64 { return 5 * x * x }, true, 500},
	} {
		var values []float64
		for _, x := range xs {
			values = append(values, c.law(x))
		}
		m := fit(xs, values)
		if m.Residual > 1e-9 || math.Abs(m.at(10)/c.tenTimes-1) > 1e-9 || m.Power != c.power && name != "constant" {
			t.Errorf("%s: the model is %v with residual %v, and %v at 10", name, m, m.Residual, m.at(10))
		}
	}
	if m := fit(xs, []float64{40, 50, 80, 195}); m.Residual < 0.05 || m.Residual > 0.5 { // of a line, with one value half as large again
		t.Errorf("the residual of values that follow no law is %v", m.Residual)
	}
}

func TestASizeHasAsManyEndpointsAndIntentionsAsItSays(t *testing.T) {
	s := fullSize().times(0.1)
	endpoints, intentions := make(map[string]int), 0
	for i := range s.Workloads {
		endpoints[serviceName(i)]++
	}
	for _, e := range s.remote() {
		endpoints[e.service]++
	}
	total := 0
	for i := range s.Services {
		total += endpoints[serviceName(i)]
		intentions += len(s.sources(i, true))
		if endpoints[serviceName(i)] != 4 {
			t.Fatalf("%s has %d endpoints, want 4", serviceName(i), endpoints[serviceName(i)])
		}
	}
	if total != 2000 || intentions != 1000 || s.Workloads != 25 {
		t.Errorf("%d endpoints, %d intentions, %d workloads; want 2000, 1000, 25", total, intentions, s.Workloads)
	}
}

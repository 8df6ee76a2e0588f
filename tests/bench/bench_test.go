package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

// TestMain lets the test's executable be the load and the servers inside the lab.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && slices.Contains([]string{"load", "serve", "member", "hold"}, os.Args[1]) {
		if err := run(context.Background(), os.Args[1:], os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestSmoke runs the whole benchmark, tiny. The run itself fails if a path does not carry its bytes as it claims.
func TestSmoke(t *testing.T) {
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: end to end")
	}
	binary, out := buildNodeproxy(t), t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var shown strings.Builder
	if err := run(ctx, []string{"-smoke", "-nodeproxy", binary, "-out", out}, &shown); err != nil {
		t.Fatal(err)
	}
	var r report
	text, err := os.ReadFile(filepath.Join(out, "end-to-end.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if want := len(kinds()) * 2 * (6 + len(peers()) + len(references())); len(r.Samples) != want {
		t.Errorf("%d samples, want %d: every kind, with two numbers of connections, over six paths and those of peers and references", len(r.Samples), want)
	}
	if want := 2*len(goals()) + 3 + 2; len(r.Goals) != want { // with two numbers of connections each; the daemons under three loads; memory with tunnels and without
		t.Errorf("%d goals, want %d", len(r.Goals), want)
	}
	if len(r.Profiles) == 0 && slices.ContainsFunc(r.Goals, func(g result) bool { return !g.Reached }) {
		t.Error("a goal is not reached, and there is no profile")
	}
	for _, p := range r.Profiles {
		if text, err := os.ReadFile(filepath.Join(out, p.File)); err != nil || !strings.Contains(string(text), "flat%") {
			t.Errorf("%s is no profile: %v", p.File, err)
		}
	}
	for _, f := range figures() {
		if text, err := os.ReadFile(filepath.Join(out, f.file)); err != nil || !strings.Contains(string(text), "</svg>") {
			t.Errorf("%s is no whole plot: %v", f.file, err)
		}
	}
	for _, c := range r.Ratios {
		if !(c.Ratio.Median > 0) || math.IsInf(c.Ratio.Median, 0) {
			t.Errorf("%s with %d connections over %s has ratio %v", c.Metric, c.Connections, c.Path, c.Ratio.Median)
		}
	}
	markdown, err := os.ReadFile(filepath.Join(out, "end-to-end.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(markdown), shown.String()) || !strings.Contains(shown.String(), "| round trip p99.9") {
		t.Errorf("the Markdown does not end with the tables of the terminal:\n%s", shown.String())
	}
}

func buildNodeproxy(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "nodeproxy")
	if text, err := exec.Command("go", "-C", "../..", "build", "-o", binary, "./cmd/nodeproxy").CombinedOutput(); err != nil {
		t.Fatalf("build nodeproxy: %v\n%s", err, text)
	}
	return binary
}

func TestSpreadIsMedianAndExtremes(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3, 1, 2}, spread{2, 1, 3}},
		{[]float64{4, 1, 3, 2}, spread{2.5, 1, 4}},
		{[]float64{7}, spread{7, 7, 7}},
		{nil, spread{}},
	} {
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("the spread of %v is %+v, want %+v", c.values, got, c.want)
		}
	}
}

func TestPercentileIsNearestRank(t *testing.T) {
	var times []time.Duration
	for i := range 1000 {
		times = append(times, time.Duration(i+1)*time.Microsecond)
	}
	for p, want := range map[float64]float64{0.5: 500, 0.99: 990, 0.999: 999, 1: 1000} {
		if got := percentile(times, p); got != want {
			t.Errorf("percentile %v of 1 to 1000 is %v, want %v", p, got, want)
		}
	}
	if got := percentile(times[:1], 0.5); got != 1 {
		t.Errorf("the median of one value is %v, want it", got)
	}
	if got := percentile(nil, 0.99); got != 0 {
		t.Errorf("a percentile of nothing is %v, want 0", got)
	}
}

// A machine that becomes ten times slower between rounds must not show in the ratio.
func TestRatiosAreTakenWithinARound(t *testing.T) {
	paths := []*path{{name: "plain"}, {name: "mesh", baseline: "plain"}}
	var samples []sample
	for round, speed := range []float64{1, 10, 2} {
		for name, share := range map[string]float64{"plain": 1, "mesh": 0.25} {
			samples = append(samples, sample{
				Round: round, Path: name, Kind: roundTrip, Connections: 4,
				Outcome: outcome{Operations: int(1000 * speed * share), Seconds: 1, Latency: latencies{P50: 1 / speed / share}},
			})
		}
	}
	all := compare(paths, []int{4}, samples)
	for metric, want := range map[string]float64{"round trips": 0.25, "round trip p50": 4} {
		i := slices.IndexFunc(all, func(c comparison) bool { return c.Metric == metric })
		if i < 0 {
			t.Fatalf("no %q was compared", metric)
		}
		if got := all[i].Ratio; got != (spread{want, want, want}) {
			t.Errorf("%q has ratio %+v, want %v in each round", metric, got, want)
		}
	}
}

// Of the peers the best one in each round counts, which may be another in each.
func TestPathsAreComparedWithTheBestPeerOfEachRound(t *testing.T) {
	paths := []*path{{name: tunnels, baseline: plainFar}, {name: "a", baseline: plainFar, peer: true}, {name: "b", baseline: plainFar, peer: true}}
	var samples []sample
	for round, values := range []map[string]int{{tunnels: 100, "a": 50, "b": 20}, {tunnels: 100, "a": 10, "b": 40}, {tunnels: 100, "a": 50, "b": 20}} {
		for name, n := range values {
			samples = append(samples, sample{Round: round, Path: name, Kind: connect, Connections: 1, CPU: 1, Outcome: outcome{Operations: n, Seconds: 1, Latency: latencies{P50: 1 / float64(n)}}})
		}
	}
	r := &report{Matches: matches(paths, []int{1}, samples)}
	for metric, want := range map[string]spread{
		"connect, request, close": {2, 2, 2.5}, "connect and request p50": {0.5, 0.4, 0.5}, "processor time per connection": {0.5, 0.4, 0.5},
	} {
		got := r.match(metric, tunnels, 1)
		for i, v := range []float64{got.Ratio.Median - want.Median, got.Ratio.Min - want.Min, got.Ratio.Max - want.Max} {
			if math.Abs(v) > 1e-9 {
				t.Errorf("%s is %+v (value %d), want %+v", metric, got.Ratio, i, want)
			}
		}
		if got.Best != "a" {
			t.Errorf("%s: the best is %s", metric, got.Best)
		}
	}
}

// A reference is compared with its own path alone, and is no peer, however good it is.
func TestAReferenceIsNoPeer(t *testing.T) {
	paths := []*path{
		{name: tunnels, baseline: plainFar}, {name: mtls, baseline: plainFar},
		{name: "a", baseline: plainFar, peer: true}, {name: "r", baseline: plainFar, beside: tunnels},
	}
	var samples []sample
	for _, n := range []int{1, 2} {
		for name, rate := range map[string]int{tunnels: 100, mtls: 30, "a": 50, "r": 200} {
			samples = append(samples, sample{Round: n, Path: name, Kind: connect, Connections: 1, CPU: 1, Outcome: outcome{Operations: rate * n, Seconds: 1}})
		}
	}
	r := &report{Matches: matches(paths, []int{1}, samples)}
	for path, want := range map[string]float64{tunnels: 2, mtls: 0.6, "r": 0} {
		if got := r.match("connect, request, close", path, 1).Ratio.Median; got != want {
			t.Errorf("%s is %v of the best peer, want %v", path, got, want)
		}
	}
	want := match{Metric: "connect, request, close", Connections: 1, Path: tunnels, Best: "r", Ratio: spread{0.5, 0.5, 0.5}}
	i := slices.IndexFunc(bounds(paths, []int{1}, samples), func(m match) bool { return m.Metric == want.Metric })
	if i < 0 || bounds(paths, []int{1}, samples)[i] != want {
		t.Errorf("the bounds are %+v, want %+v among them", bounds(paths, []int{1}, samples), want)
	}
}

func TestIdleConnectionsAreAsManyAsOpenFilesAllow(t *testing.T) {
	for limit, want := range map[int][]int{1 << 16: {0, 1000, 10000}, 20000: {0, 1000, 8000}, 4600: {0, 1000}, 2048: {0}, 100: {0}} {
		if got := fitting([]int{0, 1000, 10000}, limit); !slices.Equal(got, want) {
			t.Errorf("with %d open files the numbers of idle connections are %v, want %v", limit, got, want)
		}
	}
}

func TestTableIsAlignedMarkdown(t *testing.T) {
	table := newTable("", "n")
	table.row("µs", "10")
	table.row("longer", "2")
	want := "|        |  n |\n|--------|---:|\n| µs     | 10 |\n| longer |  2 |\n"
	if got := table.String(); got != want {
		t.Errorf("the table is\n%swant\n%s", got, want)
	}
}

func TestParseRefusesWhatItCannotMeasure(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-duration", "0s"}, {"extra"}, {"-unknown"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("parse %q: no error", args)
		}
	}
}

package main

import "slices"

// spread is the median of some values, with the smallest and the largest.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Sorted(slices.Values(values))
	middle := len(v) / 2
	median := v[middle]
	if len(v)%2 == 0 {
		median = (v[middle-1] + v[middle]) / 2
	}
	return spread{Median: median, Min: v[0], Max: v[len(v)-1]}
}

// metric is a number that a sample yields.
type metric struct {
	Name   string
	kind   string
	unit   string
	format string
	less   bool // is better
	of     func(*sample) float64
}

// compared are the metrics that have a ratio to plain TCP.
func compared() []metric {
	rate := func(s *sample) float64 { return float64(s.Outcome.Operations) / s.Outcome.Seconds }
	bulk := func(s *sample) float64 { return float64(s.Outcome.Bulk) / 1e9 / s.Outcome.Seconds }
	p50 := func(s *sample) float64 { return s.Outcome.Latency.P50 }
	p99 := func(s *sample) float64 { return s.Outcome.Latency.P99 }
	p999 := func(s *sample) float64 { return s.Outcome.Latency.P999 }
	return []metric{
		{"bulk to the server", upload, "GB/s", "%.2f", false, bulk},
		{"bulk from the server", download, "GB/s", "%.2f", false, bulk},
		{"round trips", roundTrip, "/s", "%.0f", false, rate},
		{"round trip p50", roundTrip, "µs", "%.0f", true, p50},
		{"round trip p99", roundTrip, "µs", "%.0f", true, p99},
		{"round trip p99.9", roundTrip, "µs", "%.0f", true, p999},
		{"connect, request, close", connect, "/s", "%.0f", false, rate},
		{"connect and request p50", connect, "µs", "%.0f", true, p50},
		{"connect and request p99", connect, "µs", "%.0f", true, p99},
	}
}

// charged are the metrics of what the proxies cost, which plain TCP does not have.
func charged() []metric {
	perGB := func(s *sample) float64 { return s.CPU / (float64(s.Outcome.Bulk) / 1e9) }
	perOperation := func(scale float64) func(*sample) float64 {
		return func(s *sample) float64 { return s.CPU / float64(s.Outcome.Operations) * scale }
	}
	return []metric{
		{"processor time per GB to the server", upload, "s", "%.2f", true, perGB},
		{"processor time per GB from the server", download, "s", "%.2f", true, perGB},
		{"processor time per round trip", roundTrip, "µs", "%.0f", true, perOperation(1e6)},
		{"processor time per connection", connect, "ms", "%.2f", true, perOperation(1e3)},
	}
}

// comparison is one metric of one path, beside its baseline.
type comparison struct {
	Metric      string  `json:"metric"`
	Unit        string  `json:"unit"`
	Connections int     `json:"connections"`
	Path        string  `json:"path"`
	Baseline    float64 `json:"baseline"` // median
	Value       float64 `json:"value"`    // median
	Ratio       spread  `json:"ratio"`    // of value to baseline, within a round
	format      string
}

// compare compares every path that has a baseline with it. Samples of the same round, kind and connections belong together.
func compare(paths []*path, connections []int, samples []sample) []comparison {
	var all []comparison
	for _, p := range paths {
		if p.baseline == "" {
			continue
		}
		for _, m := range compared() {
			for _, n := range connections {
				values, baselines := m.values(samples, p.name, n), m.values(samples, p.baseline, n)
				all = append(all, comparison{
					Metric: m.Name, Unit: m.unit, Connections: n, Path: p.name, format: m.format,
					Baseline: spreadOf(baselines).Median, Value: spreadOf(values).Median, Ratio: m.ratio(samples, p.name, n, baselines),
				})
			}
		}
	}
	return all
}

// match is one metric of a path of nodeproxy's beside the peer that was best at it in each round, or beside its reference.
type match struct {
	Metric      string `json:"metric"`
	Connections int    `json:"connections"`
	Path        string `json:"path"`
	Best        string `json:"best"` // the peer whose median is, or the reference
	Ratio       spread `json:"ratio"`
}

// matches compares the paths from node to node with the best peer, round by round.
func matches(paths []*path, connections []int, samples []sample) []match {
	var all []match
	for _, m := range append(compared(), charged()...) {
		for _, n := range connections {
			best, name := m.best(paths, n, samples)
			if best == nil {
				continue
			}
			for _, p := range paths {
				if p.rank() > 0 || p.baseline != plainFar {
					continue
				}
				all = append(all, match{m.Name, n, p.name, name, m.ratio(samples, p.name, n, best)})
			}
		}
	}
	return all
}

// bounds compares paths with their references, in what has a goal beside the best peer.
func bounds(paths []*path, connections []int, samples []sample) []match {
	var all []match
	for _, m := range append(compared(), charged()...) {
		for _, p := range paths {
			if !slices.ContainsFunc(goals(), func(g goal) bool { return g.peer && g.metric == m.Name && g.path == p.beside }) {
				continue
			}
			for _, n := range connections {
				all = append(all, match{m.Name, n, p.beside, p.name, m.ratio(samples, p.beside, n, m.values(samples, p.name, n))})
			}
		}
	}
	return all
}

// ratio is that of path's values to others, round by round.
func (m *metric) ratio(samples []sample, path string, connections int, others []float64) spread {
	ratios := m.values(samples, path, connections)
	for round := range ratios {
		ratios[round] /= others[round]
	}
	return spreadOf(ratios)
}

// best is the best value of any peer in each round, and the peer whose median is.
func (m *metric) best(paths []*path, connections int, samples []sample) (best []float64, name string) {
	better := func(a, b float64) bool { return a > b != m.less }
	var median float64
	for _, p := range paths {
		if !p.peer {
			continue
		}
		values := m.values(samples, p.name, connections)
		if s := spreadOf(values); name == "" || better(s.Median, median) {
			name, median = p.name, s.Median
		}
		if best == nil {
			best = slices.Clone(values)
		}
		for round, v := range values {
			if better(v, best[round]) {
				best[round] = v
			}
		}
	}
	return best, name
}

// values are the metric's values, one for each round, in order.
func (m *metric) values(samples []sample, path string, connections int) []float64 {
	var all []float64
	for i := range samples {
		if s := &samples[i]; s.Kind == m.kind && s.Path == path && s.Connections == connections {
			all = append(all, m.of(s))
		}
	}
	return all
}

// cost is what the proxies of a path use for one metric.
type cost struct {
	Metric      string `json:"metric"`
	Unit        string `json:"unit"`
	Connections int    `json:"connections"`
	Path        string `json:"path"`
	CPU         spread `json:"cpu"`
	format      string
}

func costs(paths []*path, connections []int, samples []sample) []cost {
	var all []cost
	for _, p := range paths {
		if p.proxies == nil {
			continue
		}
		for _, m := range charged() {
			for _, n := range connections {
				all = append(all, cost{Metric: m.Name, Unit: m.unit, Connections: n, Path: p.name, CPU: spreadOf(m.values(samples, p.name, n)), format: m.format})
			}
		}
	}
	return all
}

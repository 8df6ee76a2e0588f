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
		{"bulk to the server", upload, "GB/s", "%.2f", bulk},
		{"bulk from the server", download, "GB/s", "%.2f", bulk},
		{"round trips", roundTrip, "/s", "%.0f", rate},
		{"round trip p50", roundTrip, "µs", "%.0f", p50},
		{"round trip p99", roundTrip, "µs", "%.0f", p99},
		{"round trip p99.9", roundTrip, "µs", "%.0f", p999},
		{"connect, request, close", connect, "/s", "%.0f", rate},
		{"connect and request p50", connect, "µs", "%.0f", p50},
		{"connect and request p99", connect, "µs", "%.0f", p99},
	}
}

// charged are the metrics of what the proxies cost, which plain TCP does not have.
func charged() []metric {
	perGB := func(s *sample) float64 { return s.CPU / (float64(s.Outcome.Bulk) / 1e9) }
	perOperation := func(scale float64) func(*sample) float64 {
		return func(s *sample) float64 { return s.CPU / float64(s.Outcome.Operations) * scale }
	}
	return []metric{
		{"per GB to the server", upload, "s", "%.2f", perGB},
		{"per GB from the server", download, "s", "%.2f", perGB},
		{"per round trip", roundTrip, "µs", "%.0f", perOperation(1e6)},
		{"per connection", connect, "ms", "%.2f", perOperation(1e3)},
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
				ratios := make([]float64, len(values))
				for round := range values {
					ratios[round] = values[round] / baselines[round]
				}
				all = append(all, comparison{
					Metric: m.Name, Unit: m.unit, Connections: n, Path: p.name, format: m.format,
					Baseline: spreadOf(baselines).Median, Value: spreadOf(values).Median, Ratio: spreadOf(ratios),
				})
			}
		}
	}
	return all
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
		if p.baseline == "" {
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

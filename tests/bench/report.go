package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// report is all that one run found.
type report struct {
	Command  string       `json:"command"`
	Machine  machine      `json:"machine"`
	Rounds   int          `json:"rounds"`
	Duration string       `json:"duration"` // of one measurement
	Took     string       `json:"took"`
	Goals    []result     `json:"goals"`
	Ratios   []comparison `json:"ratios"`
	Matches  []match      `json:"matches"`
	Bounds   []match      `json:"bounds"`
	Costs    []cost       `json:"costs"`
	Burdens  []burden     `json:"burdens"`
	Memory   []memory     `json:"memory"`
	Profiles []profiled   `json:"profiles"`
	Samples  []sample     `json:"samples"`

	paths       []*path
	connections []int
}

// newReport derives what is reported from what was measured.
func newReport(s *settings, m machine, paths []*path, idle []memory, burdens []burden, samples []sample) *report {
	r := &report{
		Command: "make bench", Machine: m, Rounds: s.rounds, Duration: s.duration.String(),
		Ratios: compare(paths, s.connections, samples), Matches: matches(paths, s.connections, samples),
		Bounds: bounds(paths, s.connections, samples),
		Costs:  costs(paths, s.connections, samples), Memory: idle, Burdens: burdens, Samples: samples, paths: paths, connections: s.connections,
	}
	r.Goals = r.results()
	return r
}

// write writes the report as JSON and as Markdown.
func (r *report) write(dir string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	for name, content := range map[string]string{"end-to-end.json": string(text) + "\n", "end-to-end.md": r.markdown()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	if err := r.writeProfiles(dir); err != nil {
		return err
	}
	return r.plot(dir)
}

// markdown is the whole report.
func (r *report) markdown() string {
	var plots strings.Builder
	for _, f := range figures() {
		fmt.Fprintf(&plots, "![%s](%s)\n", f.title, f.file)
	}
	return fmt.Sprintf(`# End to end

Written by `+"`%s`"+`; do not edit. Client, proxies and servers run on one machine, in network namespaces of the same shape. %d rounds of
%s per measurement, in each of which every path is measured once, one right after the other; a ratio is the median of the
ratios within a round, in brackets the smallest and the largest. Of rates more is better, of times less. A request and its answer are %d
bytes each, a bulk write is %d KiB. The peers are pairs of mTLS proxies with their own defaults but for TLS 1.3, AES-128-GCM, EC P-256 and client
certificates; what they resume of TLS sessions by default they may resume here, nodeproxy resumes none.

%s
%s%s`, r.Command, r.Rounds, r.Duration, messageSize, bulkSize>>10, r.Machine.markdown(), plots.String(), r.tables())
}

// tables is what people want to see, on a terminal and in Markdown alike.
func (r *report) tables() string {
	var b strings.Builder
	b.WriteString("\n## Goals\n\n")
	b.WriteString(r.goalTable())
	b.WriteString("\nWhat bounds them: the same beside a pair of proxies that does no TLS, and beside one whose sessions are turned off.\n\n")
	b.WriteString(r.boundTable())
	b.WriteString(r.profileList())
	b.WriteString("\n## Beside the best peer, node to node\n\nThe best in each round; named is the one with the best median.\n\n")
	b.WriteString(r.matchTable())
	for _, places := range []struct{ title, plain string }{{"Same node", plainNear}, {"Node to node", plainFar}} {
		fmt.Fprintf(&b, "\n## %s\n", places.title)
		for _, m := range compared() {
			fmt.Fprintf(&b, "\n%s, and its ratio to plain TCP:\n\n%s", sentence(m.Name), r.ratioTable(&m, places.plain))
		}
	}
	b.WriteString("\n## Processor time of the proxies\n\nOf both on the path together.\n")
	for _, m := range charged() {
		fmt.Fprintf(&b, "\n%s:\n\n%s", sentence(m.Name), r.costTable(&m))
	}
	fmt.Fprintf(&b, "\nOf both daemons together with %d connections within the node, which they do not carry; new ones are above:\n\n%s", burdenConnections, r.burdenTable())
	b.WriteString("\n## Memory of idle connections, node to node\n\nResident, of each side's processes; what several share counts for each. The most are 10,000, or as many\nthousands as a process may have open files for (`ulimit -n`).\n\n")
	b.WriteString(r.memoryTable())
	return b.String()
}

// grid is a table with a row for each path and a column for each number of connections.
func (r *report) grid(rows func(*path) bool, cell func(p *path, connections int) string) string {
	head := []string{"connections"}
	for _, n := range r.connections {
		head = append(head, fmt.Sprint(n))
	}
	t := newTable(head...)
	for _, p := range r.paths {
		if !rows(p) {
			continue
		}
		row := []string{p.name}
		for _, n := range r.connections {
			row = append(row, cell(p, n))
		}
		t.row(row...)
	}
	return t.String()
}

func (r *report) ratioTable(m *metric, plain string) string {
	return r.grid(func(p *path) bool { return p.name == plain || p.baseline == plain }, func(p *path, n int) string {
		value := quantity(m.format, spreadOf(m.values(r.Samples, p.name, n)).Median, m.unit)
		if p.baseline == "" {
			return value
		}
		return value + "  " + r.ratio(m.Name, p.name, n).String()
	})
}

func (r *report) ratio(metric, path string, connections int) spread {
	for _, c := range r.Ratios {
		if c.Metric == metric && c.Path == path && c.Connections == connections {
			return c.Ratio
		}
	}
	return spread{}
}

func (r *report) match(metric, path string, connections int) match {
	for _, m := range r.Matches {
		if m.Metric == metric && m.Path == path && m.Connections == connections {
			return m
		}
	}
	return match{}
}

func (r *report) matchTable() string {
	t := newTable("", "connections", "best peer", tunnels, mtls)
	for _, m := range r.Matches {
		if m.Path == tunnels {
			t.row(m.Metric, fmt.Sprint(m.Connections), m.Best, m.Ratio.String(), r.match(m.Metric, mtls, m.Connections).Ratio.String())
		}
	}
	return t.String()
}

func (r *report) boundTable() string {
	t := newTable("", "connections", "is")
	for _, m := range r.Bounds {
		t.row(fmt.Sprintf("%s, %s / %s", m.Path, m.Metric, m.Best), fmt.Sprint(m.Connections), m.Ratio.String())
	}
	return t.String()
}

func (r *report) costTable(m *metric) string {
	return r.grid(func(p *path) bool { return p.proxies != nil }, func(p *path, n int) string {
		s := spreadOf(m.values(r.Samples, p.name, n))
		return quantity(m.format, s.Median, m.unit)
	})
}

func (r *report) memoryTable() string {
	t := newTable("", "idle connections", "the client's side", "per connection", "the server's side", "per connection")
	none := make(map[string][]uint64)
	for _, m := range r.Memory {
		if m.Connections == 0 {
			none[m.Path] = m.Resident
		}
		cells := []string{m.Path, fmt.Sprint(m.Connections)}
		for i, resident := range m.Resident {
			each := ""
			if m.Connections > 0 && none[m.Path] != nil {
				each = fmt.Sprintf("%.1f KiB", perConnection(m, none[m.Path], i))
			}
			cells = append(cells, fmt.Sprintf("%.1f MiB", float64(resident)/(1<<20)), each)
		}
		t.row(cells...)
	}
	return t.String()
}

// perConnection is what each connection of m takes on a side, in KiB.
func perConnection(m memory, none []uint64, side int) float64 {
	return (float64(m.Resident[side]) - float64(none[side])) / 1024 / float64(m.Connections)
}

// String shows a ratio.
func (s spread) String() string {
	return fmt.Sprintf("%s (%s – %s)", significant(s.Median), significant(s.Min), significant(s.Max))
}

func quantity(format string, value float64, unit string) string {
	return fmt.Sprintf(format+" ", value) + unit
}

// significant shows two digits of what is small and none behind the point of what is large.
func significant(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func sentence(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// table is a Markdown table whose columns are aligned, so that it can be read as it is.
type table struct{ rows [][]string }

func newTable(head ...string) *table { return &table{rows: [][]string{head}} }

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

// String is empty for no table.
func (t *table) String() string {
	if t == nil {
		return ""
	}
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for n, row := range t.rows {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i > 0 { // numbers, to the right
				cell, pad = pad+cell, ""
			}
			b.WriteString("| " + cell + pad + " ")
		}
		b.WriteString("|\n")
		if n > 0 {
			continue
		}
		for i, width := range widths {
			line := strings.Repeat("-", width+1)
			if i > 0 {
				b.WriteString("|" + line + ":")
			} else {
				b.WriteString("|" + line + "-")
			}
		}
		b.WriteString("|\n")
	}
	return b.String()
}

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	Ratios   []comparison `json:"ratios"`
	Costs    []cost       `json:"costs"`
	Memory   []memory     `json:"memory"`
	Samples  []sample     `json:"samples"`
}

// newReport derives what is reported from what was measured.
func newReport(s *settings, m machine, paths []*path, idle []memory, samples []sample) *report {
	return &report{
		Command: "make bench", Machine: m, Rounds: s.rounds, Duration: s.duration.String(),
		Ratios: compare(paths, s.connections, samples), Costs: costs(paths, s.connections, samples), Memory: idle, Samples: samples,
	}
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
	return nil
}

// markdown is the whole report.
func (r *report) markdown() string {
	return fmt.Sprintf(`# End to end

Written by `+"`%s`"+`; do not edit. It measures nodeproxy beside plain TCP between namespaces of the same shape, client, proxies
and servers on one machine. %d rounds of %s per measurement; the paths that are compared are measured one right after the
other, and a ratio is the median of the ratios within a round, with the smallest and the largest. Of rates more is better,
of times less. A request and its answer are %d bytes each, a bulk write is %d KiB.

%s%s`, r.Command, r.Rounds, r.Duration, messageSize, bulkSize>>10, r.Machine.markdown(), r.tables())
}

// tables is what people want to see, on a terminal and in Markdown alike.
func (r *report) tables() string {
	var b strings.Builder
	var path string
	var t *table
	for _, c := range r.Ratios {
		if c.Path != path {
			path = c.Path
			b.WriteString(t.String())
			fmt.Fprintf(&b, "\n## %s\n\n", sentence(path))
			t = newTable("", "connections", "plain TCP", "nodeproxy", "ratio", "spread")
		}
		t.row(c.Metric, fmt.Sprint(c.Connections), quantity(c.format, c.Baseline, c.Unit), quantity(c.format, c.Value, c.Unit),
			significant(c.Ratio.Median), significant(c.Ratio.Min)+" – "+significant(c.Ratio.Max))
	}
	b.WriteString(t.String())
	b.WriteString("\n## Processor time of the daemons\n\nOf all daemons on the path together.\n\n")
	b.WriteString(r.costTable())
	b.WriteString("\n## Memory of idle connections, node to node\n\n")
	b.WriteString(r.memoryTable())
	return b.String()
}

// costTable has a row for each metric and number of connections, and a column for each path.
func (r *report) costTable() string {
	head, rows := []string{"", "connections"}, [][]string{}
	for _, c := range r.Costs {
		name, n := c.Metric, fmt.Sprint(c.Connections)
		i := slices.IndexFunc(rows, func(row []string) bool { return row[0] == name && row[1] == n })
		if i < 0 {
			i = len(rows)
			rows = append(rows, []string{name, n})
		}
		if !slices.Contains(head, c.Path) {
			head = append(head, c.Path)
		}
		rows[i] = append(rows[i], fmt.Sprintf("%s ("+c.format+" – "+c.format+")", quantity(c.format, c.CPU.Median, c.Unit), c.CPU.Min, c.CPU.Max))
	}
	return (&table{append([][]string{head}, rows...)}).String()
}

func (r *report) memoryTable() string {
	t := newTable("idle connections", "the client's node", "per connection", "the server's node", "per connection")
	var none []uint64
	leftOut := ""
	for _, m := range r.Memory {
		if m.Resident == nil {
			leftOut += fmt.Sprintf("\n%d idle connections are left out: a process may not have enough open files for them (ulimit -n).\n", m.Connections)
			continue
		}
		if m.Connections == 0 {
			none = m.Resident
		}
		cells := []string{fmt.Sprint(m.Connections)}
		for i, resident := range m.Resident {
			each := ""
			if m.Connections > 0 && none != nil {
				each = fmt.Sprintf("%.1f KiB", (float64(resident)-float64(none[i]))/1024/float64(m.Connections))
			}
			cells = append(cells, fmt.Sprintf("%.1f MiB", float64(resident)/(1<<20)), each)
		}
		t.row(cells...)
	}
	return t.String() + leftOut
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

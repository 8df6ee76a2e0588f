package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"

	"nodeproxy.io/nodeproxy/admin"
)

// scaleReport is all that a scale run found.
type scaleReport struct {
	Command  string        `json:"command"`
	Machine  machine       `json:"machine"`
	Took     string        `json:"took"`
	Goals    []scaleResult `json:"goals"`
	Models   []forecast    `json:"models"`
	Measured []scaled      `json:"measured"`

	scaling
}

// quantity of a scaled node.
type scaleQuantity struct {
	name, unit string
	of         func(*scaled) float64
}

func scaleQuantities() []scaleQuantity {
	median := func(path admin.Path, allowed bool, of func(*change) float64) func(*scaled) float64 {
		return func(m *scaled) float64 {
			var all []float64
			for i := range m.Changes {
				if c := &m.Changes[i]; c.Path == path && c.Allowed == allowed {
					all = append(all, of(c))
				}
			}
			return spreadOf(all).Median
		}
	}
	applied := func(c *change) float64 { return c.Applied }
	return []scaleQuantity{
		{"start to ready", "ms", func(m *scaled) float64 { return m.Ready }},
		{"start to ready, workloads enrolled by an earlier daemon", "ms", func(m *scaled) float64 { return m.Restart }},
		{attachName, "ms", func(m *scaled) float64 { return m.Attach }},
		{denyName(admin.PathDirect), "ms", median(admin.PathDirect, false, applied)},
		{denyName(admin.PathMTLS), "ms", median(admin.PathMTLS, false, applied)},
		{"intention allowed → direct connection through", "ms", median(admin.PathDirect, true, applied)},
		{"intention allowed → proxied connection through", "ms", median(admin.PathMTLS, true, applied)},
		{"of which the control plane's own write", "ms", median(admin.PathDirect, false, func(c *change) float64 { return c.Accepted })},
		{residentName, "MiB", func(m *scaled) float64 { return float64(m.Resident) / (1 << 20) }},
		{"resident memory after the changes", "MiB", func(m *scaled) float64 { return float64(m.ResidentAfter) / (1 << 20) }},
		{"idle, of one processor", "%", func(m *scaled) float64 { return 100 * m.Idle }},
	}
}

const (
	attachName   = "all workloads enrolled at once"
	residentName = "resident memory, no traffic"
)

func denyName(path admin.Path) string {
	if path == admin.PathDirect {
		return "intention denied → direct connection cut"
	}
	return "intention denied → proxied connection cut"
}

// beyond is the factor that is forecast and not measured.
const beyond = 10

// forecast is the model of a quantity, and what it says for a mesh that is too large for one machine.
type forecast struct {
	Source   string  `json:"source"`
	Quantity string  `json:"quantity"`
	Unit     string  `json:"unit"`
	Model    model   `json:"model"`
	Beyond   float64 `json:"at_10_times"`
}

// scaleResult is a goal and what came of it.
type scaleResult struct {
	Goal    string  `json:"goal"`
	Source  string  `json:"source"`
	Wanted  string  `json:"wanted"`
	Got     float64 `json:"got"`
	Reached bool    `json:"reached"`
}

func newScaleReport(s scaling, where machine, all []scaled) *scaleReport {
	r := &scaleReport{Command: "make bench", Machine: where, Measured: all, scaling: s}
	for _, source := range []string{fileSource, consulSource} {
		for _, q := range scaleQuantities() {
			xs, values := r.series(source, q)
			m := fit(xs, values)
			r.Models = append(r.Models, forecast{source, q.name, q.unit, m, m.at(beyond)})
		}
	}
	r.Goals = r.results()
	return r
}

// series are the values of a quantity by factor.
func (r *scaleReport) series(source string, q scaleQuantity) (xs, values []float64) {
	for i := range r.Measured {
		if m := &r.Measured[i]; m.Source == source {
			xs, values = append(xs, m.Factor), append(values, q.of(m))
		}
	}
	return xs, values
}

// scaleGoal is what a quantity must not exceed at a size.
type scaleGoal struct {
	what     func(size) string
	quantity string
	factor   float64 // of the full size
	most     float64
}

func scaleGoals() []scaleGoal {
	changed := func(how string) func(size) string {
		return func(s size) string {
			return fmt.Sprintf("one of %d intentions denied, %s connection cut", s.Intentions, how)
		}
	}
	return []scaleGoal{
		{func(s size) string { return fmt.Sprintf("RSS at %d services, no traffic", s.Services) }, residentName, 0.2, 40},
		{changed("direct"), denyName(admin.PathDirect), 1, 20},
		{changed("proxied"), denyName(admin.PathMTLS), 1, 20},
		{func(s size) string { return fmt.Sprintf("%d workloads enrolled", s.Workloads) }, attachName, 1, 1000},
	}
}

func (r *scaleReport) results() (all []scaleResult) {
	for _, g := range scaleGoals() {
		for i := range r.Measured {
			m := &r.Measured[i]
			if m.Factor != g.factor {
				continue
			}
			q := quantityCalled(g.quantity)
			got := q.of(m)
			all = append(all, scaleResult{g.what(m.Size), m.Source, fmt.Sprintf("≤ %v %s", g.most, q.unit), got, got <= g.most})
		}
	}
	return all
}

func quantityCalled(name string) scaleQuantity {
	all := scaleQuantities()
	return all[slices.IndexFunc(all, func(q scaleQuantity) bool { return q.name == name })]
}

func (r *scaleReport) write(dir string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	for name, content := range map[string]string{"scale.json": string(text) + "\n", "scale.md": r.markdown()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	return r.plot(filepath.Join(dir, scalePlot))
}

// markdown is the whole report.
func (r *scaleReport) markdown() string {
	return fmt.Sprintf(`# Scale

Written by `+"`%s`"+`; do not edit. One node of a mesh of %d services with %d endpoints and %d intentions (default: deny) has %d of the
services, each in a cgroup and a network namespace of its own; all else is on nodes where no daemon runs. The file source reads its directory, the
Consul source a real agent that is also the server, on the same machine. What happens:

1. The daemon starts. Ready is what it tells the service manager.
2. All workloads are enrolled at once, by the admin API. The clock runs from the first request until the last one is enrolled, certificates included.
3. Nothing happens for %s; then memory and processor time are read, the latter over %s. Part of the memory are the executable's own pages, which it shares with its file.
4. An intention is changed, %d times each way and path. The clock runs from the beginning of the write until an application's live connection is cut and none
   that it tries every %s gets through any more, or until one is answered again. The trace shows that the connection was direct, or proxied. Shown are medians.
5. The daemon is stopped and started again: what it enrolled is in force.

At each size the daemon's own counts of services, endpoints, intentions, certificates and protected workloads are compared with what was written.

%s
![Scale](%s)
%s`, r.Command, r.full.Services, r.full.Endpoints, r.full.Intentions, r.full.Workloads, r.settle, r.idle, r.changes, retryDial, r.Machine.header(), scalePlot, r.tables())
}

// tables is what people want to see, on a terminal and in Markdown alike.
func (r *scaleReport) tables() string {
	var b strings.Builder
	b.WriteString("\n## Goals\n\n")
	b.WriteString(r.goalTable())
	b.WriteString("\nWhat bounds those that are not reached is in ARCHITECTURE.md, \"What bounds the data path\".\n")
	for _, source := range []string{fileSource, consulSource} {
		fmt.Fprintf(&b, "\n## Source: %s\n\n%s", source, r.sourceTable(source))
	}
	fmt.Fprintf(&b, `
## Beyond this machine

A mesh of %d times the size (%d workloads on the node, %d services, %d endpoints, %d intentions) was **not measured**: this is what
a model says that is fitted to the sizes above. x is the size as a part of the full one; the model is a + b·x or a·x^b, whichever is closer; the residual is the largest
deviation of a measured value from it. A file source of that size is refused: it reads at most 10,000 files, and each config entry is one.

`, beyond, r.full.times(beyond).Workloads, r.full.times(beyond).Services, r.full.times(beyond).Endpoints, r.full.times(beyond).Intentions)
	b.WriteString(r.modelTable())
	return b.String()
}

func (r *scaleReport) goalTable() string {
	t := newTable("", "source", "wanted", "is", "reached")
	for _, g := range r.Goals {
		reached := "no"
		if g.Reached {
			reached = "yes"
		}
		t.row(g.Goal, g.Source, g.Wanted, significant(g.Got), reached)
	}
	return t.String()
}

// sourceTable has a column for each size.
func (r *scaleReport) sourceTable(source string) string {
	rows := [][]string{{"services"}, {"endpoints"}, {"intentions"}, {"workloads on the node"}}
	for i := range r.Measured {
		m := &r.Measured[i]
		if m.Source != source {
			continue
		}
		for row, n := range []int{m.Size.Services, m.Size.Endpoints, m.Size.Intentions, m.Size.Workloads} {
			rows[row] = append(rows[row], fmt.Sprint(n))
		}
	}
	t := newTable(rows[0]...)
	for _, row := range rows[1:] {
		t.row(row...)
	}
	for _, q := range scaleQuantities() {
		_, values := r.series(source, q)
		row := []string{q.name}
		for _, v := range values {
			row = append(row, significant(v)+" "+q.unit)
		}
		t.row(row...)
	}
	return t.String()
}

func (r *scaleReport) modelTable() string {
	t := newTable("", "source", "model", "residual", fmt.Sprintf("at %d times", beyond))
	for _, f := range r.Models {
		t.row(f.Quantity, f.Source, f.Model.String()+" "+f.Unit, fmt.Sprintf("%.0f %%", 100*f.Model.Residual), significant(f.Beyond)+" "+f.Unit)
	}
	return t.String()
}

const scalePlot = "scale.svg"

// plot draws what grows with the mesh: times, on axes of powers of ten.
func (r *scaleReport) plot(file string) error {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = "A node of a large mesh", "services", "ms"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, plot.LogTicks{Prec: -1}
	p.Legend.Top, p.Legend.Left = true, true
	for i, name := range []string{"start to ready", attachName, denyName(admin.PathMTLS)} {
		for j, source := range []string{fileSource, consulSource} {
			line, points, err := plotter.NewLinePoints(r.curve(source, name))
			if err != nil {
				return fmt.Errorf("draw %s: %w", file, err)
			}
			line.Color, points.Color = plotutil.Color(i), plotutil.Color(i)
			line.Dashes, points.Shape = plotutil.Dashes(j), plotutil.Shape(j)
			p.Add(line, points)
			p.Legend.Add(name+", "+source, line, points)
		}
	}
	p.Y.Max *= 30 // for the legend
	if err := p.Save(22*vg.Centimeter, 13*vg.Centimeter, file); err != nil {
		return fmt.Errorf("draw %s: %w", file, err)
	}
	return nil
}

func (r *scaleReport) curve(source, name string) (points plotter.XYs) {
	xs, values := r.series(source, quantityCalled(name))
	for i := range xs {
		points = append(points, plotter.XY{X: xs[i] * float64(r.full.Services), Y: values[i]})
	}
	return points
}

package main

import (
	"fmt"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// figure is a plot: bars by path, in groups by number of connections.
type figure struct {
	file, title, axis string
	metric            string
	cost              bool // in its unit; else as a ratio to plain TCP
}

func figures() []figure {
	return []figure{
		{"bulk.svg", "Bulk to the server, node to node", "ratio to plain TCP (more is better)", "bulk to the server", false},
		{"roundtrip.svg", "Round trip p50, node to node", "ratio to plain TCP (less is better)", "round trip p50", false},
		{"connect.svg", "New connections, node to node", "ratio to plain TCP (more is better)", "connect, request, close", false},
		{"cpu.svg", "Processor time of the proxies per GB", "seconds (less is better)", "processor time per GB to the server", true},
	}
}

const barWidth = 11 * vg.Length(1)

// plot draws the figures into dir.
func (r *report) plot(dir string) error {
	for _, f := range figures() {
		if err := r.draw(f, filepath.Join(dir, f.file)); err != nil {
			return fmt.Errorf("draw %s: %w", f.file, err)
		}
	}
	return nil
}

func (r *report) draw(f figure, file string) error {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text, p.Y.Min = f.title, f.axis, 0
	p.Legend.Top = true
	var names []string
	for _, n := range r.connections {
		names = append(names, fmt.Sprintf("%d connections", n))
	}
	p.NominalX(names...)
	var shown []*path
	for _, path := range r.paths {
		if path.baseline == plainFar {
			shown = append(shown, path)
		}
	}
	for i, path := range shown {
		var values plotter.Values
		for _, n := range r.connections {
			values = append(values, r.height(f, path.name, n))
		}
		bars, err := plotter.NewBarChart(values, barWidth)
		if err != nil {
			return err
		}
		bars.Color, bars.LineStyle.Width = plotutil.Color(i), 0
		bars.Offset = barWidth * (vg.Length(i) - vg.Length(len(shown)-1)/2)
		p.Add(bars)
		p.Legend.Add(path.name, bars)
	}
	p.Y.Max *= 1.3 // for the legend
	return p.Save(22*vg.Centimeter, 11*vg.Centimeter, file)
}

func (r *report) height(f figure, path string, connections int) float64 {
	if !f.cost {
		return r.ratio(f.metric, path, connections).Median
	}
	for _, c := range r.Costs {
		if c.Metric == f.metric && c.Path == path && c.Connections == connections {
			return c.CPU.Median
		}
	}
	return 0
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// profiled is one daemon while it did what has not reached a goal.
type profiled struct {
	Path        string `json:"path"`
	Kind        string `json:"kind"`
	Connections int    `json:"connections"`
	Side        string `json:"side"`
	File        string `json:"file"` // below the report's directory

	text string
}

// profilesIn is the directory of all.
const profilesIn = "profiles"

// profiles takes a CPU profile of both daemons for each kind of load by which a goal is missed, with the fewest connections by which
// it is.
func (b *bench) profiles(ctx context.Context, r *report) ([]profiled, error) {
	var all []profiled
	for _, res := range r.Goals {
		i := slices.IndexFunc(goals(), func(g goal) bool { return g.what == res.Goal })
		if i < 0 || res.Reached { // memory has no load
			continue
		}
		g := goals()[i]
		done := func(p profiled) bool { return p.Path == g.path && p.Kind == kindOf(g.metric) }
		if slices.ContainsFunc(all, done) {
			continue
		}
		p := b.paths[slices.IndexFunc(b.paths, func(p *path) bool { return p.name == g.path })]
		if p.proxies == nil {
			continue
		}
		b.say("profile %s, %d connections, %s", kindOf(g.metric), res.Connections, p.name)
		both, err := b.profile(ctx, p, order{Kind: kindOf(g.metric), Connections: res.Connections})
		if err != nil {
			return nil, fmt.Errorf("profile %s over %s: %w", kindOf(g.metric), p.name, err)
		}
		all = append(all, both...)
	}
	return all, nil
}

func kindOf(name string) string {
	all := append(compared(), charged()...)
	return all[slices.IndexFunc(all, func(m metric) bool { return m.Name == name })].kind
}

// profile does o, for as long as the profiles take.
func (b *bench) profile(ctx context.Context, p *path, o order) (both []profiled, err error) {
	o.Duration, o.Opens = time.Duration(b.profiling)*time.Second, 50000
	ctx, cancel := context.WithTimeout(ctx, timeout(o))
	defer cancel()
	c, err := p.lab.startClient(ctx, p, o)
	if err != nil {
		return nil, err
	}
	var bodies []io.ReadCloser
	defer func() {
		for _, body := range bodies {
			err = errors.Join(err, body.Close())
		}
	}()
	for _, d := range p.lab.Daemons {
		body, err := d.Admin().Profile(ctx, b.profiling)
		if err != nil {
			return nil, errors.Join(err, c.end(ctx))
		}
		bodies = append(bodies, body)
	}
	_, err = c.work(ctx)
	if err = errors.Join(err, c.end(ctx)); err != nil {
		return nil, err
	}
	for i, side := range []string{"client", "server"} {
		text, err := readProfile(ctx, bodies[i])
		if err != nil {
			return nil, err
		}
		one := profiled{Path: p.name, Kind: o.Kind, Connections: o.Connections, Side: side, text: text}
		name := strings.NewReplacer(", ", "-", " ", "-").Replace(strings.Join([]string{p.name, o.Kind, side}, "-"))
		one.File = filepath.Join(profilesIn, strings.ToLower(name)+".txt")
		both = append(both, one)
	}
	return both, nil
}

// readProfile renders a profile: where the time went, and on whose behalf.
func readProfile(ctx context.Context, body io.Reader) (string, error) {
	file, err := os.CreateTemp("", "profile")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(file.Name()) }()
	_, err = io.Copy(file, body)
	if err = errors.Join(err, file.Close()); err != nil {
		return "", fmt.Errorf("read a profile: %w", err)
	}
	var text bytes.Buffer
	for _, by := range []string{"-flat", "-cum"} {
		out, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", by, "-nodecount=40", file.Name()).Output()
		if err != nil {
			return "", fmt.Errorf("render a profile: %w", err)
		}
		fmt.Fprintf(&text, "%s\n", out)
	}
	return text.String(), nil
}

// profileList links them.
func (r *report) profileList() string {
	if len(r.Profiles) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\nWhere the daemons' processor time goes under the loads by which a goal is not reached (what bounds it is said in ARCHITECTURE.md, \"What bounds the data path\"):\n\n")
	for _, p := range r.Profiles {
		fmt.Fprintf(&b, "- [%s, %s, connections: %d, the %s's side](%s)\n", p.Path, p.Kind, p.Connections, p.Side, filepath.ToSlash(p.File))
	}
	return b.String()
}

// writeProfiles replaces those of an earlier run.
func (r *report) writeProfiles(dir string) error {
	err := os.RemoveAll(filepath.Join(dir, profilesIn))
	if err == nil && len(r.Profiles) > 0 {
		err = os.MkdirAll(filepath.Join(dir, profilesIn), 0o755)
	}
	for _, p := range r.Profiles {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, p.File), []byte(p.text), 0o644)
		}
	}
	if err != nil {
		return fmt.Errorf("write the profiles: %w", err)
	}
	return nil
}

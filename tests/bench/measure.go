package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/admin"
)

// sample is one measurement.
type sample struct {
	Round       int     `json:"round"`
	Path        string  `json:"path"`
	Kind        string  `json:"kind"`
	Connections int     `json:"connections"`
	Outcome     outcome `json:"outcome"`
	CPU         float64 `json:"proxies_cpu_seconds"` // of all proxies on the path while the clock ran
}

// memory is what the proxies of a path hold with idle connections from node to node.
type memory struct {
	Path        string   `json:"path"`
	Connections int      `json:"connections"`
	Resident    []uint64 `json:"resident_bytes"` // on the client's side, on the server's
}

// bench is one run.
type bench struct {
	labs  []*lab
	paths []*path // of all labs
	settings
	*progress
}

// measure builds the labs, proves their paths, measures, and leaves nothing behind.
func measure(ctx context.Context, s settings, p *progress) (r *report, err error) {
	b := &bench{settings: s, progress: p}
	defer p.end()
	for _, between := range []admin.Path{admin.PathTunnel, admin.PathMTLS} {
		p.say("build two nodes, with paths by %s between them", between)
		l, err := newLab(ctx, s.binary, between)
		if err != nil {
			return nil, errors.Join(err, b.close())
		}
		b.labs, b.paths = append(b.labs, l), append(b.paths, l.paths...)
	}
	defer func() { err = errors.Join(err, b.close()) }()
	slices.SortStableFunc(b.paths, func(x, y *path) int { return cmp.Compare(x.rank(), y.rank()) })
	where, err := b.machine(ctx)
	if err != nil {
		return nil, err
	}
	idle, err := b.memory(ctx)
	if err != nil {
		return nil, err
	}
	for _, l := range b.labs {
		if err := b.prove(ctx, l); err != nil {
			return nil, err
		}
	}
	samples, others, err := b.rounds(ctx)
	if err != nil {
		return nil, err
	}
	where.Others = others
	loads, err := b.burdens(ctx)
	if err != nil {
		return nil, err
	}
	r = newReport(&s, where, b.paths, idle, loads, samples)
	r.Profiles, err = b.profiles(ctx, r)
	return r, err
}

func (b *bench) close() error {
	var errs []error
	for _, l := range b.labs {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// rounds measures all rounds. others is the share of the machine's processors that was not the lab's meanwhile.
func (b *bench) rounds(ctx context.Context) (all []sample, others float64, err error) {
	before, err := elsewhere(b.labs)
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	for round := 1; round <= b.settings.rounds; round++ {
		b.say("round %d of %d", round, b.settings.rounds)
		samples, err := b.round(ctx, round)
		if err != nil {
			return nil, 0, err
		}
		all = append(all, samples...)
	}
	after, err := elsewhere(b.labs)
	share := (after - before).Seconds() / time.Since(began).Seconds() / float64(runtime.NumCPU())
	return all, max(share, 0), err // cgroups are charged for interrupts as well, which the machine's count leaves out
}

// round measures everything once. The paths that are compared come one right after the other.
func (b *bench) round(ctx context.Context, round int) ([]sample, error) {
	var all []sample
	for _, kind := range kinds() {
		for _, n := range b.connections {
			for _, p := range b.paths {
				b.step("round %d of %d: %s, %d connections, %s", round, b.settings.rounds, kind, n, p.name)
				s, err := b.sample(ctx, p, order{Kind: kind, Connections: n, Duration: b.duration, Opens: b.opens})
				if err != nil {
					return nil, fmt.Errorf("measure %s with %d connections over %s: %w", kind, n, p.name, err)
				}
				s.Round = round
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// sample does one measurement. It fails if the daemons did not open exactly the connections that the path claims.
func (b *bench) sample(ctx context.Context, p *path, o order) (sample, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout(o), errors.New("the load did not end"))
	defer cancel()
	s := sample{Path: p.name, Kind: o.Kind, Connections: o.Connections}
	before, err := p.lab.opened(ctx)
	if err != nil {
		return s, err
	}
	c, err := p.lab.startClient(ctx, p, o)
	if err != nil {
		return s, err
	}
	if err := timed(ctx, c, p.proxies, &s); err != nil {
		return s, err
	}
	if err := c.end(ctx); err != nil {
		return s, err
	}
	return s, counted(ctx, p, before, s.Outcome.Opened)
}

// counted waits until the daemons have told of n connections over p since before: of direct ones they hear a moment later, and not of
// all if they are too slow for the kernel's news.
func counted(ctx context.Context, p *path, before [2]told, n int) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	for {
		now, err := p.lab.opened(ctx)
		if err != nil {
			return err
		}
		missing := 0
		for node, ends := range p.ends {
			got, want := now[node].opened-before[node].opened, ends*n
			if got > want || got+now[node].lost-before[node].lost < want {
				missing++
				err = errors.Join(err, fmt.Errorf("count the connections: node %d tells of %d ends of them and should tell of %d", node+1, got, want))
			}
		}
		if missing == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func timed(ctx context.Context, c *client, used proxies, s *sample) error {
	before, err := used.cpu()
	if err != nil {
		return err
	}
	if s.Outcome, err = c.work(ctx); err != nil {
		return err
	}
	after, err := used.cpu()
	s.CPU = (after - before).Seconds()
	return err
}

// memory measures the proxies with idle connections, before anything else has made them grow.
func (b *bench) memory(ctx context.Context) ([]memory, error) {
	var all []memory
	for _, p := range b.paths {
		if p.baseline != plainFar || p.beside != "" {
			continue
		}
		for _, n := range fitting(b.idle, openFilesLimit()) {
			b.step("memory with %d idle connections, %s", n, p.name)
			resident, err := b.held(ctx, p, n)
			if err != nil {
				return nil, fmt.Errorf("measure %d idle connections over %s: %w", n, p.name, err)
			}
			all = append(all, memory{Path: p.name, Connections: n, Resident: resident})
		}
	}
	return all, nil
}

// held is the memory of the proxies on p while there are n idle connections.
func (b *bench) held(ctx context.Context, p *path, n int) ([]uint64, error) {
	o := order{Kind: idle, Connections: n}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout(o)+b.settle, errors.New("the connections did not open"))
	defer cancel()
	c, err := p.lab.startClient(ctx, p, o)
	if err != nil {
		return nil, err
	}
	select { // what the handshakes left behind is given back over time
	case <-time.After(b.settle):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	resident, err := p.proxies.resident()
	if err != nil {
		return nil, err
	}
	return resident, c.end(ctx)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"
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

// memory is what the proxies hold with idle connections from node to node.
type memory struct {
	Connections int      `json:"connections"`
	Resident    []uint64 `json:"resident_bytes"` // of the client's node, of the server's node; nil: left out, too few open files
}

// bench is one run.
type bench struct {
	*lab
	settings
	*progress
	proxies proxies
}

// measure builds the lab, proves its paths, measures, and leaves nothing behind.
func measure(ctx context.Context, s settings, p *progress) (r *report, err error) {
	p.say("build two nodes")
	l, err := newLab(ctx, s.binary, s.tunnels)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	defer p.end()
	b := &bench{lab: l, settings: s, progress: p}
	if b.proxies, err = proxiesOf(l.Daemons[0].Process, l.Daemons[1].Process); err != nil {
		return nil, err
	}
	where, err := b.machine(ctx)
	if err != nil {
		return nil, err
	}
	idle, err := b.memory(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.prove(ctx); err != nil {
		return nil, err
	}
	samples, others, err := b.rounds(ctx)
	if err != nil {
		return nil, err
	}
	where.Others = others
	return newReport(&s, where, l.paths, idle, samples), nil
}

// rounds measures all rounds. others is the share of the machine's processors that was not the lab's meanwhile.
func (b *bench) rounds(ctx context.Context) (all []sample, others float64, err error) {
	before, err := b.elsewhere()
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
	after, err := b.elsewhere()
	return all, (after - before).Seconds() / time.Since(began).Seconds() / float64(runtime.NumCPU()), err
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
	before, err := b.opened(ctx)
	if err != nil {
		return s, err
	}
	c, err := b.startClient(ctx, p, o)
	if err != nil {
		return s, err
	}
	if err := b.timed(ctx, c, &s); err != nil {
		return s, err
	}
	if err := c.end(ctx); err != nil {
		return s, err
	}
	return s, b.counted(ctx, p, before, s.Outcome.Opened)
}

// counted waits until the daemons have told of n connections over p since before: of direct ones they hear a moment later.
func (b *bench) counted(ctx context.Context, p *path, before [2]int, n int) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	var after [2]int
	for {
		now, err := b.opened(ctx)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		after = now
		if after[0]-before[0] >= p.ends[0]*n && after[1]-before[1] >= p.ends[1]*n {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for node, ends := range p.ends {
		if got, want := after[node]-before[node], ends*n; got != want {
			return fmt.Errorf("count the connections: node %d tells of %d ends of them and should tell of %d", node+1, got, want)
		}
	}
	return nil
}

func (b *bench) timed(ctx context.Context, c *client, s *sample) error {
	before, err := b.proxies.cpu()
	if err != nil {
		return err
	}
	if s.Outcome, err = c.work(ctx); err != nil {
		return err
	}
	after, err := b.proxies.cpu()
	s.CPU = (after - before).Seconds()
	return err
}

// memory measures the daemons with idle connections, before anything else has made them grow.
func (b *bench) memory(ctx context.Context) ([]memory, error) {
	var all []memory
	for _, n := range b.idle {
		if !fits(n) {
			all = append(all, memory{Connections: n})
			continue
		}
		b.step("memory with %d idle connections", n)
		m, err := b.held(ctx, n)
		if err != nil {
			return nil, fmt.Errorf("measure %d idle connections: %w", n, err)
		}
		all = append(all, m)
	}
	return all, nil
}

func (b *bench) held(ctx context.Context, n int) (memory, error) {
	o := order{Kind: idle, Connections: n}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout(o)+b.settle, errors.New("the connections did not open"))
	defer cancel()
	m := memory{Connections: n}
	c, err := b.startClient(ctx, b.far, o)
	if err != nil {
		return m, err
	}
	select { // what the handshakes left behind is given back over time
	case <-time.After(b.settle):
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
	if m.Resident, err = b.proxies.resident(); err != nil {
		return m, err
	}
	return m, c.end(ctx)
}

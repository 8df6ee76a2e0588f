package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// burden is how busy the daemons are under a load within the node, which they do not carry: with 4 connections, of which each
// measurement has as many.
type burden struct {
	Load  string `json:"load"`
	Share spread `json:"share"` // of one processor, of all daemons of the lab together
	Ratio spread `json:"ratio"` // to idle connections, within a round
}

const burdenConnections = 4

// burdens compares idle connections with busy ones, round by round. New connections are left out: what each costs is among the costs.
func (b *bench) burdens(ctx context.Context) ([]burden, error) {
	p := b.paths[slices.IndexFunc(b.paths, func(p *path) bool { return p.name == direct })]
	loads := []string{idle, upload, download, roundTrip}
	shares, ratios := make(map[string][]float64), make(map[string][]float64)
	for round := range b.settings.rounds {
		b.say("processor time of the daemons, round %d of %d", round+1, b.settings.rounds)
		for _, load := range loads {
			share, err := b.busy(ctx, p, load)
			if err != nil {
				return nil, fmt.Errorf("measure the daemons under %s over %s: %w", load, p.name, err)
			}
			shares[load] = append(shares[load], share)
			ratios[load] = append(ratios[load], share/shares[idle][round])
		}
	}
	var all []burden
	for _, load := range loads {
		all = append(all, burden{load, spreadOf(shares[load]), spreadOf(ratios[load])})
	}
	return all, nil
}

// busy is the share of one processor that the proxies of p take under a load.
func (b *bench) busy(ctx context.Context, p *path, load string) (share float64, err error) {
	o := order{Kind: load, Connections: burdenConnections, Duration: b.watching}
	ctx, cancel := context.WithTimeout(ctx, timeout(o))
	defer cancel()
	c, err := p.lab.startClient(ctx, p, o)
	if err != nil {
		return 0, err
	}
	before, err := p.proxies.cpu()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if load == idle {
		select {
		case <-time.After(b.watching):
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	} else if _, err := c.work(ctx); err != nil {
		return 0, err
	}
	after, err := p.proxies.cpu()
	if err != nil {
		return 0, err
	}
	return (after - before).Seconds() / time.Since(began).Seconds(), c.end(ctx)
}

func (r *report) burdenTable() string {
	t := newTable("", "of one processor", "ratio to idle")
	for _, b := range r.Burdens {
		t.row(b.Load, fmt.Sprintf("%.2f %%", 100*b.Share.Median), b.Ratio.String())
	}
	return t.String()
}

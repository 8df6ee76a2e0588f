package main

import "fmt"

// goal is what a ratio must reach.
type goal struct {
	what   string
	metric string
	path   string
	peer   bool // it is to the best peer; else to plain TCP
	least  float64
	most   float64 // 0: as much as there is
}

func (g *goal) wanted() string {
	switch {
	case g.most == 0:
		return fmt.Sprintf("≥ %v", g.least)
	case g.least == 0:
		return fmt.Sprintf("≤ %v", g.most)
	}
	return fmt.Sprintf("%v – %v", g.least, g.most)
}

func (g *goal) reached(got float64) bool { return got >= g.least && (g.most == 0 || got <= g.most) }

func goals() []goal {
	return []goal{
		{what: "same node: bulk / plain TCP", metric: "bulk to the server", path: direct, least: 0.95},
		{what: "same node: bulk back / plain TCP", metric: "bulk from the server", path: direct, least: 0.95},
		{what: "same node: round trip p50 / plain TCP", metric: "round trip p50", path: direct, most: 1.05},
		{what: "same node: new connections / plain TCP", metric: "connect, request, close", path: direct, least: 0.85},
		// Of a rate, the ratio of the node without a daemon to the one with it is that of the costs the other way round.
		{what: "not enrolled: cost of a new connection / no daemon", metric: "connect, request, close", path: bare, least: 0.95, most: 1.05},
		{what: "tunnels: bulk / best peer", metric: "bulk to the server", path: tunnels, peer: true, least: 1.5},
		{what: "tunnels: bulk back / best peer", metric: "bulk from the server", path: tunnels, peer: true, least: 1.5},
		{what: "tunnels: processor time per GB / best peer", metric: "processor time per GB to the server", path: tunnels, peer: true, most: 0.7},
		{what: "tunnels: round trip p50 / best peer", metric: "round trip p50", path: tunnels, peer: true, most: 0.9},
		{what: "tunnels: round trip p99 / best peer", metric: "round trip p99", path: tunnels, peer: true, most: 0.9},
		{what: "tunnels: new connections / best peer", metric: "connect, request, close", path: tunnels, peer: true, least: 6},
		{what: "plain Connect: new connections / best peer", metric: "connect, request, close", path: mtls, peer: true, least: 1.3},
	}
}

// idleGoal is what an idle connection may take of each daemon, in KiB.
const idleGoal = 16

// burdenGoal is how busy the daemons may be with connections that they do not carry, as a ratio to idle ones: not busier.
const burdenGoal = 1.05

// result is a goal and what came of it.
type result struct {
	Goal        string  `json:"goal"`
	Wanted      string  `json:"wanted"`
	Connections int     `json:"connections"`
	Got         float64 `json:"got"`
	Reached     bool    `json:"reached"`
}

func (r *report) results() (all []result) {
	for _, g := range goals() {
		for _, n := range r.connections {
			got := r.ratio(g.metric, g.path, n).Median
			if g.peer {
				got = r.match(g.metric, g.path, n).Ratio.Median
			}
			all = append(all, result{Goal: g.what, Wanted: g.wanted(), Connections: n, Got: got, Reached: g.reached(got)})
		}
	}
	for _, b := range r.Burdens {
		if b.Load != idle {
			g := goal{most: burdenGoal}
			all = append(all, result{"same node: processor time of the daemons, " + b.Load + " / idle", g.wanted(), burdenConnections, b.Ratio.Median, g.reached(b.Ratio.Median)})
		}
	}
	none := make(map[string][]uint64)
	for _, m := range r.Memory {
		switch {
		case m.Path != tunnels && m.Path != mtls:
		case m.Connections == 0:
			none[m.Path] = m.Resident
		case none[m.Path] != nil:
			got := max(perConnection(m, none[m.Path], 0), perConnection(m, none[m.Path], 1))
			all = append(all, result{m.Path + ": KiB for each idle connection, per daemon", fmt.Sprintf("≤ %d", idleGoal), m.Connections, got, got <= idleGoal})
		}
	}
	return all
}

func (r *report) goalTable() string {
	t := newTable("", "wanted", "connections", "is", "reached")
	for _, g := range r.Goals {
		reached := "no"
		if g.Reached {
			reached = "yes"
		}
		t.row(g.Goal, g.Wanted, fmt.Sprint(g.Connections), significant(g.Got), reached)
	}
	return t.String()
}

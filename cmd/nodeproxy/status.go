package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
)

// expiresSoon is when an expiry is worth a colour; leaves are renewed long before.
const expiresSoon = 12 * time.Hour

func newStatus(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show workloads, services, certificates, the control plane's age, what is pinned",
		Example: "  nodeproxy status\n  nodeproxy status --json | jq '.workloads[] | select(.state != \"protected\")'",
		Args:    exactly(),
	}
	client, asJSON := socketFlag(cmd), jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		status, err := client().Status(cmd.Context())
		if err != nil {
			return err
		}
		if *asJSON {
			return e.json(status)
		}
		v := statusView{env: e, style: e.style(), s: status, now: time.Now()}
		v.print()
		return nil
	}
	return cmd
}

// statusView prints a status for people.
type statusView struct {
	*env
	style
	s   *admin.Status
	now time.Time
}

func (v *statusView) print() {
	v.summary()
	v.unprotected()
	v.workloads()
	v.services()
	v.certificates()
	v.maps()
	v.problems()
}

func (v *statusView) ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return span(v.now.Sub(t)) + " ago"
}

func (v *statusView) summary() {
	s := v.s
	source := cell{fmt.Sprintf("%s %s, generation %d, current %s", s.Source.Kind, s.Source.Location, s.Source.Generation, v.ago(s.Source.Updated)), nil}
	if s.Source.Error != "" || s.Source.Generation == 0 {
		source.paint = v.red
	}
	if s.Source.Restored {
		source.text += ", as an earlier daemon knew it"
	}
	heartbeat := v.ago(s.Kernel.Heartbeat)
	daemon := cell{fmt.Sprintf("%s, map ABI %d, up %s", s.Version, s.MapABI, span(v.now.Sub(s.Started))), nil}
	if s.Stopping {
		heartbeat = "stopped"
		daemon = cell{daemon.text + ", stopping: new connections are refused, live ones may end by themselves", v.yellow}
	}
	var t table
	t.add(cell{"node", v.dim}, cell{s.Node, v.bold})
	t.add(cell{"daemon", v.dim}, daemon)
	if h := s.Handover; h != nil {
		text := fmt.Sprintf("from version %s, %s", h.From, v.ago(h.At))
		if h.Draining {
			text += fmt.Sprintf("; that one (pid %d) lets its live connections end", h.PID)
		}
		t.add(cell{"took over", v.dim}, cell{text, nil})
	}
	t.add(cell{"source", v.dim}, source)
	t.add(cell{"store", v.dim}, v.store())
	t.add(cell{"policy", v.dim}, cell{fmt.Sprintf("generation %d, %s, default %s", s.Policy.Generation, count(s.Policy.Intentions, "intention"), s.Policy.Default), nil})
	t.add(cell{"kernel", v.dim}, cell{fmt.Sprintf("%s pinned at %s, heartbeat %s", count(s.Kernel.Links, "link"), s.Kernel.Pins, heartbeat), nil})
	t.add(cell{"connections", v.dim}, cell{fmt.Sprintf("%d active of %d, %d opened, %d denied", s.Connections.Active, s.Connections.Max, s.Connections.Opened, s.Connections.Denied), nil})
	if q := s.DNS; q != nil {
		t.add(cell{"dns", v.dim}, cell{fmt.Sprintf("%d queries answered, %d forwarded, %d failed", q.Answered, q.Forwarded, q.Failed), nil})
	}
	if n := s.Kernel.Repairs; n > 0 {
		t.add(cell{"repairs", v.dim}, cell{fmt.Sprintf("%d: somebody else changes what nodeproxy has in the kernel, see the daemon's log", n), v.yellow})
	}
	if n := s.Connections.Tunnels; n.Outbound+n.Inbound > 0 {
		t.add(cell{"tunnels", v.dim}, cell{fmt.Sprintf("%d outbound and %d inbound ready, without a connection", n.Outbound, n.Inbound), nil})
	}
	t.add(cell{"same node", v.dim}, v.sameNode())
	if n := s.Kernel.Counters[admin.CounterUnprotectedUDP]; n > 0 {
		t.add(cell{"udp", v.dim}, cell{fmt.Sprintf("%d datagrams to the ports of workloads were let in unprotected", n), v.yellow})
	}
	t.write(v.stdout, "")
}

// store says where the last snapshot is kept, and if it is.
func (v *statusView) store() cell {
	store := v.s.Store
	switch {
	case store.Detail != "" && store.Kind == "none":
		return cell{"none, " + store.Detail, nil}
	case store.Detail != "":
		return cell{"nothing is kept: " + clean(store.Detail), v.red}
	case store.Generation == 0:
		return cell{store.Kind + ", not written yet", v.yellow}
	}
	return cell{fmt.Sprintf("%s, %d KiB, written %s", store.Kind, (store.Bytes+1023)>>10, v.ago(store.Written)), nil}
}

func (v *statusView) sameNode() cell {
	s := v.s.SameNode
	if s.NotDirect != "" {
		return cell{fmt.Sprintf("%s: %s", s.Path, s.NotDirect), nil}
	}
	return cell{fmt.Sprintf("%s to %s, %d active", s.Path, count(s.Grants, "pair"), s.Active), nil}
}

// section prints a title and a table, or the word none.
func (v *statusView) section(title string, t *table) {
	v.printf("\n%s\n", v.bold(title))
	if len(t.rows) < 2 {
		v.printf("  %s\n", v.dim("none"))
		return
	}
	t.write(v.stdout, "  ")
}

// unprotected is the first thing to see when something that should be in the mesh is not.
func (v *statusView) unprotected() {
	n := 0
	for _, w := range v.s.Workloads {
		if w.Unprotected() {
			n++
		}
	}
	if n > 0 {
		v.printf("\n%s\n", v.bold(v.red(fmt.Sprintf("%s unprotected: see Problems below.", count(n, "workload")))))
	}
}

func (v *statusView) workloads() {
	var t table
	t.header(v.style, "SERVICE", "STATE", "MODE", "DNS", "PROCESSES", "INSTANCES", "BY", "CGROUP")
	for _, w := range v.s.Workloads {
		state := cell{w.State, v.green}
		switch {
		case w.Unprotected():
			state.paint = v.red
		case w.State != "protected" && w.State != "disabled":
			state.paint = v.yellow
		}
		dns := cell{cmp.Or(w.DNS, "-"), nil}
		if strings.HasPrefix(w.DNS, "off: ") {
			dns = cell{"off", v.yellow} // why is among the problems
		}
		t.add(cell{w.Services(), nil}, state, cell{w.Mode, nil}, dns, cell{fmt.Sprint(w.Processes), nil},
			cell{cmp.Or(strings.Join(w.Instances, ","), "-"), nil}, cell{w.Provider, nil}, cell{w.Known(), nil})
	}
	v.section("Workloads", &t)
}

func (v *statusView) services() {
	var t table
	t.header(v.style, "SERVICE", "VIRTUAL IP", "INSTANCE", "NODE", "ADDRESS", "MTLS", "HEALTH")
	for _, svc := range v.s.Services {
		name, virtual := svc.Name, cmp.Or(strings.Join(slices.Concat(svc.Virtual, svc.Ports), ","), "-")
		for _, inst := range svc.Instances {
			node := inst.Node
			if inst.Local {
				node += " (here)"
			}
			t.add(cell{name, nil}, cell{virtual, nil}, cell{inst.ID, nil}, cell{node, nil}, cell{cmp.Or(inst.Address, "-"), nil},
				cell{cmp.Or(inst.Mesh, "-"), nil}, v.health(&inst))
			name, virtual = "", ""
		}
		if len(svc.Instances) == 0 && len(svc.Targets) == 0 {
			t.add(cell{name, nil}, cell{virtual, nil}, cell{"no instance", v.yellow})
		}
		for i := range svc.Targets {
			t.add(cell{name, nil}, cell{virtual, nil}, cell{"→ " + targetLine(&svc.Targets[i]), nil})
			name, virtual = "", ""
		}
	}
	v.section("Services", &t)
}

func (v *statusView) health(inst *admin.Instance) cell {
	switch {
	case inst.Ejected != "":
		return cell{"ejected: " + inst.Ejected, v.red}
	case !inst.Healthy:
		return cell{"unhealthy", v.red}
	}
	return cell{"healthy", v.green}
}

func (v *statusView) certificates() {
	var t table
	t.header(v.style, "SERVICE", "EXPIRES", "IDENTITY")
	for _, c := range v.s.Certificates {
		t.add(cell{c.Service, nil}, v.expiry(&c), cell{c.Identity, nil})
	}
	v.section("Certificates", &t)
}

func (v *statusView) expiry(c *admin.Certificate) cell {
	left := c.NotAfter.Sub(v.now)
	switch {
	case c.Error != "" || c.NotAfter.IsZero():
		return cell{cmp.Or(c.Error, "no certificate"), v.red}
	case left <= 0:
		return cell{"expired " + v.ago(c.NotAfter), v.red}
	case left < expiresSoon:
		return cell{"in " + span(left), v.yellow}
	}
	return cell{"in " + span(left), nil}
}

func (v *statusView) maps() {
	var t table
	t.header(v.style, "MAP", "ENTRIES", "OF")
	for _, m := range v.s.Kernel.Maps {
		entries := cell{fmt.Sprint(m.Entries), nil}
		if m.Max > 0 && m.Entries*10 >= m.Max*9 {
			entries.paint = v.red
		}
		t.add(cell{m.Name, nil}, entries, cell{fmt.Sprint(m.Max), nil})
	}
	v.section("Kernel maps", &t)
}

// problems lists all that the operator should look at, also what only coloured a cell above.
func (v *statusView) problems() {
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if v.s.Source.Error != "" {
		say("source: %s", v.s.Source.Error)
	}
	for _, w := range v.s.Workloads {
		if w.Unprotected() || w.Detail != "" && w.State != "empty" {
			say("workload %s (%s) is %s: %s", w.Known(), w.Services(), w.State, w.Detail)
		}
	}
	for _, w := range v.s.Workloads {
		if why, off := strings.CutPrefix(w.DNS, "off: "); off && w.State == "protected" {
			say("name queries of workload %s (%s) are not answered: %s", w.Known(), w.Services(), why)
		}
	}
	if n := v.s.Kernel.Counters[admin.CounterEventsLost]; n > 0 {
		say("kernel: %d verdicts were lost since its maps were made: trace and counters do not show them", n)
	}
	for _, r := range v.s.Refused {
		say("claim refused: %s may not be %s (%s): %s", r.Known(), r.Services(), r.Provider, r.Why)
	}
	for _, p := range v.s.Problems {
		say("%s: %s", strings.Join(slices.DeleteFunc([]string{p.Service, p.Kind}, func(s string) bool { return s == "" }), ", "), p.Text)
	}
	if len(lines) == 0 {
		v.printf("\n%s\n", v.green("No problems."))
		return
	}
	v.printf("\n%s\n", v.bold(v.red("Problems")))
	for _, line := range lines {
		v.printf("  %s\n", v.red(clean(strings.ReplaceAll(line, "\n", "; "))))
	}
}

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/tests/netlab"
)

// canaries runs "nodeproxy check --workloads" on a node and returns what it says of workloads.
func (m *mesh) canaries(node int) (results []check.Result) {
	m.t.Helper()
	var out bytes.Buffer
	_, failed := m.Lab.Run(m.ctx(), netlab.Command{ // it is over when out is read
		Path: programs.nodeproxy, Args: []string{"check", "--workloads", "--json", "--socket", m.Daemons[node].Socket()}, Stdout: &out,
	})
	var answer struct{ Results []check.Result } // they say what its status says
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		m.t.Fatalf("check says %q: %v: %v", out.String(), err, failed)
	}
	for _, r := range answer.Results {
		if strings.HasPrefix(r.Name, "canary ") || strings.HasPrefix(r.Name, "workload") {
			results = append(results, r)
		}
	}
	return results
}

// allOK asserts that the canaries of node 1 find nothing wrong. Where the machine is so busy that the daemon could not read in time what
// other proxies may have set up, it says so and looks again, and so does this.
func (m *mesh) allOK(when string) (results []check.Result) {
	m.t.Helper()
	m.eventually("the daemon knows what other proxies have set up", func() error {
		results = m.canaries(0)
		if slices.ContainsFunc(results, func(r check.Result) bool { return strings.Contains(r.Text, "it took longer than") }) {
			return errNotYet
		}
		return nil
	})
	if check.Worst(results) != check.OK {
		m.t.Errorf("%s not all is ok: %s", when, list(results))
	}
	return results
}

// says asserts that one of results has the verdict and all of the parts.
func says(t *testing.T, results []check.Result, verdict check.Verdict, parts ...string) {
	t.Helper()
results:
	for _, r := range results {
		for _, part := range parts {
			if r.Verdict != verdict || !strings.Contains(r.Name+": "+r.Text, part) {
				continue results
			}
		}
		return
	}
	t.Errorf("no %s with %q in %s", verdict, parts, list(results))
}

func list(results []check.Result) string {
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "\n%s %s: %s", r.Verdict, r.Name, r.Text)
	}
	return b.String()
}

func TestCanariesOfAHealthyNodeAreAllOK(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web") // in a network namespace of its own
	db, err := m.Nodes[0].HostWorkload("db")
	m.must(err)
	m.Daemons[0].Enroll(db, "db")
	m.define(0, "db", 5432, db.IPv4, db.IPv6)
	database := m.serve(db, at(db.IPv4, 5432), at(db.IPv6, 5432))
	m.start()
	before := m.processes(web, db)
	results := m.allOK("of a healthy node")
	for service, addresses := range map[string][]string{"web": {at(web.IPv4, port)}, "db": {at(db.IPv4, 5432), at(db.IPv6, 5432)}} {
		says(t, results, check.OK, "canary", service, "redirected to the proxy, and known there as "+service)
		for _, address := range addresses {
			says(t, results, check.OK, "canary", service, "plaintext to "+address+" is refused")
		}
		says(t, results, check.OK, "canary", service, "/svc/"+service+", valid until")
		says(t, results, check.OK, "canary", service, "application: it listens at")
	}
	if strings.Contains(database.Output(), "accepted") {
		t.Errorf("an application was connected to: %s", database.Output())
	}
	if after := m.processes(web, db); after != before {
		t.Errorf("processes of the workloads: %s, and before %s", after, before)
	}
}

func TestACanarySaysThatTheApplicationDoesNotListenOrSomebodyElseDoes(t *testing.T) {
	m := newMesh(t)
	web, err := m.Place(0, "web", port)
	m.must(err)
	m.serve(web, ":9999") // it is up, and not where its definition says
	m.start()
	says(t, m.canaries(0), check.Failed, "canary web", "nothing listens on port 8080", "is the application up?")
	explanation, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "web")
	m.must(err)
	if missing := strings.Join(explanation.Missing, "; "); !strings.Contains(missing, "nothing listens on port 8080") {
		t.Errorf("explain misses %q", missing)
	}
	outside, err := web.Node.Cgroup.Child("outside")
	m.must(err)
	stranger := &netlab.Workload{Name: "stranger", Node: web.Node, Namespace: web.Namespace, Cgroup: outside}
	squatter := m.serve(stranger, ":8080")
	says(t, m.canaries(0), check.Failed, "canary web", "is not in the workload's cgroup")
	squatter.Kill()
	m.serve(web, ":8080")
	m.allOK("where the application listens")
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("the squatter was connected to: %s", squatter.Output())
	}
}

func (m *mesh) processes(of ...workload) (all string) {
	for _, w := range of {
		pids, err := w.Cgroup.PIDs()
		m.must(err)
		all += fmt.Sprint(pids)
	}
	return all
}

func TestACanaryOfEachMissingHookFailsAndSaysWhatToDo(t *testing.T) {
	m := newMesh(t)
	type missing struct {
		*netlab.Workload
		hook, complaint string
	}
	var all []missing
	for hook, complaint := range map[string]string{
		"connect4":     "a connect hook is not attached",
		"connect6":     "a connect hook is not attached",
		"getpeername4": "a getpeername hook is not attached",
		"sockops":      "a sockops hook is not attached",
		"sk_lookup":    "nothing guards its network namespace",
	} {
		all = append(all, missing{m.place(0, strings.ReplaceAll(hook, "_", "-")), hook, complaint})
	}
	m.start()
	var allow []func()
	forbid := func(kind ebpf.ProgramType, at ebpf.AttachType) { // else the daemon repairs it
		allow = append(allow, m.forbidAttaching(m.Nodes[0].Cgroup, kind, at))
	}
	forbid(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	forbid(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect)
	forbid(ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername)
	forbid(ebpf.SockOps, ebpf.AttachCGroupSockOps)
	for _, w := range all {
		if w.hook == "sk_lookup" {
			allow = append(allow, m.crowdOut(w.Workload))
			continue
		}
		id, err := w.Cgroup.ID()
		m.must(err)
		m.detach(0, fmt.Sprintf("cgroups/%d/%s", id, w.hook))
	}
	complain := func(results []check.Result) {
		t.Helper()
		for _, w := range all {
			says(t, results, check.Failed, "canary "+w.Name+" ", w.complaint, "restart the daemon")
		}
	}
	complain(m.canaries(0)) // before the daemon's audit or after
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if w.State != "unprotected" {
				return fmt.Errorf("the workloads are %+v", s.Workloads)
			}
		}
		return nil
	})
	m.must(err)
	results := m.canaries(0)
	complain(results)
	for _, w := range all {
		says(t, results, check.Failed, "workload "+w.Name+" ", "was detached, by somebody else, and cannot be repaired")
	}
	for _, allow := range allow {
		allow()
	}
	m.stop(0)
	m.restart(0)
	m.allOK("after the restart that was advised")
}

// crowdOut leaves no room in a workload's network namespace for one more guard, once there is one less.
func (m *mesh) crowdOut(w *netlab.Workload) (allow func()) {
	m.t.Helper()
	const most = 64 // MAX_BPF_PROG of a namespace and attach type, kernel/bpf/net_namespace.c
	prog := m.passing(ebpf.SkLookup, ebpf.AttachSkLookup)
	ns, err := os.Open(w.Namespace.Path())
	m.must(err)
	var links []link.Link
	crowd := func() error {
		l, err := link.AttachNetNs(int(ns.Fd()), prog)
		if err == nil {
			links = append(links, l)
		}
		return err
	}
	for range most - 1 {
		m.must(crowd())
	}
	guard := fmt.Sprintf("namespaces/%d/sk_lookup", w.Namespace.Cookie())
	for m.detach(0, guard); crowd() != nil; {
		m.detach(0, guard) // the daemon was faster
	}
	return func() {
		for _, l := range links {
			m.must(l.Close())
		}
		ns.Close()
		prog.Close()
	}
}

// detach takes hooks off whose pins match a pattern below the node's directory.
func (m *mesh) detach(node int, pattern string) {
	m.t.Helper()
	pins, err := filepath.Glob(filepath.Join(m.Daemons[node].Pins, m.Nodes[node].Name, "v*", pattern))
	if err != nil || len(pins) == 0 {
		m.t.Fatalf("no pin %s: %v", pattern, err)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		m.must(err)
		if err := l.(interface{ Detach() error }).Detach(); !errors.Is(err, unix.EINVAL) { // EINVAL: it is detached
			m.must(err)
		}
		m.must(l.Close())
	}
}

func TestAnInterruptedCheckLeavesNoProcessBehind(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.start()
	before := m.processes(web)
	freeze := func(state string) {
		m.must(os.WriteFile(filepath.Join(web.Cgroup.Path(), "cgroup.freeze"), []byte(state), 0))
	}
	freeze("1") // so that the canary stops in the middle
	t.Cleanup(func() { freeze("0") })
	p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: []string{"check", "--workloads", "--socket", m.Daemons[0].Socket()}})
	m.must(err)
	m.eventually("the canary is in the workload's cgroup", func() error {
		if m.processes(web) == before {
			return errNotYet
		}
		return nil
	})
	m.must(p.Signal(os.Interrupt))
	if err := p.Wait(m.ctx()); err == nil || p.ExitCode() != 1 {
		t.Errorf("exit status %d of an interrupted check: %s", p.ExitCode(), p.Output())
	}
	if after := m.processes(web); after != before {
		t.Errorf("processes of the workload: %s, and before %s", after, before)
	}
}

func TestCanariesOfAHungDaemonFailInBoundedTime(t *testing.T) {
	m := newMesh(t)
	m.place(0, "web")
	m.start()
	m.must(m.Daemons[0].Process.Signal(syscall.SIGSTOP))
	t.Cleanup(func() { _ = m.Daemons[0].Process.Signal(syscall.SIGCONT) })
	says(t, m.canaries(0), check.Failed, "it hangs", "restart it")
	m.must(m.Daemons[0].Process.Signal(syscall.SIGCONT))
}

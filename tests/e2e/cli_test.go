package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/tests/netlab"
)

// nodeproxy runs the command on a node, asking that node's daemon, and returns its output and how it ended.
func (m *mesh) nodeproxy(node int, args ...string) (string, error) {
	m.t.Helper()
	d := m.Daemons[node]
	return m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: append(args, "--socket", d.Socket()), Namespace: d.Node.Namespace})
}

func TestTheCommandsShowWhatTheDaemonKnows(t *testing.T) {
	m, web, _ := pair(t)
	t.Run("status", func(t *testing.T) {
		m := m.in(t)
		out, err := m.nodeproxy(0, "status", "--json")
		m.must(err)
		var status admin.Status
		m.must(json.Unmarshal([]byte(out), &status))
		if status.Node != "node-1" || len(status.Workloads) != 1 || status.Workloads[0].State != "protected" {
			t.Errorf("the status is %+v", status)
		}
		out, err = m.nodeproxy(0, "status")
		m.must(err)
		for _, want := range []string{"web", "api", "protected", m.virtual["api"].String()} {
			if !strings.Contains(out, want) {
				t.Errorf("the status for people does not show %q: %s", want, out)
			}
		}
	})
	t.Run("explain", func(t *testing.T) {
		m := m.in(t)
		for _, tc := range []struct{ source, destination, intention string }{{"web", "api", "web => api"}, {"api", "web", "* => *"}} {
			out, err := m.nodeproxy(0, "explain", tc.source, tc.destination, "--json")
			var e admin.Explanation
			if jsonErr := json.Unmarshal([]byte(out), &e); jsonErr != nil {
				t.Fatalf("%v: %v: %s", err, jsonErr, out)
			}
			if e.Allowed != (tc.source == "web") || !strings.HasPrefix(e.Intention, tc.intention) {
				t.Errorf("%s to %s is explained as %+v", tc.source, tc.destination, e)
			}
		}
	})
	t.Run("trace", func(t *testing.T) {
		m := m.in(t)
		d := m.Daemons[0]
		p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: []string{"trace", "--json", "--service", "api", "--socket", d.Socket()}})
		m.must(err)
		t.Cleanup(p.Kill)
		m.eventually("the trace shows a connection", func() error { // it may begin after the first
			m.reaches(web, m.vip("api"))
			if !strings.Contains(p.Output(), `"event":"close"`) {
				return errNotYet
			}
			return nil
		})
		for line := range strings.Lines(p.Output()) {
			var c admin.Connection
			if err := json.Unmarshal([]byte(line), &c); err != nil || c.Destination.Service != "api" || c.Source.Comm != "app" {
				t.Errorf("the line %s: %v", line, err)
			}
		}
	})
}

func TestTheTraceSaysWhoCalledWhomHowAndWhy(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	m.allow("api", "web")
	m.start()
	traces := make(map[int]*netlab.Process)
	for node := range m.Daemons {
		p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: []string{"trace", "--socket", m.Daemons[node].Socket()}})
		m.must(err)
		t.Cleanup(p.Kill)
		traces[node] = p
	}
	root := mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	dialled, taken := m.vip("api"), m.mesh(0, "api")
	for name, tc := range map[string]struct {
		node   int
		from   *netlab.Workload
		fields []string
	}{
		"the end, at the source":      {0, web, []string{" close ", "outbound", "web → api", "127.0.0.1:", "→ " + dialled, "tunnel", "allowed", "web => api (allow), ", "sent 5 B, received ", spiffe(root, "api").String(), " app"}},
		"the end, at the destination": {1, web, []string{" close ", "inbound", "web → api", hostPrefix(web.IPv4), "→ " + taken, "tunnel", "allowed", "web => api (allow), ", "sent 5 B, received ", spiffe(root, "web").String()}},
		"the start":                   {0, web, []string{" open ", "outbound", "web → api", "127.0.0.1:", "→ " + dialled, "tunnel", "allowed", "web => api (allow), ", " app"}},
		"a denial":                    {0, batch, []string{" denied ", "outbound", "batch → api", "127.0.0.1:", "→ " + dialled, "none", "intention: ", "* => * (deny), ", " app"}},
	} {
		missing := errNotYet
		m.eventually(name, func() error { // the trace may begin after the first
			m.dial(tc.from, dialled, "peer")
			for line := range strings.Lines(traces[tc.node].Output()) {
				absent := slices.DeleteFunc(slices.Clone(tc.fields), func(field string) bool { return strings.Contains(line, field) })
				if len(absent) == 0 {
					return nil
				}
				if strings.Contains(line, tc.fields[0]) && strings.Contains(line, tc.fields[2]) {
					missing = fmt.Errorf("%q is not in %s", absent, line)
				}
			}
			return missing
		})
	}
}

// TestACommandEndsWithItsStatus runs the commands as an operator would: 0 done, 1 failed, 2 wrong usage.
func TestACommandEndsWithItsStatus(t *testing.T) {
	m, web, _ := pair(t)
	socket, pins := m.Daemons[0].Socket(), m.Daemons[0].Pins
	for _, tc := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"version", "--json"}, 0, `"map_abi"`},
		{[]string{"status", "--json", "--socket", socket}, 0, `"workloads"`},
		{[]string{"explain", "web", "api", "--json", "--socket", socket}, 0, `"intention"`},
		{[]string{"check", "--workloads", "--json", "--socket", socket, "--config", m.Daemons[0].ConfigPath()}, 0, `"results"`},
		{[]string{"status", "--socket", socket + "-gone"}, 1, "is it running"},
		{[]string{"explain", "web", "nobody", "--socket", socket}, 1, "nobody"},
		{[]string{"unenroll", web.Cgroup.Path(), "--socket", socket}, 1, "not enrolled by hand"},
		{[]string{"enroll", web.Cgroup.Path(), "--service", "web", "--socket", socket}, 1, "has it as service"},
		{[]string{"cleanup", "--pins", pins}, 1, "stop that one first"},
		{[]string{"run", "--config", "/nonexistent"}, 1, "/nonexistent"},
		{[]string{"trace", "--verdict", "maybe", "--socket", socket}, 2, "maybe"},
		{[]string{"explain", "web"}, 2, ""},
		{[]string{"enroll", web.Cgroup.Path()}, 2, "service"},
		{[]string{"status", "--nonsense"}, 2, "nonsense"},
		{[]string{"nonsense"}, 2, "nonsense"},
	} {
		p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: tc.args, Namespace: m.Nodes[0].Namespace})
		m.must(err)
		_ = p.Wait(m.ctx()) // its status is looked at
		if p.ExitCode() != tc.status || !strings.Contains(p.Output(), tc.want) || strings.Contains(p.Output(), "goroutine ") {
			t.Errorf("%v ends with %d, want %d and %q: %s", tc.args, p.ExitCode(), tc.status, tc.want, p.Output())
		}
	}
}

func TestTheTraceShowsWhatItsFiltersLetThrough(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	m.allow("api", "web")
	m.start()
	all := map[string]func(admin.Connection) bool{
		"--service=batch": func(c admin.Connection) bool { return c.Source.Service == "batch" },
		"--service=web":   func(c admin.Connection) bool { return c.Source.Service == "web" },
		"--workload=" + web.Cgroup.Path(): func(c admin.Connection) bool {
			return c.Source.Workload == web.Cgroup.Path() || c.Destination.Workload == web.Cgroup.Path()
		},
		"--verdict=denied":  func(c admin.Connection) bool { return c.Verdict == admin.Denied },
		"--verdict=allowed": func(c admin.Connection) bool { return c.Verdict == admin.Allowed },
	}
	traces := make(map[string]*netlab.Process)
	for filter := range all {
		p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: []string{"trace", "--json", filter, "--socket", m.Daemons[0].Socket()}})
		m.must(err)
		t.Cleanup(p.Kill)
		traces[filter] = p
	}
	for filter, p := range traces {
		m.eventually("the trace with "+filter+" shows a connection", func() error { // it may begin after the first
			m.reaches(web, m.vip("api"))
			m.getsNothing(batch, m.vip("api"))
			if strings.Count(p.Output(), "\n") < 2 {
				return errNotYet
			}
			return nil
		})
	}
	for filter, p := range traces {
		p.Kill()
		for line := range strings.Lines(p.Output()) {
			var c admin.Connection
			if err := json.Unmarshal([]byte(line), &c); err != nil || !all[filter](c) {
				t.Errorf("%s shows %s: %v", filter, line, err)
			}
		}
	}
}

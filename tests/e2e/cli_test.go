package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
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

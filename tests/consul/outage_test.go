package consul

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// call is one direction of traffic.
type call struct {
	from *netlab.Workload
	to   string
}

// load starts n connections each way, two at a time. The function returned waits for them: none may fail.
func (m *mesh) load(n int, calls ...call) (wait func()) {
	m.t.Helper()
	var running []*netlab.Process
	for _, c := range calls {
		p, err := c.from.Start(netlab.Command{Path: programs.app, Args: []string{"load", "-n", strconv.Itoa(n), "-c", "2", c.to}})
		m.must(err)
		running = append(running, p)
	}
	return func() {
		m.t.Helper()
		for i, p := range running {
			m.must(p.Wait(m.ctx()))
			if want := fmt.Sprintf("done %d failed 0\n", n); p.Output() != want {
				m.t.Errorf("from %s to %s: %s", calls[i].from.Name, calls[i].to, p.Output())
			}
		}
	}
}

// streams opens a connection each way that never ends. The function returned says that they still carry bytes.
func (m *mesh) streams(calls ...call) (alive func()) {
	m.t.Helper()
	var open []*netlab.Process
	for _, c := range calls {
		p, err := c.from.Start(netlab.Command{Path: programs.app, Args: []string{"dial", "-timeout", "1h", c.to, "stream"}})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "a line"))
		open = append(open, p)
	}
	return func() {
		m.t.Helper()
		for i, p := range open {
			before := len(p.Output())
			m.must(m.until("the live connection carries bytes", func() error {
				if out := p.Output(); len(out) == before {
					return fmt.Errorf("from %s to %s nothing comes; the end is %q", calls[i].from.Name, calls[i].to, out[max(0, len(out)-60):])
				}
				return nil
			}))
		}
	}
}

// until repeats check until it returns nil.
func (m *mesh) until(what string, check func() error) error {
	ctx := m.ctx()
	for tick := time.Tick(pollInterval); ; {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, err)
		case <-tick:
		}
	}
}

// awaitSource waits until the source of a node's daemon is as wanted.
func (m *mesh) awaitSource(node int, what string, want func(admin.SourceStatus) bool) *admin.Status {
	m.t.Helper()
	status, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if !want(s.Source) {
			return fmt.Errorf("the source is not %s: %+v", what, s.Source)
		}
		return nil
	})
	m.must(err)
	return status
}

func fails(s admin.SourceStatus) bool { return s.Error != "" }

func works(s admin.SourceStatus) bool { return s.Error == "" && !s.Restored }

var sourceAge = regexp.MustCompile(`(?m)^nodeproxy_source_age_seconds (\S+)$`)

func (m *mesh) sourceAge(node int) time.Duration {
	m.t.Helper()
	found := sourceAge.FindStringSubmatch(m.metrics(node))
	if found == nil {
		m.t.Fatal("there is no nodeproxy_source_age_seconds")
	}
	seconds, err := strconv.ParseFloat(found[1], 64)
	m.must(err)
	return time.Duration(seconds * float64(time.Second))
}

// misbehave makes both fronts answer in the agents' place, also those who wait already.
func (m *mesh) misbehave(spoil func(http.ResponseWriter, *http.Request) bool) {
	for _, f := range m.fronts {
		f.Misbehave(spoil)
		f.Drop()
	}
}

func answers(status int) func(http.ResponseWriter, *http.Request) bool {
	return func(rw http.ResponseWriter, _ *http.Request) bool {
		http.Error(rw, http.StatusText(status), status)
		return true
	}
}

func aborts(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

// revoke deletes the token that a daemon has.
func (m *mesh) revoke(node int) {
	m.t.Helper()
	secret, err := os.ReadFile(m.tokenFile(node))
	m.must(err)
	var tokens []struct{ AccessorID, SecretID string }
	m.must(m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/acl/tokens", nil, &tokens))
	for _, token := range tokens {
		if token.SecretID == strings.TrimSpace(string(secret)) {
			m.must(m.agents[0].Do(m.ctx(), http.MethodDelete, "/v1/acl/token/"+token.AccessorID, nil, nil))
			return
		}
	}
	m.t.Fatal("the daemon's token is not known")
}

// outage is one way in which Consul can be away.
type outage struct {
	name  string
	nodes []int // whose daemons notice
	begin func(m *mesh)
	end   func(m *mesh)
}

func outages() []outage {
	both := []int{0, 1}
	behave := func(m *mesh) { m.misbehave(nil) }
	return []outage{
		{"a storm of 429", both, func(m *mesh) { m.misbehave(answers(http.StatusTooManyRequests)) }, behave},
		{"resets", both, func(m *mesh) { m.misbehave(aborts) }, behave},
		{"an agent that hangs", both, func(m *mesh) {
			m.misbehave(func(_ http.ResponseWriter, req *http.Request) bool { <-req.Context().Done(); return true })
		}, behave},
		{"a slow agent", nil, func(m *mesh) {
			m.misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
				select {
				case <-req.Context().Done():
				case <-time.After(2 * time.Second):
				}
				return false
			})
		}, behave},
		{"a revoked token", both, func(m *mesh) { m.revoke(0); m.revoke(1) }, func(m *mesh) {
			for i, services := range [][]string{{"web", "batch"}, {"api"}} {
				token, err := m.agents[0].NewToken(m.ctx(), m.Nodes[i].Name+"-again", rules(m.t, m.Nodes[i].Name, services...))
				m.must(err)
				m.must(os.WriteFile(m.tokenFile(i), []byte(token), 0o600))
			}
		}},
		{"an agent that is down", []int{1}, func(m *mesh) { m.agents[1].Process.Kill() }, func(m *mesh) { m.must(m.agents[1].Restart(m.ctx())) }},
		{"an agent that is down again before its checks have run", []int{1}, func(m *mesh) { m.agents[1].Process.Kill() }, func(m *mesh) { m.must(m.agents[1].Restart(m.ctx())) }},
		{"servers that are down", both, func(m *mesh) { m.agents[0].Process.Kill() }, func(m *mesh) { m.must(m.agents[0].Restart(m.ctx())) }},
	}
}

// newFrontedMesh is two nodes with web and batch on the first and api on the second, where web and api may call each other.
func newFrontedMesh(t *testing.T) (m *mesh, batch *netlab.Workload, calls []call) {
	m = newMeshWith(t, Config{Persist: true})
	for i, agent := range m.agents {
		m.fronts[i] = NewFront(t, agent.Socket())
	}
	web, batch, api := m.place(0, "web"), m.place(0, "batch"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "web", map[string]string{"api": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api"})
	calls = []call{{web, m.vip(0, "api")}, {api, m.vip(1, "web")}}
	for _, c := range calls {
		m.eventually("the allowed reach each other", c.from, c.to, reached)
	}
	for i := range m.Daemons {
		m.awaitSource(i, "well", works)
	}
	return m, batch, calls
}

// maxRecovery is how many requests a daemon may send from the end of an outage until all is current again, and
// maxAtOnce how many connections it may have open. The mesh has three services and two nodes: one round of all
// questions is some thirty requests.
const (
	maxRecovery = 150
	maxAtOnce   = 16
)

func TestOutagesFailNoConnectionAndEndWithoutAHerd(t *testing.T) {
	m, batch, calls := newFrontedMesh(t)
	alive := m.streams(calls...)
	for _, o := range outages() {
		began := time.Now()
		through := m.load(200, calls...)
		o.begin(m)
		for _, node := range o.nodes {
			status := m.awaitSource(node, "failing", fails)
			if status.Source.Updated.After(time.Now()) || began.Sub(status.Source.Updated) > 30*time.Second || status.Source.Updated.IsZero() {
				t.Errorf("%s: it began at %s, and %s says %+v", o.name, began, m.Nodes[node].Name, status.Source)
			}
			if age, since := m.sourceAge(node), time.Since(status.Source.Updated); age > since+time.Second || age < since-time.Minute {
				t.Errorf("%s: the metric says %s, status %s", o.name, age, since)
			}
		}
		through()
		m.load(100, calls...)()
		if out := m.dial(batch, calls[0].to, "peer"); reached(out) {
			t.Errorf("%s: batch reaches api: %s", o.name, out)
		}
		alive()

		recovery := m.load(100, calls...)
		o.end(m)
		var before [2]int
		for i, f := range m.fronts {
			f.Lock()
			f.Most = len(f.Open)
			f.Unlock()
			before[i] = f.Total()
		}
		for node := range m.Daemons {
			m.awaitSource(node, "well again", func(s admin.SourceStatus) bool { return works(s) && s.Updated.After(began) })
		}
		for i, f := range m.fronts {
			asked := f.Total() - before[i]
			f.Lock()
			most := f.Most
			f.Unlock()
			t.Logf("%s: after it %s asked %d times until all was current, with %d connections at most", o.name, m.Nodes[i].Name, asked, most)
			if asked > maxRecovery || most > maxAtOnce {
				t.Errorf("%s: %s recovers with a herd: %d requests, %d connections", o.name, m.Nodes[i].Name, asked, most)
			}
		}
		recovery()
		alive()
	}

	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "deny"}))
	m.eventually("what is written after all outages is in force", calls[0].from, calls[0].to, func(out string) bool { return !reached(out) })
}

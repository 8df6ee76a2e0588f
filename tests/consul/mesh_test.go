package consul

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// patience is how long a test waits for what must happen. It is long because the machine may be busy.
const patience = 60 * time.Second

const port = 8080

// programs are built once for all tests of the package.
var programs struct{ nodeproxy, app string }

func TestMain(m *testing.M) {
	os.Exit(build(m))
}

func build(m *testing.M) int {
	if len(netlab.Missing()) > 0 { // every test will say so itself
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "nodeproxy-consul-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs.nodeproxy, programs.app = filepath.Join(dir, "nodeproxy"), filepath.Join(dir, "app")
	for path, args := range map[string][]string{
		programs.nodeproxy: append(raceFlags(), "nodeproxy.io/cmd/nodeproxy"),
		programs.app:       {"nodeproxy.io/tests/e2e/app"},
	} {
		cmd := exec.Command("go", append([]string{"build", "-o", path}, args...)...)
		if path == programs.app { // which runs in containers too, that have nothing else
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", path, err, out)
			return 1
		}
	}
	return m.Run()
}

// mesh is two nodes, each with an agent and a daemon: the first agent is the server. ACLs deny by default.
type mesh struct {
	*meshlab.Mesh
	t      *testing.T
	agents [2]*Agent
	fronts [2]*Front // nil: a daemon asks its agent itself

	withoutACLs bool
}

// newMesh makes one. Other tests run beside it: most of the time each of them waits.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	return newMeshWith(t, Config{})
}

// newMeshAlone is newMesh for a test that measures time, beside which no other may run.
func newMeshAlone(t *testing.T) *mesh {
	t.Helper()
	require(t)
	return makeMesh(t, 2, Config{})
}

// newMeshWith is newMesh with the agents configured as more says.
func newMeshWith(t *testing.T, more Config) *mesh {
	t.Helper()
	return newMeshOf(t, 2, more)
}

// newMeshOf is newMeshWith with agents on the first nodes alone.
func newMeshOf(t *testing.T, agents int, more Config) *mesh {
	t.Helper()
	require(t)
	t.Parallel()
	return makeMesh(t, agents, more)
}

func require(t *testing.T) {
	t.Helper()
	Require(t)
	if testing.Short() {
		t.Skip("slow: end to end")
	}
}

func makeMesh(t *testing.T, agents int, more Config) *mesh {
	t.Helper()
	lab, err := meshlab.New(programs.nodeproxy)
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Mesh: lab, t: t, withoutACLs: strings.Contains(more.HCL, "acl {\n  enabled = false")}
	for _, d := range m.Daemons {
		d.Env = []string{"GORACE=halt_on_error=0 exitcode=66"}
	}
	t.Cleanup(m.finish)
	for i, node := range m.Nodes[:agents] {
		cgroup, err := node.Cgroup.Child("consul")
		m.must(err)
		cfg := Config{Node: node.Name, Namespace: node.Namespace, Cgroup: cgroup, Address: node.IPv4.String(), HCL: cmp.Or(more.HCL, WithACLs), Token: Management, Persist: more.Persist, Open: more.Open, TLS: more.TLS}
		if i > 0 {
			cfg.Join = m.Nodes[0].IPv4.String()
		}
		m.agents[i], err = Start(m.ctx(), m.Lab, cfg)
		m.must(err)
	}
	return m
}

func (m *mesh) finish() {
	for _, d := range m.Daemons {
		if d.Process != nil && strings.Contains(d.Process.Output(), "DATA RACE") {
			m.t.Errorf("the daemon of %s has a data race:\n%s", d.Node.Name, d.Process.Output())
		}
	}
	if m.t.Failed() {
		for i, d := range m.Daemons {
			if d.Process != nil {
				m.t.Logf("output of the daemon of %s:\n%s", d.Node.Name, d.Process.Output())
			}
			if status, err := d.Admin().Status(context.Background()); err == nil {
				m.t.Logf("status of %s: %+v", d.Node.Name, status)
			}
			if m.agents[i] != nil && os.Getenv("CONSUL_LOG") != "" {
				m.t.Logf("output of the agent of %s:\n%s", d.Node.Name, m.agents[i].Process.Output())
			}
		}
	}
	if err := m.Close(); err != nil {
		m.t.Errorf("close the lab: %v", err)
	}
}

// rules are those that the documentation says are enough, for these services of a node.
func rules(t *testing.T, node string, services ...string) string {
	t.Helper()
	return documentedRules(t, "## What the token needs", node, services...)
}

// documentedRules are those of a section: its last block of HCL.
func documentedRules(t *testing.T, heading, node string, services ...string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/consul.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := strings.Split(section, "```hcl\n")
	block, _, found := strings.Cut(blocks[len(blocks)-1], "```")
	if !found {
		t.Fatalf("docs/consul.md has no rules in %q", heading)
	}
	ofWeb := regexp.MustCompile(`service "web(-sidecar-proxy)?" \{\n[^}]*\}\n`)
	each := strings.Join(ofWeb.FindAllString(block, -1), "")
	block = ofWeb.ReplaceAllString(block, "")
	for _, name := range services {
		block += strings.ReplaceAll(each, `"web`, `"`+name)
	}
	return strings.ReplaceAll(block, `"node-1`, `"`+node)
}

// start starts both daemons, each with a token that can do what the documentation says, and waits until all is protected.
func (m *mesh) start(services ...[]string) {
	m.t.Helper()
	for i, d := range m.Daemons {
		secret := ""
		if !m.withoutACLs {
			token, err := m.agents[0].NewToken(m.ctx(), d.Node.Name, rules(m.t, d.Node.Name, services[i]...))
			m.must(err)
			path := m.tokenFile(i)
			m.must(os.WriteFile(path, []byte(token+"\n"), 0o600))
			secret = fmt.Sprintf("  token_file = %q\n", path)
		}
		address := "127.0.0.1:8500"
		if m.fronts[i] != nil {
			address = "unix://" + m.fronts[i].Socket
		}
		d.Source = fmt.Sprintf("source \"consul\" {\n  address    = %q\n%s}\n", address, secret)
		m.must(d.Start(m.ctx()))
	}
	for _, d := range m.Daemons {
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
}

func (m *mesh) tokenFile(node int) string { return filepath.Join(m.Nodes[node].Dir, "token") }

// place makes a workload that serves the test application, registered with its node's agent.
func (m *mesh) place(node int, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].Workload(service)
	m.must(err)
	m.Daemons[node].Enroll(w, service)
	m.must(m.agents[node].Register(m.ctx(), Service(service, service+"-1", w.IPv4.String(), port)))
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf(":%d", port)}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return w
}

func (m *mesh) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// ctx ends with the test, or when patience does.
func (m *mesh) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(m.t.Context(), patience, fmt.Errorf("not within %s", patience))
	m.t.Cleanup(cancel)
	return ctx
}

// vip is the virtual IP of a service as a node knows it, with some port.
func (m *mesh) vip(node int, service string) string {
	m.t.Helper()
	ip, err := m.Daemons[node].Virtual(m.ctx(), service)
	m.must(err)
	m.must(m.Daemons[node].AwaitInstances(m.ctx(), service, 1))
	return netip.AddrPortFrom(ip, 80).String()
}

// dial runs the test application's client and returns its output.
func (m *mesh) dial(w *netlab.Workload, args ...string) string {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: programs.app, Args: append([]string{"dial"}, args...)})
	m.must(err)
	m.must(p.Wait(m.ctx()))
	return p.Output()
}

func reached(out string) bool { return strings.Contains(out, "accept=") }

func TestTwoNodesWithLeastPrivilege(t *testing.T) {
	m := newMesh(t)
	web, batch, api := m.place(0, "web"), m.place(0, "batch"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api"})
	vip := m.vip(0, "api")

	m.eventually("web reaches api", web, vip, reached)
	if out := m.dial(batch, vip, "peer"); reached(out) {
		t.Errorf("batch reaches api: %s", out)
	}
	m.eventually("web reaches api by its own address", web, netip.AddrPortFrom(api.IPv4, port).String(), reached)
	if out := m.dial(batch, netip.AddrPortFrom(api.IPv4, port).String(), "peer"); reached(out) {
		t.Errorf("batch reaches api by its own address: %s", out)
	}
	for i := range m.Daemons {
		status, err := m.Daemons[i].Admin().Status(m.ctx())
		m.must(err)
		if status.Source.Error != "" {
			t.Errorf("%s: the documented rules are not enough: %s", m.Nodes[i].Name, status.Source.Error)
		}
	}

	stream, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"dial", vip, "stream"}})
	m.must(err)
	m.must(stream.WaitOutput(m.ctx(), "a line"))
	written := time.Now()
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "deny"}))
	m.must(stream.Wait(m.ctx()))
	if out := stream.Output(); !strings.Contains(out, "end: reset") {
		t.Errorf("the connection is not reset: %.300s", out)
	}
	t.Logf("from the write of the intention to the end of the connection: %s", time.Since(written))
	if out := m.dial(web, vip, "peer"); reached(out) {
		t.Errorf("web still reaches api: %s", out)
	}
}

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// engine is a container engine on node 2, whose daemon heeds labels of containers.
type engine struct {
	*enginelab.Engine
	m *mesh
}

// contained is a mesh whose containers may be the services of allow.
func contained(t *testing.T, allow ...string) (*mesh, *engine) {
	t.Helper()
	m := newMesh(t)
	netlab.Lacks(t, enginelab.Missing()...)
	lab, err := enginelab.New(m.Lab, m.Nodes[1])
	m.must(err)
	e := &engine{lab, m}
	m.must(e.Start(m.ctx()))
	m.must(e.Import(m.ctx(), "app", m.staticApp()))
	m.Daemons[1].Labels = fmt.Sprintf("  containers {\n    enabled = true\n    allow   = [\"%s\"]\n    socket  = %q\n  }\n", strings.Join(allow, `", "`), e.Socket)
	return m, e
}

// staticApp builds the test application for a root that has nothing else.
func (m *mesh) staticApp() string {
	m.t.Helper()
	program := filepath.Join(m.Dir(), "app")
	build := exec.Command("go", "build", "-o", program, "nodeproxy.io/tests/e2e/app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// run starts a container of that name, labelled as a service, that serves an address, and returns its ID.
func (e *engine) run(name, service, address string, args ...string) string {
	e.m.t.Helper()
	args = append(args, "--name", name, "--label", "nodeproxy.io/service="+service, "app", "/app", "serve", address)
	id, err := e.Run(e.m.ctx(), args...)
	e.m.must(err)
	return id
}

func (e *engine) docker(args ...string) string {
	e.m.t.Helper()
	out, err := e.Docker(e.m.ctx(), args...)
	e.m.must(err)
	return out
}

// dial runs the test application's client in a container.
func (e *engine) dial(container string, args ...string) string {
	e.m.t.Helper()
	return e.docker(append([]string{"exec", container, "/app", "dial"}, args...)...)
}

func (e *engine) reaches(container, to string) {
	e.m.t.Helper()
	if out := e.dial(container, to, "peer"); !strings.Contains(out, "accept=") || !strings.Contains(out, "end: eof") {
		e.m.t.Errorf("container %s does not reach %s: %s", container, to, out)
	}
}

// awaitState waits until node 2's daemon has a container in a state.
func (e *engine) awaitState(id, service, state string) (found admin.Workload) {
	e.m.t.Helper()
	_, err := e.m.Daemons[1].Await(e.m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if w.Cgroup == e.Cgroup(id) && w.Service == service && w.State == state {
				found = w
				return nil
			}
		}
		return fmt.Errorf("container %s is not %s as %q: %+v", id, state, service, s.Workloads)
	})
	e.m.must(err)
	return found
}

func TestAContainerIsReachedAtItsPublishedPort(t *testing.T) {
	m, e := contained(t, "api")
	web := m.place(0, "web")
	m.define(1, "api", port, m.Nodes[1].IPv4)
	m.allow("api", "web")
	m.allow("web", "api")
	id := e.run("api", "api", ":80", "--publish", fmt.Sprintf("%d:80", port))
	m.start()
	m.baselines[1] = nil // containers come and go
	if w := e.awaitState(id, "api", "protected"); w.Name != "container api" || w.Provider != "containers" {
		t.Errorf("enrolled as %+v", w)
	}
	stranger := m.stranger(0)
	capture, err := m.Capture()
	m.must(err)
	for _, to := range []string{m.vip("api"), at(m.Nodes[1].IPv4, port)} {
		out := m.dial(web, to, "peer")
		if !strings.Contains(out, ":80\n") || !strings.Contains(out, "end: eof") {
			t.Errorf("web does not reach the container's port 80 at %s: %s", to, out)
		}
	}
	who := identities(m)
	m.awaitGeneration(1)
	m.reaches(web, m.vip("api"))
	if got := who(); got != "web" {
		t.Errorf("api was called by %q", got)
	}
	traced := m.traced(0)
	e.reaches("api", m.vip("web"))
	c := traced.await("inbound connection", func(c admin.Connection) bool { return c.Event == admin.EventOpen && c.Direction == admin.Inbound })
	if c.Source.Service != "api" {
		t.Errorf("web was called by %q", c.Source.Service)
	}
	noPayload(t, capture, []byte("accept="))
	plaintext := m.denials(1, catalog.ReasonPlaintext)
	m.getsNothing(stranger, "-timeout", "3s", at(m.Nodes[1].IPv4, port))
	m.comesToDenials(1, catalog.ReasonPlaintext, plaintext+1)

	held := m.stream(web, m.vip("api"))
	m.must(e.Stop(m.ctx()))
	_, err = m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, p := range s.Problems {
			if strings.Contains(p.Text, e.Socket) && strings.Contains(p.Text, "see that the engine runs") {
				return nil
			}
		}
		return fmt.Errorf("problems are %+v", s.Problems)
	})
	m.must(err)
	e.awaitState(id, "api", "protected")
	m.reaches(web, m.vip("api"))
	m.goesOn("a connection to a container whose engine is away", held)
	m.must(e.Start(m.ctx()))

	for range 2 {
		e.docker("stop", "--time=0", "api")
		e.awaitState(id, "api", "empty")
		m.getsNothing(web, "-timeout", "3s", m.vip("api"))
		e.docker("start", "api")
		m.comesToReach(web, m.vip("api"))
		m.getsNothing(stranger, "-timeout", "3s", at(m.Nodes[1].IPv4, port))
	}
	e.docker("rm", "--force", "api")
	m.eventually("the container is a workload no more", func() error {
		s, err := m.Daemons[1].Admin().Status(m.ctx())
		if err == nil && len(s.Workloads) > 0 {
			err = fmt.Errorf("workloads are %+v", s.Workloads)
		}
		return err
	})
}

func TestContainersOnABridgeAndInTheNodesNamespace(t *testing.T) {
	m, e := contained(t, "shop", "api", "host")
	web := m.place(0, "web")
	m.allow("api", "shop")
	m.allow("shop", "web")
	m.allow("host", "web")
	api, shop := e.run("api", "api", ":80"), e.run("shop", "shop", ":80")
	host := e.run("host", "host", ":9000", "--network", "host", "--expose", "9000")
	ip := netip.MustParseAddr(e.docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", "api"))
	m.must(m.Define(1, "api", meshlab.Service("api", "api-1", ip.String(), 80, "")))
	m.define(1, "host", 9000, m.Nodes[1].IPv4)
	m.start()
	m.baselines[1] = nil
	for service, id := range map[string]string{"api": api, "shop": shop, "host": host} {
		e.awaitState(id, service, "protected")
	}
	traced := m.traced(1)
	for _, to := range []string{m.vip("api"), at(ip, 80)} {
		e.reaches("shop", to)
		c := traced.await("connection", func(c admin.Connection) bool { return c.Event == admin.EventClose && c.Destination.Service == "api" })
		if c.Source.Service != "shop" {
			t.Errorf("api was called by %q", c.Source.Service)
		}
	}
	if out := e.dial("host", "-timeout", "5s", m.vip("api"), "peer"); strings.Contains(out, "accept=") {
		t.Errorf("a container reaches a service that denies it: %s", out)
	}
	m.reaches(web, m.vip("host"))
	m.reaches(web, at(m.Nodes[1].IPv4, 9000))
	m.getsNothing(m.stranger(0), "-timeout", "3s", at(m.Nodes[1].IPv4, 9000))
	m.getsNothing(m.stranger(1), "-timeout", "3s", at(ip, 80))
}

func TestAContainerThatNamesAServiceItMayNotBeGetsNoCertificate(t *testing.T) {
	m, e := contained(t, "shop")
	m.place(0, "web")
	m.allow("web", "bank", "shop")
	thief := e.run("thief", "bank", ":80", "--publish", fmt.Sprintf("%d:80", port))
	m.start()
	m.baselines = [2]*footprint{}
	m.must(m.Define(1, "bank", meshlab.Service("bank", "bank-1", m.Nodes[1].IPv4.String(), port, "")))
	shop := e.run("shop", "shop", ":80")
	e.awaitState(shop, "shop", "protected") // by then the other was judged
	e.reaches("shop", m.vip("web"))
	status, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, r := range s.Refused {
			if r.Name == "container thief" && strings.Contains(r.Why, `service "bank"`) && strings.Contains(r.Why, "workloads.containers.allow") {
				return nil
			}
		}
		return fmt.Errorf("refused are %+v", s.Refused)
	})
	m.must(err)
	for _, c := range status.Certificates {
		if c.Service == "bank" {
			t.Errorf("a certificate: %+v", c)
		}
	}
	for _, w := range status.Workloads {
		if w.Service == "bank" || w.Cgroup == e.Cgroup(thief) {
			t.Errorf("a workload: %+v", w)
		}
	}
	if out := e.dial("thief", "-timeout", "3s", m.vip("web"), "peer"); strings.Contains(out, "accept=") {
		t.Errorf("it reaches the mesh: %s", out)
	}
}

func TestAContainerOfContainerdIsAWorkload(t *testing.T) {
	m := newMesh(t)
	netlab.Lacks(t, enginelab.Missing()...)
	c, err := enginelab.NewContainerd(m.Lab, m.Nodes[1], m.staticApp())
	m.must(err)
	m.must(c.Start(m.ctx()))
	m.Daemons[1].Labels = fmt.Sprintf("  containers {\n    enabled = true\n    allow   = [\"api\"]\n    engine  = \"containerd\"\n    socket  = %q\n  }\n", c.Socket)
	web := m.place(0, "web")
	ns, ip, _, err := m.Nodes[1].Pod()
	m.must(err)
	m.define(1, "api", port, ip)
	m.allow("api", "web")
	m.must(c.Run(m.ctx(), "api", []string{"--label=nodeproxy.io/service=api", "--with-ns=network:" + ns.Path()}, "serve", ":8080"))
	m.start()
	m.baselines[1] = nil
	m.reaches(web, m.vip("api"))
	m.getsNothing(m.stranger(0), "-timeout", "3s", at(ip, port))
	for _, args := range [][]string{{"tasks", "rm", "--force", "api"}, {"containers", "rm", "api"}} {
		_, err := c.Ctr(m.ctx(), args...)
		m.must(err)
	}
	_, err = m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		if len(s.Workloads) > 0 {
			return fmt.Errorf("workloads are %+v", s.Workloads)
		}
		return nil
	})
	m.must(err)
}

package consul

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/netlab"
)

const (
	minutes = 2 * time.Minute
	// askedAgain is within how long an API server that answers again is asked, as docs/labels.md says, and what
	// other programs of the machine may add.
	askedAgain = 20*time.Second + 10*time.Second
)

// TestMinutesWithoutTheAPIServerAndTheEngineChangeNothing has a node with pods and a container whose engine is gone for minutes, and whose
// API server hangs, goes on, and is gone for the rest of them, while all of them call and are called.
func TestMinutesWithoutTheAPIServerAndTheEngineChangeNothing(t *testing.T) {
	m := newPods(t)
	netlab.Lacks(t, enginelab.Missing()...)
	node, daemon := m.Nodes[1], m.Daemons[1]
	engine, err := enginelab.New(m.Lab, node)
	m.must(err)
	m.must(engine.Start(m.ctx()))
	m.must(engine.Import(m.ctx(), "app", programs.app))
	daemon.Labels += fmt.Sprintf("  containers {\n    enabled = true\n    allow   = [\"api\"]\n    socket  = %q\n  }\n", engine.Socket)

	web := m.web()
	apps := []*netlab.Workload{m.pod("stays", "api"), m.pod("leaves", "api"), m.pod("joins", "api")}
	for _, p := range apps {
		m.serves(p, programs.app, "serve", fmt.Sprintf(":%d", port))
		m.status(p, "True")
	}
	m.do("-n", "shop", "label", "pod", "joins", "nodeproxy.io/mesh-")
	container, err := engine.Run(m.ctx(), "--name", "caller", "--label", "nodeproxy.io/service=api", "app", "/app", "serve", ":9000")
	m.must(err)
	pid, err := engine.Docker(m.ctx(), "inspect", "--format", "{{.State.Pid}}", container)
	m.must(err)
	within := func(c netlab.Command) (*netlab.Process, error) { // the container: its engine will not be there to do it
		c.Args = append([]string{"-c", `echo 0 >"$0/cgroup.procs" && target=$1 && shift && exec nsenter --target "$target" --net "$@"`, engine.Cgroup(container), pid, c.Path}, c.Args...)
		c.Path, c.Namespace = "sh", node.Namespace
		return m.Lab.Start(c)
	}
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
	}
	before := m.protected("container caller", "pod shop/leaves", "pod shop/stays")
	m.eventually("web reaches api", web, m.vip(0, "api"), reached)
	m.eventually("api reaches web", apps[0], m.vip(1, "web"), reached)

	called := m.calling("web", web.Start, m.vip(0, "api"))
	callers := []func(){m.calling("a pod", apps[0].Start, m.vip(1, "web")), m.calling("a container", within, m.vip(1, "web"))}
	const noServer, noEngine = "see that the server runs", "see that the engine runs"
	says := func(s *admin.Status, advice string) bool {
		return slices.ContainsFunc(s.Problems, func(p admin.Problem) bool { return strings.Contains(p.Text, advice) })
	}
	away := func(s *admin.Status) error {
		if !says(s, noServer) || !says(s, noEngine) {
			return fmt.Errorf("problems are %+v", s.Problems)
		}
		return nil
	}
	m.must(m.serving.Signal(syscall.SIGSTOP))
	m.must(engine.Stop(m.ctx()))
	over := time.After(minutes)
	ctx, cancel := context.WithTimeout(t.Context(), minutes)
	defer cancel()
	_, err = daemon.Await(ctx, away)
	m.must(err)
	m.must(m.serving.Signal(syscall.SIGCONT))
	_, err = daemon.Await(m.ctx(), func(s *admin.Status) error {
		if says(s, noServer) {
			return fmt.Errorf("the server goes on, and problems are %+v", s.Problems)
		}
		return nil
	})
	m.must(err)
	m.serving.Kill()
	_, err = daemon.Await(m.ctx(), away)
	m.must(err)
	select {
	case <-over:
	case <-daemon.Process.Done():
		t.Fatal("the daemon has ended")
	}
	other := m.server(apiPort + 1) // of the same cluster, which the daemon does not know
	at := fmt.Sprintf("--server=https://127.0.0.1:%d", apiPort+1)
	m.do(at, "-n", "shop", "label", "pod", "leaves", "nodeproxy.io/mesh-")
	m.do(at, "-n", "shop", "label", "pod", "joins", "nodeproxy.io/mesh=enabled")
	other.Kill()
	status, err := daemon.Await(m.ctx(), away)
	m.must(err)
	if after := identities(status); !slices.Equal(before, after) {
		t.Errorf("after %s the workloads are %v, and before %v", minutes, after, before)
	}
	called()

	m.serving = m.server(apiPort)
	began := time.Now()
	m.protected("container caller", "pod shop/joins", "pod shop/stays")
	took := time.Since(began)
	t.Logf("what changed meanwhile was followed within %s of the return", took)
	if took > askedAgain {
		t.Errorf("what changed meanwhile was followed after %s, and the bound is %s", took, askedAgain)
	}
	m.must(engine.Start(m.ctx()))
	_, err = daemon.Await(m.ctx(), func(s *admin.Status) error {
		if away(s) == nil {
			return fmt.Errorf("problems are %+v", s.Problems)
		}
		for _, p := range s.Problems {
			if strings.Contains(p.Text, "is tried again by itself") {
				return fmt.Errorf("there is still %+v", p)
			}
		}
		return nil
	})
	m.must(err)
	for _, noneFailed := range callers {
		noneFailed()
	}
}

// identities are what a daemon's workloads are, with their number in the kernel.
func identities(s *admin.Status) (all []string) {
	for _, w := range s.Workloads {
		all = append(all, fmt.Sprintf("%s: %s, %s, %d", w.Name, w.Service, w.State, w.ID))
	}
	slices.Sort(all)
	return all
}

// protected waits until these are the workloads of the second node, in order, and api each of them.
func (p *pods) protected(names ...string) (all []string) {
	p.t.Helper()
	_, err := p.Daemons[1].Await(p.ctx(), func(s *admin.Status) error {
		all = identities(s)
		for i, name := range names {
			if len(all) != len(names) || !strings.HasPrefix(all[i], name+": api, protected, ") {
				return fmt.Errorf("workloads are %v; problems are %+v; refused are %+v", all, s.Problems, s.Refused)
			}
		}
		return nil
	})
	p.must(err)
	return all
}

// calling has somebody connect several times a second until the function returned is called: none may have failed.
func (m *mesh) calling(who string, start func(netlab.Command) (*netlab.Process, error), to string) (noneFailed func()) {
	m.t.Helper()
	stdin, stop := io.Pipe()
	p, err := start(netlab.Command{Path: programs.app, Args: []string{"load", "-n", "0", "-c", "1", "-pause", "200ms", to}, Stdin: stdin})
	m.must(err)
	m.t.Cleanup(func() { stop.Close() })
	return func() {
		m.t.Helper()
		m.must(stop.Close())
		m.must(p.Wait(m.ctx()))
		m.t.Logf("%s to %s: %s", who, to, p.Output())
		if !strings.Contains(p.Output(), " failed 0\n") {
			m.t.Errorf("connections of %s failed: %s", who, p.Output())
		}
	}
}

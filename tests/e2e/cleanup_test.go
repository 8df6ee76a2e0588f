package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf/link"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

func TestCleanupRemovesEverythingWithoutDaemonOrConfiguration(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(m *mesh, node int){
		"after an orderly stop": func(m *mesh, node int) { m.stop(node) },
		"after a SIGKILL":       func(m *mesh, node int) { m.kill(node) },
		"after the workloads' cgroups are gone, too": func(m *mesh, node int) {
			m.kill(node)
			m.must(m.Nodes[node].Cgroup.Remove())
		},
		"of a daemon that hung and was killed": func(m *mesh, node int) {
			m.must(m.Daemons[node].Process.Signal(syscall.SIGSTOP))
			out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"cleanup", "--pins", m.Daemons[node].Pins, "--node", m.Nodes[node].Name}})
			if err == nil || !strings.Contains(out, "stop that one first") {
				m.t.Errorf("it removed what a hung daemon may need again, or does not say what to do: %s", out)
			}
			m.kill(node)
		},
		"of a daemon that died while it attached": func(m *mesh, node int) {
			m.kill(node)
			dir := filepath.Join(m.Daemons[node].Pins, m.Nodes[node].Name, fmt.Sprintf("v%d", redirect.MapABI))
			for _, pattern := range []string{"maps/pending", "maps/rules", "cgroups/*/sockops", "namespaces/*"} {
				found, err := filepath.Glob(filepath.Join(dir, pattern))
				m.must(err)
				if len(found) == 0 {
					m.t.Errorf("nothing is pinned at %s", pattern)
				}
				for _, path := range found {
					m.must(os.RemoveAll(path))
				}
			}
		},
		"after the configuration is gone, too": func(m *mesh, node int) {
			m.kill(node)
			m.must(os.RemoveAll(m.Daemons[node].ConfigPath()))
			m.must(os.RemoveAll(m.MeshD))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, web, api := pair(t)
			m.reaches(web, m.vip("api"))
			for node := range m.Daemons {
				end(m, node)
			}
			pins := m.Daemons[0].Pins
			pinned, err := m.Pinned()
			m.must(err)
			if len(pinned) == 0 {
				t.Error("nothing stayed pinned: there is nothing to clean up")
			}
			release := m.hold(pins)
			out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"cleanup", "--pins", pins}, Env: []string{"HOME=/nonexistent"}})
			m.must(err)
			for _, node := range m.Nodes {
				if !strings.Contains(out, node.Name) {
					t.Errorf("it does not say that it removed what is of %s: %s", node.Name, out)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(pins, "*")); len(left) > 0 {
				t.Errorf("pins remain: %v", left)
			}
			if !strings.Contains(name, "cgroups") { // else web is gone, too
				out := m.dial(web, at(api.IPv4, port), "peer")
				if !strings.Contains(out, "accept="+hostPrefix(web.IPv4)) {
					t.Errorf("without nodeproxy web does not reach api directly: %s", out)
				}
			}
			release()
			m.gone(pinned)
			out, err = m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"cleanup", "--pins", pins, "--json"}})
			if err != nil || strings.Join(strings.Fields(out), "") != `{"removed":[]}` {
				t.Errorf("a second time it says %s, %v", out, err)
			}
		})
	}
}

// hold opens every link that is pinned below dir, as another process may have done: they are in force until they are detached.
func (m *mesh) hold(dir string) (release func()) {
	m.t.Helper()
	var links []link.Link
	m.must(filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if l, err := link.LoadPinnedLink(path, nil); err == nil { // else it is a map
			links = append(links, l)
		}
		return nil
	}))
	if len(links) == 0 {
		m.t.Errorf("no link is pinned below %s", dir)
	}
	return func() {
		for _, l := range links {
			m.must(l.Close())
		}
	}
}

func TestCleanupRefusesWhileADaemonRuns(t *testing.T) {
	m, web, _ := pair(t)
	out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"cleanup", "--pins", m.Daemons[0].Pins}})
	if err == nil {
		t.Errorf("it removed what a running daemon needs: %s", out)
	}
	m.reaches(web, m.vip("api"))
}

func TestCleanupOfOneNodeLeavesTheOtherAlone(t *testing.T) {
	m, web, _ := pair(t)
	m.kill(1)
	d := m.Daemons[1]
	_, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"cleanup", "--pins", d.Pins, "--node", d.Node.Name}})
	m.must(err)
	if left, _ := filepath.Glob(filepath.Join(d.Pins, d.Node.Name, "*")); len(left) > 0 {
		t.Errorf("pins of node-2 remain: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(d.Pins, m.Nodes[0].Name, "*")); len(left) == 0 {
		t.Error("the pins of node-1 are gone")
	}
	m.restart(1)
	m.eventually("the mesh works again", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return errNotYet
		}
		return nil
	})
}

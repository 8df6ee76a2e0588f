package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// TestABadMeshFileIsNamedWithItsLineAndTheLastGoodStateServes breaks the mesh directory while the daemons run.
func TestABadMeshFileIsNamedWithItsLineAndTheLastGoodStateServes(t *testing.T) {
	m, web, api := pair(t)
	config := func(name string) string { return filepath.Join(m.MeshD, "config", name) }
	node := func(name string) string { return filepath.Join(m.MeshD, "nodes", "node-2", name) }
	original, err := os.ReadFile(node("api.hcl"))
	m.must(err)
	for name, tc := range map[string]struct {
		path, text string
		want       []string
	}{
		"broken HCL":  {config("broken.hcl"), "Kind = \"service-intentions\"\nName = [\n", []string{"broken.hcl:"}},
		"broken JSON": {config("broken.json"), "{\n  \"Kind\": \"service-intentions\",\n}\n", []string{"broken.json:"}},
		"an unknown key": {config("unknown.hcl"), "Kind = \"service-intentions\"\nName = \"other\"\nSoruces = []\n",
			[]string{"unknown.hcl:3", "Soruces"}},
		"two services on one address": {node("twin.hcl"), meshlab.Service("twin", "twin-1", api.IPv4.String(), port, ""),
			[]string{"twin.hcl:1", at(api.IPv4, port)}},
		"a wrong type":                   {node("type.hcl"), "service {\n  name = \"x\"\n  port = \"many\"\n}\n", []string{"type.hcl:3"}},
		"a file truncated while running": {node("api.hcl"), string(original[:len(original)/2]), []string{"api.hcl:"}},
		"an oversized file": {config("large.hcl"), "# " + strings.Repeat("x", 8<<20) + "\nKind = \"service-defaults\"\nName = \"large\"\n",
			[]string{"large.hcl"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := m.in(t)
			restore := func() error {
				if tc.path == node("api.hcl") {
					return os.WriteFile(tc.path, original, 0o600)
				}
				return os.Remove(tc.path)
			}
			t.Cleanup(func() { _ = restore() })
			named := func(want ...string) {
				t.Helper()
				_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
					for _, text := range want {
						if !strings.Contains(s.Source.Error, text) {
							return fmt.Errorf("the error %q does not name %s", s.Source.Error, text)
						}
					}
					return nil
				})
				m.must(err)
			}
			m.must(os.WriteFile(tc.path, []byte(tc.text), 0o600))
			named(tc.want...)
			// What is good beside it is not applied either. The second error says that the directory was read since.
			m.deny("api", "web")
			second := config("second.hcl")
			t.Cleanup(func() { _ = os.Remove(second) })
			m.must(os.WriteFile(second, []byte("Kind = \n"), 0o600))
			named("second.hcl")
			m.reaches(web, m.vip("api"))
			m.reaches(web, at(api.IPv4, port))
			m.allow("api", "web")
			m.must(os.Remove(second))
			m.must(restore())
			_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
				if s.Source.Error != "" {
					return fmt.Errorf("the error stays: %s", s.Source.Error)
				}
				return nil
			})
			m.must(err)
		})
	}
}

func TestAnIntentionForAnUnknownServiceIsAProblemAndNotAnError(t *testing.T) {
	m, web, _ := pair(t)
	m.allow("nobody-knows-it", "web")
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		for _, p := range s.Problems {
			if strings.Contains(p.Text, "nobody-knows-it") {
				return nil
			}
		}
		return fmt.Errorf("the problems are %v; the source's error is %q", s.Problems, s.Source.Error)
	})
	m.must(err)
	m.reaches(web, m.vip("api"))
}

func TestAnUnreadableCAKeyIsAnErrorThatNamesIt(t *testing.T) {
	m, web, _ := pair(t)
	key := filepath.Join(m.MeshD, "ca", "key.pem")
	text, err := os.ReadFile(key)
	m.must(err)
	m.must(os.WriteFile(key, []byte("not a key\n"), 0o600))
	m.must(m.ConfigEntry("touch", "Kind = \"service-defaults\"\nName = \"api\"\nProtocol = \"tcp\"\n"))
	_, err = m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if !strings.Contains(s.Source.Error, "key.pem") {
			return fmt.Errorf("the error %q does not name key.pem", s.Source.Error)
		}
		return nil
	})
	m.must(err)
	m.reaches(web, m.vip("api"))
	m.must(os.WriteFile(key, text, 0o600))
	_, err = m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if s.Source.Error != "" {
			return fmt.Errorf("the error stays: %s", s.Source.Error)
		}
		return nil
	})
	m.must(err)
}

func TestABadConfigurationIsRefusedWithFileAndLine(t *testing.T) {
	m := newMesh(t)
	d := m.Daemons[0]
	for name, tc := range map[string]struct {
		extra string
		line  int // of extra, at which the error points
		want  string
	}{
		"an unknown key":   {"limits {\n  conections = 5\n}\n", 2, "conections"},
		"a broken block":   {"limits {\n", 1, ""},
		"a wrong duration": {"limits {\n  handshake = \"soon\"\n}\n", 2, "handshake"},
		"a key set twice":  {"node {\n  name = \"again\"\n}\n", 1, "node"},
	} {
		t.Run(name, func(t *testing.T) {
			m := m.in(t)
			d.Extra = tc.extra
			m.must(d.WriteConfig())
			text, err := os.ReadFile(d.ConfigPath())
			m.must(err)
			p, err := m.Lab.Start(netlab.Command{Path: programs.nodeproxy, Args: []string{"run", "--config", d.ConfigPath()}, Namespace: d.Node.Namespace})
			m.must(err)
			if err := p.Wait(m.ctx()); err == nil || p.ExitCode() != 1 {
				t.Fatalf("the daemon ended with %v", err)
			}
			out := p.Output()
			at := fmt.Sprintf("%s:%d", d.ConfigPath(), strings.Count(string(text[:len(text)-len(tc.extra)]), "\n")+tc.line)
			if !strings.Contains(out, at) || !strings.Contains(out, tc.want) {
				t.Errorf("the error does not name %s and %q: %s", at, tc.want, out)
			}
			if strings.Contains(out, "goroutine") {
				t.Errorf("a stack trace: %s", out)
			}
		})
	}
}

package consul

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// rounds is how often every service is taken over from its Envoy and handed back, in each kind of namespace.
const rounds = 20

// mover moves one service between its Envoy and nodeproxy with the commands of docs/migrate.md.
type mover struct {
	*mesh
	node    int
	service string
	app     *netlab.Workload
}

// envoyed makes a service whose program and whose Envoy are in network namespaces and cgroups as place says, the Envoy with
// these upstreams.
func (m *mesh) envoyed(node int, service string, place func(*netlab.Node, string) (*netlab.Workload, error), public int, upstreams ...string) mover {
	m.t.Helper()
	app, err := place(m.Nodes[node], service)
	m.must(err)
	m.register(app, reg(service, app, port, public, upstreams...))
	sidecar := *app
	sidecar.Cgroup, err = m.Nodes[node].Cgroup.Child(service + "-envoy") // as a unit or container of its own has
	m.must(err)
	m.envoy(&sidecar, service+"-1", public+1000)
	p, err := app.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf("127.0.0.1:%d", port)}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return mover{m, node, service, app}
}

// documented runs the commands of a section of docs/migrate.md, which are written for a unit api.service, and waits after each until
// the workload is as then.
func (v mover) documented(section string, then func(step int, s *admin.Status) error) {
	v.t.Helper()
	text, err := os.ReadFile("../../docs/migrate.md")
	v.must(err)
	_, rest, found := strings.Cut(string(text), "## "+section+"\n")
	rest, _, _ = strings.Cut(rest, "\n## ")
	steps := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(rest, -1)
	if !found || len(steps) == 0 {
		v.t.Fatalf("docs/migrate.md has no commands in a section %q", section)
	}
	for i, step := range steps {
		for line := range strings.Lines(step[1]) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "#")
			args := strings.Fields(line)
			if len(args) == 0 || args[0] != "nodeproxy" {
				v.t.Fatalf("docs/migrate.md has a command that is not nodeproxy's: %s", line)
			}
			for j := range args {
				args[j] = strings.NewReplacer("system.slice/api.service", v.app.Cgroup.Path(), "api", v.service).Replace(args[j])
			}
			_, err := v.cli(v.node, append(args[1:], "--socket", v.Daemons[v.node].Socket())...)
			v.must(err)
		}
		v.settled(func(s *admin.Status) error { return then(i, s) })
	}
}

func (v mover) settled(then func(*admin.Status) error) {
	v.t.Helper()
	_, err := v.Daemons[v.node].Await(v.ctx(), then)
	v.must(err)
}

func (v mover) workload(s *admin.Status) (admin.Workload, bool) {
	for _, w := range s.Workloads {
		if w.Cgroup == v.app.Cgroup.Path() {
			return w, true
		}
	}
	return admin.Workload{}, false
}

var modes = []string{"permissive", "strict"} // of the steps to nodeproxy

func (v mover) protected(step int, s *admin.Status) error {
	if w, _ := v.workload(s); w.State != "protected" || w.Mode != modes[step] {
		return fmt.Errorf("%s is %+v and not protected and %s", v.service, w, modes[step])
	}
	return nil
}

func (v mover) left(_ int, s *admin.Status) error {
	if w, enrolled := v.workload(s); enrolled {
		return fmt.Errorf("%s is still %+v", v.service, w)
	}
	return nil
}

// toNodeproxy does what the documented commands do, without a process for each.
func (v mover) toNodeproxy() {
	v.t.Helper()
	for i, mode := range modes {
		v.must(v.Daemons[v.node].Admin().Enroll(v.ctx(), admin.EnrollRequest{Cgroup: v.app.Cgroup.Path(), Service: v.service, Mode: mode}))
		v.settled(func(s *admin.Status) error { return v.protected(i, s) })
	}
}

func (v mover) toEnvoy() {
	v.t.Helper()
	v.must(v.Daemons[v.node].Admin().Unenroll(v.ctx(), admin.EnrollRequest{Cgroup: v.app.Cgroup.Path()}))
	v.settled(func(s *admin.Status) error { return v.left(0, s) })
}

// opened is how many connections a service's nodeproxy has opened in a direction.
func (v mover) opened(direction, label string) int {
	v.t.Helper()
	series := regexp.MustCompile(`nodeproxy_connections_opened_total\{([^}]*)\} ([0-9]+)`)
	sum := 0
	for _, found := range series.FindAllStringSubmatch(v.metrics(v.node), -1) {
		if strings.Contains(found[1], fmt.Sprintf("direction=%q", direction)) && strings.Contains(found[1], fmt.Sprintf("%s=%q", label, v.service)) {
			n, err := strconv.Atoi(found[2])
			v.must(err)
			sum += n
		}
	}
	return sum
}

func TestServicesMoveBetweenEnvoyAndNodeproxy(t *testing.T) {
	t.Parallel()
	for name, place := range map[string]func(*netlab.Node, string) (*netlab.Workload, error){
		"in namespaces of their own": (*netlab.Node).Workload,
		"in the node's namespace":    (*netlab.Node).HostWorkload,
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t)
			api := m.envoyed(1, "api", place, 20080)
			web := m.envoyed(0, "web", place, 20000, "api")
			m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
			m.start([]string{"web"}, []string{"api"})
			way := call{web.app, fmt.Sprintf("127.0.0.1:%d", upstreamPort)}
			m.eventually("Envoy calls Envoy", way.from, way.to, reached)

			const n = 60
			total := 0
			during := func(move func()) {
				t.Helper()
				wait := m.load(n, way)
				move()
				wait()
				total += n
			}
			alive := []func(){m.streams(way)}
			for _, v := range []mover{api, web} {
				during(func() { v.documented("To nodeproxy", v.protected) })
			}
			in, out := api.opened("inbound", "destination_service"), web.opened("outbound", "source_service")
			alive = append(alive, m.streams(way))
			if api.opened("inbound", "destination_service") == in || web.opened("outbound", "source_service") == out {
				t.Error("what nodeproxy has taken over does not go through it")
			}
			if !strings.Contains(web.metrics(0), `path="tunnel"`) {
				t.Error("no tunnel is warm when Envoy comes back")
			}
			for _, v := range []mover{api, web} {
				during(func() { v.documented("Back to Envoy", v.left) })
			}
			for range rounds - 1 {
				for _, move := range []func(){api.toNodeproxy, web.toNodeproxy, api.toEnvoy, web.toEnvoy} {
					during(move)
				}
			}
			in, out = api.opened("inbound", "destination_service"), web.opened("outbound", "source_service")
			m.load(10, way)()
			if api.opened("inbound", "destination_service") != in || web.opened("outbound", "source_service") != out {
				t.Error("what was handed back goes through nodeproxy")
			}
			for _, live := range alive {
				live()
			}
			t.Logf("%d new connections in %d moves; nodeproxy opened %d inbound and %d outbound", total, 4*rounds, in, out)
		})
	}
}

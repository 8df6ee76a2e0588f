package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/handover"
	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// load is a closed loop of new connections.
type load struct {
	*netlab.Process
	atLeast int
	end     func() error
}

// load starts a closed loop of new connections, at least so many, that goes on until noneFailed is called.
func (m *mesh) load(from *netlab.Workload, n, workers int, to string) *load {
	m.t.Helper()
	more, end := io.Pipe()
	c := m.app("load", "-n", strconv.Itoa(n), "-c", strconv.Itoa(workers), "-more", to)
	c.Stdin = more
	p, err := from.Start(c)
	m.must(err)
	m.t.Cleanup(p.Kill)
	m.t.Cleanup(func() { _ = end.Close() })
	return &load{p, n, end.Close}
}

// results ends a load and says how many connections were made, and how many failed.
func (m *mesh) results(l *load) (done, failed int) {
	m.t.Helper()
	m.must(l.end())
	m.must(l.Wait(m.ctx()))
	out := l.Output()
	if _, err := fmt.Sscanf(out[max(0, strings.LastIndex(out, "done")):], "done %d failed %d", &done, &failed); err != nil || done < l.atLeast {
		m.t.Errorf("the load says %q: %v", out, err)
	}
	return done, failed
}

// noneFailed ends a load that has gone on until now.
func (m *mesh) noneFailed(l *load) {
	m.t.Helper()
	if done, failed := m.results(l); failed > 0 {
		m.t.Errorf("%d of %d connections failed: %s", failed, done, l.Output())
	}
}

// awaitConnections waits until a node's daemon has seen so many connections.
func (m *mesh) awaitConnections(node int, n uint64) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.Connections.Opened < n {
			return fmt.Errorf("%d of %d connections were opened", s.Connections.Opened, n)
		}
		return nil
	})
	m.must(err)
}

// replace has the daemon of a node hand over to another process, and returns the one before.
func (m *mesh) replace(node int, cgroup *netlab.Cgroup) (before *netlab.Process) {
	m.t.Helper()
	m.baselines[node] = nil
	before, err := m.Daemons[node].Replace(m.ctx(), cgroup)
	m.must(err)
	return before
}

// drainsLong is for tests in which live connections outlast the daemon that has handed over.
const drainsLong = "limits { drain = \"5m\" }\n"

func TestADaemonHandsOverUnderLoadAndNoNewConnectionFails(t *testing.T) {
	onEveryPath(t, func(t *testing.T, m *mesh, _ admin.Path) {
		const n = 500
		for _, d := range m.Daemons {
			d.Extra = drainsLong
		}
		web, api := m.place(0, "web"), m.place(1, "api")
		m.allow("api", "web")
		m.start()
		live := m.stream(web, m.vip("api"))
		for node, direction := range []string{"outbound", "inbound"} {
			shown := m.traced(node)
			loads := m.load(web, n, 4, m.vip("api"))
			m.awaitConnections(node, 50)
			before := m.replace(node, nil)
			m.noneFailed(loads)
			lines := strings.Count(live.Output(), "a line")
			m.eventually("the live "+direction+" connection goes on through the daemon before", func() error {
				if strings.Count(live.Output(), "a line") < lines+5 {
					return errNotYet
				}
				return nil
			})
			select {
			case <-before.Done():
				t.Errorf("the daemon before did not wait for the live connection: %s", before.Output())
			default:
			}
			shown.await("hand-over", func(c admin.Connection) bool { return c.Event == admin.EventHandover })
			status, err := m.Daemons[node].Admin().Status(m.ctx())
			m.must(err)
			if h := status.Handover; h == nil || h.PID != before.PID() || !h.Draining || h.At.IsZero() {
				t.Errorf("status shows the hand-over from process %d as %+v", before.PID(), h)
			}
			if m.metric(node, "nodeproxy_handover_timestamp_seconds") == 0 || m.metric(node, "nodeproxy_handover_draining") != 1 {
				t.Error("the metrics do not show the hand-over")
			}
			if node == 0 {
				continue
			}
			live.Kill()
			m.must(before.Wait(m.ctx()))
			_, err = m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
				if s.Handover.Draining {
					return errNotYet
				}
				return nil
			})
			m.must(err)
		}
		m.settle(0)
		m.settle(1)
		m.reaches(web, at(api.IPv4, port))
	})
}

// startBlind starts the next daemon of node 1 with a mesh directory that is not there yet: it takes over as far as it can, and
// cannot serve. give gives it the directory.
func (m *mesh) startBlind() (next *netlab.Process, give func()) {
	m.t.Helper()
	d, shared := m.Daemons[0], m.MeshD
	d.MeshD = filepath.Join(m.Dir(), "mesh-of-the-next")
	m.must(d.WriteConfig())
	next, err := d.StartNext(nil)
	m.must(err)
	m.must(next.WaitOutput(m.ctx(), "level=INFO msg=started"))
	return next, func() {
		m.t.Helper()
		aside := d.MeshD + ".new"
		_, err := m.Lab.Run(m.ctx(), netlab.Command{Path: "cp", Args: []string{"-a", shared, aside}})
		m.must(err)
		m.must(os.Rename(aside, d.MeshD))
	}
}

func TestWhenTheNextDaemonDiesInMidHandOverTheOneBeforeGoesOn(t *testing.T) {
	t.Parallel()
	t.Run("killed", func(t *testing.T) { testTheNextDaemonDies(t, (*netlab.Process).Kill) })
	t.Run("stopped", func(t *testing.T) {
		testTheNextDaemonDies(t, func(p *netlab.Process) { _ = p.Signal(syscall.SIGTERM) })
	})
}

func testTheNextDaemonDies(t *testing.T, end func(*netlab.Process)) {
	m, web, api := pair(t)
	const n = 500
	near, err := m.Nodes[0].Workload("near")
	m.must(err)
	loads := m.load(web, n, 4, m.vip("api"))
	m.awaitConnections(0, 50)
	next, _ := m.startBlind()
	m.must(m.Daemons[0].Process.WaitOutput(m.ctx(), "another daemon is taking over"))
	m.reaches(web, m.vip("api"))
	err = m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: near.Cgroup.Path(), Service: "near"})
	if err == nil || !strings.Contains(err.Error(), "taking over: try again") {
		t.Errorf("an enrolment that the next daemon would not learn of is answered by %v", err)
	}
	end(next)
	m.must(m.Daemons[0].Process.WaitOutput(m.ctx(), "this one goes on"))
	m.noneFailed(loads)

	// It follows changes again, and enrols: what the other has changed in the kernel is no obstacle.
	m.must(m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: near.Cgroup.Path(), Service: "near"}))
	m.awaitWorkload(near.Cgroup, "near", "empty")
	live := m.stream(web, m.vip("api"))
	m.deny("api", "web")
	m.must(live.Wait(m.ctx()))
	m.getsNothing(web, m.vip("api"))
	m.allow("api", "web")
	m.eventually("it is allowed again", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})

	m.Daemons[0].MeshD = m.MeshD
	m.must(m.Daemons[0].WriteConfig())
	m.must(m.replace(0, nil).Wait(m.ctx())) // and the next one but one may come
	m.settle(0)
	m.reaches(web, m.vip("api"))
	m.getsNothing(web, at(api.IPv4, port+1))
}

func TestWhenTheDaemonBeforeDiesInMidHandOverTheNextGoesOn(t *testing.T) {
	m, web, _ := pair(t)
	const n = 500
	loads := m.load(web, n, 4, m.vip("api"))
	m.awaitConnections(0, 50)
	next, give := m.startBlind()
	before := m.Daemons[0].Process
	m.must(before.WaitOutput(m.ctx(), "another daemon is taking over"))
	m.baselines[0] = nil
	before.Kill()
	m.must(next.WaitOutput(m.ctx(), "the daemon before has died"))
	waiting, err := web.Start(m.app("dial", m.vip("api"), "peer")) // in the backlog of what both had
	m.must(err)
	m.Daemons[0].Process = next
	give()
	m.settle(0)
	m.must(waiting.Wait(m.ctx()))
	if out := waiting.Output(); !strings.Contains(out, "accept=") {
		t.Errorf("a connection that came while nobody served says %s", out)
	}
	// What the dead one carried is lost, and what came to nobody waited.
	if done, failed := m.results(loads); failed > 4 {
		t.Errorf("%d of %d connections failed, and the dead daemon had four at a time: %s", failed, done, loads.Output())
	}
}

func TestADaemonOfAnotherMapABIOrProtocolIsRefusedByName(t *testing.T) {
	m, web, _ := pair(t)
	d := m.Daemons[0]
	path := filepath.Join(filepath.Dir(d.Socket()), "handover.sock")
	_, err := handover.Begin(path, handover.Self{Version: "9.9.9", MapABI: redirect.MapABI - 1, Node: d.Node.Name, Pins: d.Pins})
	for _, text := range []string{"9.9.9", fmt.Sprintf("v%d", redirect.MapABI), fmt.Sprintf("v%d", redirect.MapABI-1)} {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("the refusal is %v, and does not say %s", err, text)
		}
	}
	m.reaches(web, m.vip("api"))
}

// TestListenersServeInTheNextDaemonsCgroupWhenTheirOwnIsGone is how it is with a DaemonSet's surge: the next daemon runs in a
// cgroup of its own, and the one in which the listeners were made is removed with its pod.
func TestListenersServeInTheNextDaemonsCgroupWhenTheirOwnIsGone(t *testing.T) {
	m := newMesh(t)
	m.Daemons[0].Extra = drainsLong
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	m.start()
	const n = 500
	for _, name := range []string{"second", "third"} {
		live := m.stream(web, m.vip("api"))
		cgroup, err := m.Nodes[0].Cgroup.Child(name)
		m.must(err)
		if out, err := m.probe("ready", cgroup); err == nil || !strings.Contains(out, "this one has not taken over yet") {
			t.Errorf("before the hand-over the next daemon's pod is ready: %v: %s", err, out)
		}
		if out, err := m.probe("live", cgroup); err != nil {
			t.Errorf("before the hand-over the next daemon's pod is dead: %v: %s", err, out)
		}
		loads := m.load(web, n, 4, m.vip("api"))
		m.awaitConnections(0, 20)
		before := m.replace(0, cgroup)
		for _, probe := range []string{"ready", "live"} {
			if out, err := m.probe(probe, cgroup); err != nil {
				t.Errorf("after the hand-over the probe %q fails: %v: %s", probe, err, out)
			}
		}
		m.goesOn("the live connection", live)
		live.Kill()
		m.must(before.Wait(m.ctx()))
		m.must(m.Daemons[0].LeaveCgroup(cgroup))
		m.noneFailed(loads)
		m.settle(0)
		m.reaches(web, m.vip("api"))
	}
}

func TestADaemonThatHangsIsDeadToItsOwnPodAlone(t *testing.T) {
	m, _, _ := pair(t)
	other, err := m.Nodes[0].Cgroup.Child("other")
	m.must(err)
	m.must(m.replace(0, other).Wait(m.ctx()))
	first, err := m.Nodes[0].Cgroup.Child("first")
	m.must(err)
	m.must(m.Daemons[0].Process.Signal(syscall.SIGSTOP))
	if out, err := m.probe("live", first); err != nil {
		t.Errorf("in another cgroup: %v: %s", err, out)
	}
	if out, err := m.probe("live", other); err == nil || !strings.Contains(out, "it hangs") {
		t.Errorf("in its own: %v: %s", err, out)
	}
	m.must(m.Daemons[0].Process.Signal(syscall.SIGCONT))
	m.settle(0)
}

func TestADaemonThatIsStoppedInMidHandOverEndsAlsoWhenTheNextOneDies(t *testing.T) {
	m, web, _ := pair(t)
	next, _ := m.startBlind()
	before := m.Daemons[0].Process
	m.must(before.WaitOutput(m.ctx(), "another daemon is taking over"))
	m.baselines[0] = nil
	m.must(before.Signal(syscall.SIGTERM))
	m.must(before.WaitOutput(m.ctx(), "stopping: live connections"))
	next.Kill()
	m.must(before.Wait(m.ctx()))
	m.getsNothing(web, m.vip("api"))

	m.Daemons[0].MeshD = m.MeshD
	m.must(m.Daemons[0].Start(m.ctx()))
	m.settle(0)
	m.reaches(web, m.vip("api"))
}

func TestTheNextDaemonMayHaveMetricsWhereTheOneBeforeIsInTheWay(t *testing.T) {
	m, _, _ := pair(t)
	m.Daemons[0].Metrics = "0.0.0.0:20210"
	m.must(m.Daemons[0].WriteConfig())
	m.must(m.replace(0, nil).Wait(m.ctx()))
	m.eventually("the next one serves them", func() error {
		if m.metric(0, "nodeproxy_handover_timestamp_seconds") == 0 {
			return errNotYet
		}
		return nil
	})
	m.settle(0)
}

// A provider that has a problem, here no systemd, may be about to claim what the daemon before serves.
func TestAHandOverWaitsShortlyForAProviderThatHasAProblem(t *testing.T) {
	m, web, _ := pair(t)
	m.Daemons[0].Labels = "  systemd {\n    enabled = true\n  }\n"
	m.must(m.Daemons[0].WriteConfig())
	before, began := m.Daemons[0].Process, time.Now()
	m.must(m.replace(0, nil).Wait(m.ctx()))
	if out := before.Output(); !strings.Contains(out, "another daemon has taken over") || time.Since(began) < 5*time.Second {
		t.Errorf("it took %s:\n%s", time.Since(began), out)
	}
	m.settle(0)
	m.reaches(web, m.vip("api"))
}

func TestDirectConnectionsGoOnAndNoneFailsWhileADaemonHandsOver(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(0, "api")
	m.allow("api", "web")
	m.start()
	const n, times = 1000, 3
	live := m.stream(web, m.vip("api"))
	for range times {
		loads := m.load(web, n, 2, m.vip("api"))
		m.awaitGranted(0, 100)
		before := m.replace(0, nil)
		m.noneFailed(loads)
		m.must(before.Wait(m.ctx())) // it carries none of them
	}
	lines := strings.Count(live.Output(), "a line")
	m.eventually("the live connection goes on", func() error {
		if strings.Count(live.Output(), "a line") < lines+5 {
			return errNotYet
		}
		return nil
	})
	m.settle(0)
	proxied := m.metric(0, "nodeproxy_connections_opened_total", `path="tunnel"`) + m.metric(0, "nodeproxy_connections_opened_total", `path="mtls"`)
	if proxied > 0 {
		t.Errorf("%v connections took the proxy: the grants were interrupted", proxied)
	}
	m.deny("api", "web") // the next daemon knows the connection, and ends it
	m.must(live.Wait(m.ctx()))
	m.getsNothing(web, at(api.IPv4, port))
}

// probe asks in a cgroup on node 1, as the kubelet does in that of a pod, how its daemon is.
func (m *mesh) probe(name string, cgroup *netlab.Cgroup) (string, error) {
	return m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{name, "--socket", m.Daemons[0].Socket()}, Cgroup: cgroup})
}

// awaitGranted waits until so many connections of a node went direct.
func (m *mesh) awaitGranted(node int, n uint64) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.Kernel.Counters["granted"] < n {
			return fmt.Errorf("%d of %d connections went direct", s.Kernel.Counters["granted"], n)
		}
		return nil
	})
	m.must(err)
}

func TestNamesOfTheMeshAreAnsweredWhileADaemonHandsOver(t *testing.T) {
	m, web, _, _, _ := dnsPair(t)
	batch, ip := filepath.Join(m.Dir(), "queries"), m.virtual["api"].String()+"\n"
	query := fmt.Sprintf("@%s api.virtual.consul A +short +tries=1 +timeout=10\n", m.Nodes[0].IPv4)
	m.must(os.WriteFile(batch, []byte(strings.Repeat(query, 100_000)), 0o600))
	asking, err := web.Start(netlab.Command{Path: tools(t, "dig")["dig"], Args: []string{"-f", batch}})
	m.must(err)
	m.must(asking.WaitOutput(m.ctx(), ip))
	m.must(m.replace(0, nil).Wait(m.ctx()))
	before := len(asking.Output())
	m.eventually("queries are answered by the next daemon", func() error {
		if len(asking.Output()) < before+10_000 {
			return errNotYet
		}
		return nil
	})
	asking.Kill()
	for line := range strings.Lines(asking.Output()) {
		if line != ip && strings.HasSuffix(line, "\n") {
			t.Errorf("a query is answered by %s", line)
		}
	}
	m.settle(0)
	m.awaitDNS(0, web, "on")
}

func TestQueriesOnTheirWayAreAnsweredByTheDaemonThatHandsOver(t *testing.T) {
	m, web, _, _, _ := dnsPair(t)
	told, tell := io.Pipe()
	defer tell.Close()
	server, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"late", "127.0.0.99:53"}, Namespace: web.Namespace, Stdin: told})
	m.must(err)
	m.must(server.WaitOutput(m.ctx(), "ready udp"))
	m.must(server.WaitOutput(m.ctx(), "ready tcp"))
	next, give := m.startBlind()
	before := m.Daemons[0].Process
	m.must(before.WaitOutput(m.ctx(), "another daemon is taking over"))
	m.baselines[0] = nil
	var asking []*netlab.Process
	for _, network := range []string{"+notcp", "+tcp"} {
		p, err := web.Start(netlab.Command{Path: tools(t, "dig")["dig"], Args: []string{"@127.0.0.99", network, "+short", "+tries=1", "+time=30", "TXT", network[1:] + ".test"}})
		m.must(err)
		asking = append(asking, p)
		m.must(server.WaitOutput(m.ctx(), "heard "+network[1:]))
	}
	give()
	m.must(before.WaitOutput(m.ctx(), "another daemon has taken over"))
	m.Daemons[0].Process = next
	m.must(tell.Close())
	for _, p := range asking {
		if err := p.Wait(m.ctx()); err != nil || p.Output() != "\"late\"\n" {
			t.Errorf("the answer is %q, %v", p.Output(), err)
		}
	}
	m.must(before.Wait(m.ctx()))
	m.settle(0)
}

package e2e

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// neighbours is two workloads of node 1 of which web may connect to api, with api's instances at both its addresses. Node 2 is
// there and has nothing to do.
func sameNode(t *testing.T, config string) (m *mesh, web, api *netlab.Workload) {
	t.Helper()
	m = newMesh(t)
	web, api = m.place(0, "web"), m.place(0, "api")
	m.define(0, "api", port, api.IPv4, api.IPv6)
	m.allow("api", "web")
	m.Daemons[0].Extra = config
	m.start()
	return m, web, api
}

// eachPath runs a test of two neighbours over both paths within a node.
func eachPath(t *testing.T, test func(t *testing.T, m *mesh, web, api *netlab.Workload, path admin.Path)) {
	t.Parallel()
	for path, same := range map[admin.Path]string{admin.PathDirect: "direct", admin.PathMTLS: "mtls"} {
		t.Run(string(path), func(t *testing.T) {
			m, web, api := sameNode(t, fmt.Sprintf("same_node = %q\n", same))
			test(t, m, web, api, path)
		})
	}
}

// outboundOf matches the events of connections from a workload over a path.
func outboundOf(event string, w *netlab.Workload, path admin.Path) func(admin.Connection) bool {
	return func(c admin.Connection) bool {
		return c.Event == event && c.Direction == admin.Outbound && c.Path == path && c.Source.Workload == w.Cgroup.Path()
	}
}

func TestWithinANodeBothPathsShowTheSame(t *testing.T) {
	eachPath(t, func(t *testing.T, m *mesh, web, api *netlab.Workload, path admin.Path) {
		traced := m.traced(0)
		for _, c := range []struct {
			args []string
			from netip.Addr
		}{
			{[]string{m.vip("api")}, web.IPv4},
			{[]string{at(api.IPv4, port)}, web.IPv4},
			{[]string{at(api.IPv6, port)}, web.IPv6},
			{[]string{"-mapped", m.vip("api")}, web.IPv4},
			{[]string{"-nonblocking", m.vip("api")}, web.IPv4},
			{[]string{"-fastopen", m.vip("api")}, web.IPv4},
			{[]string{"-bind", at(web.IPv4, 7501), m.vip("api")}, web.IPv4},
			{[]string{"-bind", "0.0.0.0:7502", m.vip("api")}, web.IPv4},
		} {
			to := c.args[len(c.args)-1]
			out := unmapped(m.dial(web, append(c.args, "peer")...))
			if to == m.vip("api") && strings.Contains(out, "accept="+hostPrefix(web.IPv6)) && path == admin.PathMTLS {
				c.from = web.IPv6 // the proxy took the other instance
			}
			for _, want := range []string{"peer=" + to, "accept=" + hostPrefix(c.from), "getpeername=" + hostPrefix(c.from), "end: eof"} {
				if !strings.Contains(out, want) {
					t.Errorf("%v: no %q in %s", c.args, want, out)
				}
			}
			e := traced.await("close of "+to, outboundOf(admin.EventClose, web, path))
			if e.Verdict != admin.Allowed || e.Destination.Address != to || e.Destination.Service != "api" || e.Destination.Instance == "" ||
				e.Source.Service != "web" || e.Source.Comm != "app" || e.Intention == "" || e.Sent != uint64(len("peer\n")) || e.Received == 0 ||
				e.Duration <= 0 || (e.RTT > 0) != (path == admin.PathDirect) {
				t.Errorf("%v is traced as %+v", c.args, e)
			}
		}
		opened := m.metric(0, "nodeproxy_connections_opened_total", `direction="outbound"`, fmt.Sprintf("path=%q", path))
		if opened != 8 {
			t.Errorf("%v connections are counted, of 8: %s", opened, m.series(0, "nodeproxy_connections_opened_total"))
		}
	})
}

func TestWithinANodeADenyCutsLiveConnectionsAndRefusesNewOnes(t *testing.T) {
	eachPath(t, func(t *testing.T, m *mesh, web, _ *netlab.Workload, path admin.Path) {
		traced := m.traced(0)
		ends := map[string]func() string{
			"download": m.background(web, "a line", m.vip("api"), "stream"),
			"idle":     m.background(web, "held", m.vip("api"), "hold"),
			"upload":   m.background(web, "connected", "-payload", "1000000000000", m.vip("api"), "sum"),
		}
		for range ends { // an application is connected before its connection is allowed
			traced.await("open connection", outboundOf(admin.EventOpen, web, path))
		}
		written := time.Now()
		m.deny("api", "web")
		for name, ended := range ends {
			out := ended()
			if !strings.Contains(out, "end: reset") && !strings.Contains(out, "end: ECONNABORTED") && !strings.Contains(out, "send: ") {
				t.Errorf("%s is not cut: %.200s", name, out)
			}
		}
		t.Logf("all were cut within %v", time.Since(written))
		for range ends {
			c := traced.await("cut connection", outboundOf(admin.EventClose, web, path))
			if c.Verdict != admin.Denied || c.Reason != catalog.ReasonIntention || c.Sequence == 0 || !strings.Contains(c.Intention, "deny") {
				t.Errorf("a cut connection is traced as %+v", c)
			}
		}
		m.getsNothing(web, m.vip("api"))
		m.allow("api", "web")
		m.awaitGeneration(0)
		m.reaches(web, m.vip("api"))
	})
}

func TestWithADeadOrHungDaemonNothingNewIsGrantedAndWhatIsLiveGoesOn(t *testing.T) {
	m, web, api := sameNode(t, "")
	live := m.startDial(web, "a line", m.vip("api"), "stream")
	refusedWithinBound := func(what string) {
		t.Helper()
		began := time.Now()
		m.eventually("connections are refused", func() error {
			for _, to := range []string{m.vip("api"), at(api.IPv4, port), at(api.IPv6, port)} {
				if out := m.dial(web, "-timeout", "1s", to, "peer"); !strings.Contains(out, "refused: ECONNREFUSED") {
					return fmt.Errorf("%w: %s", errNotYet, out)
				}
			}
			return nil
		})
		if took := time.Since(began); took > bound {
			t.Errorf("with a %s daemon connections are refused only after %v", what, took)
		}
		lines := strings.Count(live.Output(), "a line")
		m.eventually("the live connection goes on", func() error {
			if strings.Count(live.Output(), "a line") < lines+5 {
				return errNotYet
			}
			return nil
		})
	}
	m.must(m.Daemons[0].Process.Signal(syscall.SIGSTOP))
	t.Cleanup(func() { _ = m.Daemons[0].Process.Signal(syscall.SIGCONT) })
	refusedWithinBound("hung")
	m.must(m.Daemons[0].Process.Signal(syscall.SIGCONT))
	m.eventually("connections succeed again", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
	m.kill(0)
	refusedWithinBound("dead")

	m.restart(0)
	m.reaches(web, m.vip("api"))
	listed := m.traced(0)
	m.deny("api", "web")
	m.must(live.Wait(m.ctx()))
	if out := live.Output(); !strings.Contains(out, "end: ECONNABORTED") && !strings.Contains(out, "end: reset") {
		t.Errorf("what an earlier daemon granted is not cut: %.200s", out[max(0, len(out)-200):])
	}
	c := listed.await("cut connection", func(c admin.Connection) bool {
		return outboundOf(admin.EventClose, web, admin.PathDirect)(c) && c.Verdict == admin.Denied
	})
	if c.Source.Service != "web" || c.Destination.Service != "api" || c.Duration < time.Second {
		t.Errorf("it is traced as %+v", c)
	}
}

func TestWhatCannotGoDirectTakesTheProxyAndExplainSaysWhy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		prepare func(m *mesh, api *netlab.Workload)
		listen  []string
		config  string
		why     string
	}{
		"an application on 127.0.0.1": {
			listen: []string{"127.0.0.1:8080"}, why: "nothing listens on",
		},
		"an application that is delivered to on loopback, where another listener is": {
			prepare: func(m *mesh, api *netlab.Workload) {
				m.must(m.Define(0, "api", sidecar("api", api.IPv4.String(), port, "local_service_address = \"127.0.0.1\"\nlocal_service_port = 8080")))
				m.serve(api, at(api.IPv4, port))
			},
			listen: []string{"127.0.0.1:8080"}, why: "on loopback alone",
		},
		"source NAT between the workloads": {
			prepare: func(m *mesh, _ *netlab.Workload) {
				_, err := m.Lab.Run(m.ctx(), netlab.Command{
					Path: "/usr/sbin/iptables-nft", Args: strings.Fields("-t nat -A POSTROUTING -p tcp --dport 8080 -j MASQUERADE"), Namespace: m.Nodes[0].Namespace,
				})
				m.must(err)
			},
			listen: []string{":8080"}, why: "translated on the way",
		},
		"MaxInboundConnections": {
			prepare: func(m *mesh, _ *netlab.Workload) {
				m.must(m.ConfigEntry("defaults-api", "Kind = \"service-defaults\"\nName = \"api\"\nMaxInboundConnections = 50\n"))
			},
			listen: []string{":8080"}, why: "MaxInboundConnections",
		},
		"limits.idle": {listen: []string{":8080"}, config: "limits {\n  idle = \"1h\"\n}\n", why: "limits.idle"},
		"same_node":   {listen: []string{":8080"}, config: "same_node = \"mtls\"\n", why: `same_node = "mtls"`},
		"another instance, and no preference": {
			prepare: func(m *mesh, _ *netlab.Workload) {
				other, err := m.Nodes[1].Workload("api")
				m.must(err)
				m.Daemons[1].Enroll(other, "api")
				m.define(1, "api", port, other.IPv4)
				m.serve(other, ":8080")
			},
			listen: []string{":8080"}, config: "prefer_local = false\n", why: "prefer_local is false",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t)
			web := m.place(0, "web")
			api, err := m.Place(0, "api", port)
			m.must(err)
			m.serve(api, c.listen...)
			m.allow("api", "web")
			if c.prepare != nil {
				c.prepare(m, api)
			}
			for _, d := range m.Daemons {
				d.Extra = c.config
			}
			m.start()
			for range 4 {
				m.reaches(web, m.vip("api"))
			}
			if n := m.metric(0, "nodeproxy_connections_opened_total", `path="direct"`); n != 0 {
				t.Errorf("%v connections are direct", n)
			}
			e, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "api")
			m.must(err)
			if e.Path != admin.PathMTLS || !strings.Contains(e.NotDirect, c.why) {
				t.Errorf("explain says %s, %q; want %q", e.Path, e.NotDirect, c.why)
			}
		})
	}
}

func TestALabelOfEitherEndTakesTheProxyWithinANode(t *testing.T) {
	m := newMeshAlone(t)
	m.Daemons[0].Labels = "  xattr {\n    enabled = true\n  }\n"
	ends := make(map[string]*netlab.Workload)
	for _, name := range []string{"web", "api"} {
		w, err := m.Nodes[0].Workload(name)
		m.must(err)
		m.label(w.Cgroup, "service", name)
		m.define(0, name, port, w.IPv4)
		m.serve(w, ":8080")
		ends[name] = w
	}
	m.allow("api", "web")
	m.start()
	path := func(want admin.Path, why string) {
		t.Helper()
		_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
			e, err := m.Daemons[0].Admin().Explain(m.ctx(), "web", "api")
			if err != nil || e.Path != want || !strings.Contains(e.NotDirect, why) || s.SameNode.Settling {
				return fmt.Errorf("the path is %s, because %q: %w", e.Path, e.NotDirect, cmp.Or(err, errNotYet))
			}
			return nil
		})
		m.must(err)
		traced := m.traced(0)
		m.reaches(ends["web"], m.vip("api"))
		if c := traced.await("close", func(c admin.Connection) bool { return c.Event == admin.EventClose && c.Direction == admin.Outbound }); c.Path != want {
			t.Errorf("a connection took the path %s, not %s", c.Path, want)
		}
	}
	for _, name := range []string{"web", "api"} {
		m.awaitWorkload(ends[name].Cgroup, name, "protected")
	}
	path(admin.PathDirect, "")
	for _, name := range []string{"web", "api"} {
		m.label(ends[name].Cgroup, "same-node", "mtls")
		path(admin.PathMTLS, "the label same-node")
		m.label(ends[name].Cgroup, "same-node", "direct")
		path(admin.PathDirect, "")
	}
}

func TestAnApplicationDeliveredToOnLoopbackGoesDirectIfItListensOnEveryAddress(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(0, "api", port)
	m.must(err)
	m.must(m.Define(0, "api", sidecar("api", api.IPv4.String(), port, "local_service_address = \"127.0.0.1\"\nlocal_service_port = 8081")))
	m.serve(api, ":8081")
	m.allow("api", "web")
	m.start()
	traced := m.traced(0)
	m.reaches(web, m.vip("api"))
	if c := traced.await("close", func(c admin.Connection) bool { return c.Event == admin.EventClose && c.Direction == admin.Outbound }); c.Path != admin.PathDirect {
		t.Errorf("the connection took the path %s", c.Path)
	}
}

func TestAnApplicationThatStopsAndStartsIsGrantedAgain(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(0, "api", port)
	m.must(err)
	m.sleeper(api.Cgroup, api.Namespace)
	m.allow("api", "web")
	m.start()
	server := m.serve(api, ":8080")
	m.eventually("connections are direct", func() error {
		m.reaches(web, m.vip("api"))
		if m.metric(0, "nodeproxy_connections_opened_total", `path="direct"`) == 0 {
			return errNotYet
		}
		return nil
	})
	for range 2 {
		server.Kill()
		squatter, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", ":8080"}, Namespace: api.Namespace})
		m.must(err)
		m.must(squatter.WaitOutput(m.ctx(), "ready"))
		m.getsNothing(web, m.vip("api"))
		m.getsNothing(web, at(api.IPv4, port))
		if strings.Contains(squatter.Output(), "accepted") {
			t.Errorf("a stranger on the port of an application that stopped got a connection: %s", squatter.Output())
		}
		squatter.Kill()
		server = m.serve(api, ":8080")
		before := m.metric(0, "nodeproxy_connections_opened_total", `path="direct"`)
		m.eventually("connections are direct again", func() error {
			m.reaches(web, m.vip("api"))
			if m.metric(0, "nodeproxy_connections_opened_total", `path="direct"`) == before {
				return errNotYet
			}
			return nil
		})
	}
	m.settle(0)
}

func TestWorkloadsOfTheNodesNamespaceGoDirectAndTheirOwnServiceToo(t *testing.T) {
	m := newMesh(t)
	api, err := m.Nodes[0].HostWorkload("api")
	m.must(err)
	m.Daemons[0].Enroll(api, "api")
	m.define(0, "api", port, api.IPv4, api.IPv6)
	m.serve(api, ":8080")
	host, err := m.Nodes[0].HostWorkload("host")
	m.must(err)
	m.Daemons[0].Enroll(host, "host")
	m.must(m.Define(0, "host", meshlab.Service("host", "host-1", host.IPv4.String(), 8085, "")))
	m.sleeper(host.Cgroup, host.Namespace)
	denied, err := m.Nodes[0].HostWorkload("denied")
	m.must(err)
	m.Daemons[0].Enroll(denied, "denied")
	m.must(m.Define(0, "denied", meshlab.Service("denied", "denied-1", host.IPv4.String(), 8086, "")))
	m.sleeper(denied.Cgroup, denied.Namespace)
	web := m.place(0, "web")
	m.allow("api", "web", "host", "api")
	m.start()
	traced := m.traced(0)
	for _, w := range []workload{web, host, api} {
		for _, to := range []string{m.vip("api"), at(api.IPv4, port), at(api.IPv6, port)} {
			m.reaches(w, to)
			traced.await("direct connection of "+w.Name+" to "+to, outboundOf(admin.EventClose, w, admin.PathDirect))
		}
	}
	stranger, err := m.Nodes[0].HostWorkload("stranger")
	m.must(err)
	for _, w := range []workload{denied, stranger} {
		for _, to := range []string{at(api.IPv4, port), at(api.IPv6, port), "127.0.0.1:8080"} {
			m.getsNothing(w, "-timeout", "3s", to)
		}
	}
}

func TestTenThousandDirectConnectionsLeaveNothing(t *testing.T) {
	m, web, _ := sameNode(t, "")
	const connections = 10000
	p, err := web.Start(m.app("repeat", "-n", fmt.Sprint(connections), "-at-once", "4", m.vip("api")))
	m.must(err)
	m.eventuallyEnds(p)
	if out := p.Output(); !strings.Contains(out, fmt.Sprintf("answered=%d failed=map[]", connections)) {
		t.Errorf("not all were answered: %s", out)
	}
	m.eventually("all are told of", func() error {
		opened := m.metric(0, "nodeproxy_connections_opened_total", `path="direct"`)
		closed := m.metric(0, "nodeproxy_connections_closed_total", `path="direct"`)
		lost := m.metric(0, "nodeproxy_kernel_events_lost_total")
		if opened != connections || closed != connections || lost != 0 {
			return fmt.Errorf("%v opened, %v closed, %v events lost", opened, closed, lost)
		}
		return nil
	})
	now, err := measure(m.ctx(), m.Daemons[0])
	m.must(err)
	if n := now.entries["granted"]; n != 0 { // not only once the daemon reaps
		t.Errorf("%d connections are still in the map once all are told to be closed", n)
	}
}

// eventuallyEnds waits for a client of many connections.
func (m *mesh) eventuallyEnds(p *netlab.Process) {
	m.t.Helper()
	select {
	case <-p.Done():
	case <-time.After(slowly):
		m.t.Fatalf("not within %s: %s", slowly, p.Output())
	}
}

func TestFlipsOfAnIntentionAgainstDirectConnectionsNeverGoBack(t *testing.T) {
	m, web, _ := sameNode(t, "")
	traced := m.traced(0)
	done, ended := make(chan struct{}), make(chan error, 4)
	for range cap(ended) {
		go func() {
			for {
				select {
				case <-done:
					ended <- nil
					return
				default:
				}
				p, err := web.Start(m.app("dial", m.vip("api"), "peer"))
				if err == nil {
					err = p.Wait(t.Context())
				}
				if err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	for i := range 20 {
		if i%2 == 0 {
			m.deny("api", "web")
			m.awaitGeneration(0)
			m.getsNothing(web, m.vip("api"))
			continue
		}
		m.allow("api", "web")
		m.awaitGeneration(0)
		m.reaches(web, m.vip("api"))
	}
	close(done)
	for range cap(ended) {
		m.must(<-ended)
	}
	m.settleDirect(0)
	m.reaches(web, m.vip("api"))
	var verdicts []admin.Connection
	traced.await("end of events", func(c admin.Connection) bool {
		if c.Sequence > 0 && c.Event != admin.EventClose {
			verdicts = append(verdicts, c)
		}
		return outboundOf(admin.EventClose, web, admin.PathDirect)(c) && len(traced.events) == 0
	})
	slices.SortFunc(verdicts, func(a, b admin.Connection) int { return int(a.Sequence) - int(b.Sequence) })
	for i, c := range verdicts {
		if i > 0 && c.Generation < verdicts[i-1].Generation {
			t.Errorf("verdict %d is of policy %d and follows %d of policy %d", c.Sequence, c.Generation, verdicts[i-1].Sequence, verdicts[i-1].Generation)
		}
	}
}

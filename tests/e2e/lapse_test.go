package e2e

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// lapse is how long a port is watched that must not open: more than two looks of the daemon at its workloads.
const lapse = 2500 * time.Millisecond

// staysClosed asserts that while f runs, and for a while after it, not one of a stranger's connections to any of addresses
// is answered. The stranger tries without a pause: what opens for a moment is seen.
func (m *mesh) staysClosed(when string, stranger *netlab.Workload, addresses []string, f func()) {
	m.t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	var attempts int
	var answers []string
	go func() {
		defer close(done)
		for {
			for _, to := range addresses {
				if answer := ask(stranger.Namespace, to); answer != "" {
					answers = append(answers, to+" says "+answer)
				}
				attempts++
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond): // leave the processor to those who are tested
			}
		}
	}()
	end := func() { close(stop); <-done }
	defer func() { // f may end the test
		if end != nil {
			end()
		}
	}()
	f()
	<-time.After(lapse)
	end()
	end = nil
	if len(answers) > 0 {
		m.t.Errorf("%s: a stranger is answered %d times in %d attempts, first: %s", when, len(answers), attempts, answers[0])
	}
}

// ask connects to the test application from a namespace, in no workload, and returns its answer, "" if there is none.
func ask(ns *netlab.Namespace, address string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", address)
	if err != nil {
		return ""
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return ""
	}
	answer, _ := io.ReadAll(conn) // whatever comes is too much
	return string(answer)
}

// comesToReach waits until a workload reaches an address.
func (m *mesh) comesToReach(w *netlab.Workload, to string) {
	m.t.Helper()
	m.eventually(w.Name+" reaches "+to, func() error {
		if out := m.dial(w, "-timeout", "2s", to, "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
}

// awaitEmpty waits until a node's daemon sees no process in a cgroup.
func (m *mesh) awaitEmpty(node int, cgroup *netlab.Cgroup) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if w.Cgroup == cgroup.Path() && w.Processes == 0 {
				return nil
			}
		}
		return fmt.Errorf("the workloads are %+v", s.Workloads)
	})
	m.must(err)
}

// hostService makes a workload in a node's own network namespace that is enrolled and defined as service.
func (m *mesh) hostService(node int, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].HostWorkload(service)
	m.must(err)
	m.Daemons[node].Enroll(w, service)
	m.define(node, service, port, w.IPv4)
	return w
}

func (m *mesh) stranger(node int) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].HostWorkload("stranger")
	m.must(err)
	return w
}

func TestAStrictPortInTheHostsNamespaceStaysClosedWhileItsApplicationRestarts(t *testing.T) {
	m := newMesh(t)
	web, api, stranger := m.place(0, "web"), m.hostService(1, "api"), m.stranger(1)
	server := m.serve(api, ":8080")
	m.allow("api", "web")
	m.start()
	addresses := []string{"127.0.0.1:8080", at(api.IPv4, port)}
	for range 2 {
		m.staysClosed("while the application restarts", stranger, addresses, func() {
			server.Kill()
			m.awaitEmpty(1, api.Cgroup)
			server = m.serve(api, ":8080")
		})
		m.comesToReach(web, m.vip("api"))
	}
	m.settle(1)
}

func TestAStrictPortInAPrivateNamespaceStaysClosedWhileItsApplicationRestarts(t *testing.T) {
	m := newMesh(t)
	web, stranger := m.place(0, "web"), m.stranger(1)
	api, err := m.Place(1, "api", port)
	m.must(err)
	server := m.serve(api, ":8080")
	m.allow("api", "web")
	m.start()
	m.staysClosed("while the application restarts", stranger, []string{at(api.IPv4, port), at(api.IPv6, port)}, func() {
		server.Kill()
		m.awaitEmpty(1, api.Cgroup)
		<-time.After(2 * lapse) // longer than the daemon keeps the listeners of a namespace that it has no use for
		m.serve(api, ":8080")
	})
	m.comesToReach(web, m.vip("api"))
	m.settle(1)
}

func TestAStrictPortStaysClosedWhenTheRegisteredAddressLeavesTheInterface(t *testing.T) {
	m := newMesh(t)
	api, stranger := m.hostService(1, "api"), m.stranger(1)
	m.serve(api, ":8080")
	m.start()
	m.staysClosed("without the registered address", stranger, []string{"127.0.0.1:8080", "[::1]:8080", at(api.IPv6, port)}, func() {
		m.removeAddress(api.Namespace, netlab.Wire, netip.PrefixFrom(api.IPv4, 24))
	})
	m.must(api.Namespace.Address(netlab.Wire, netip.PrefixFrom(api.IPv4, 24)))
	m.settle(1)
}

func (m *mesh) removeAddress(ns *netlab.Namespace, name string, address netip.Prefix) {
	m.t.Helper()
	m.must(ns.Do(func() error {
		h, err := netlink.NewHandle(netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		defer h.Close()
		dev, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(address.String())
		if err != nil {
			return err
		}
		return h.AddrDel(dev, addr)
	}))
}

// TestStrictPortsStayClosedWhenARestartedDaemonCannotOpenAllNamespaces takes 127.0.0.1, on which the daemon listens, from
// one of two namespaces while no daemon runs.
func TestStrictPortsStayClosedWhenARestartedDaemonCannotOpenAllNamespaces(t *testing.T) {
	m := newMesh(t)
	stranger := m.stranger(1)
	whole, broken := m.place(1, "whole"), m.place(1, "broken")
	addresses := []string{at(whole.IPv4, port), at(broken.IPv4, port), at(broken.IPv6, port)}
	m.start()
	loopback := netip.MustParsePrefix("127.0.0.1/8")
	m.staysClosed("while a daemon that cannot listen in one of them takes over", stranger, addresses, func() {
		m.kill(1)
		m.removeAddress(broken.Namespace, "lo", loopback)
		m.must(m.Daemons[1].Start(m.ctx()))
		_, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
			states := make(map[string]string)
			for _, w := range s.Workloads {
				states[w.Service] = w.State
			}
			if states["whole"] != "protected" || states["broken"] != "unprotected" {
				return fmt.Errorf("the workloads are %v", states)
			}
			return nil
		})
		m.must(err)
	})
	m.staysClosed("while the last of them is opened", stranger, addresses, func() {
		m.must(broken.Namespace.Address("lo", loopback))
		m.settle(1)
	})
}

func TestAStrangerOnLoopbackDoesNotStopDeliveryToTheWorkloadsOwnAddress(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.hostService(1, "api")
	m.serve(api, at(api.IPv4, port))
	m.allow("api", "web")
	m.start()
	m.reaches(web, m.vip("api"))
	const nobody = 65534
	squatter, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", "127.0.0.1:8080"}, Namespace: api.Namespace, UID: nobody})
	m.must(err)
	t.Cleanup(squatter.Kill)
	m.must(squatter.WaitOutput(m.ctx(), "ready"))
	for range 5 {
		m.reaches(web, m.vip("api"))
	}
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("the stranger got a connection: %s", squatter.Output())
	}
}

func TestAnInnerWorkloadOnTheOutersPortGetsNoDeliveryMeantForTheOuter(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	outer, err := m.Place(1, "outer", port)
	m.must(err)
	server := m.serve(outer, ":8080")
	inner := m.child(outer, "inner")
	m.Daemons[1].EnrollCgroup(meshlab.Enrolment{Cgroup: inner, Service: "inner"})
	m.must(m.Define(1, "inner", meshlab.Service("inner", "inner-1", outer.IPv4.String(), 9000, "")))
	m.sleeper(inner, outer.Namespace)
	m.sleeper(outer.Cgroup, outer.Namespace)
	m.allow("outer", "web")
	m.deny("inner", "web")
	m.start()
	m.reaches(web, m.vip("outer"))
	server.Kill()
	squatter, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", ":8080"}, Cgroup: inner, Namespace: outer.Namespace})
	m.must(err)
	t.Cleanup(squatter.Kill)
	m.must(squatter.WaitOutput(m.ctx(), "ready"))
	traced := m.traced(1)
	for range 5 {
		m.getsNothing(web, m.vip("outer"))
		c := traced.await("refused delivery", func(c admin.Connection) bool { return c.Direction == admin.Inbound && c.Verdict == admin.Denied })
		if c.Reason != catalog.ReasonNotTheWorkloads {
			t.Errorf("the reason is %s: %s", c.Reason, c.Detail)
		}
	}
	if strings.Contains(squatter.Output(), "accepted") {
		t.Errorf("the inner workload got a connection that was authorised for the outer: %s", squatter.Output())
	}
}

func TestAStrictWorkloadsPortStaysClosedBesideAPermissiveOneOfItsService(t *testing.T) {
	m := newMesh(t)
	node, stranger := m.Nodes[1], m.stranger(1)
	strict, err := node.HostWorkload("strict")
	m.must(err)
	permissive, err := node.HostWorkload("permissive")
	m.must(err)
	m.Daemons[1].EnrollCgroup(meshlab.Enrolment{Cgroup: strict.Cgroup, Service: "api"})
	m.Daemons[1].EnrollCgroup(meshlab.Enrolment{Cgroup: permissive.Cgroup, Service: "api", Mode: "permissive"})
	m.must(m.Define(1, "api", meshlab.Service("api", "api-1", node.IPv4.String(), 8081, "")+meshlab.Service("api", "api-2", node.IPv4.String(), 8082, "")))
	m.serve(strict, ":8081")
	m.serve(permissive, ":8082")
	m.start()
	for range 12 { // whose rule it is must not depend on the order in which the workloads are looked at
		m.awaitGeneration(1)
		m.getsNothing(stranger, "-timeout", "3s", "127.0.0.1:8081")
		m.reaches(strict, "127.0.0.1:8081")
	}
}

func TestAProcessThatFlipsNetworkNamespacesDoesNotBreakItsWorkload(t *testing.T) {
	m, web, _ := pair(t)
	flipper, err := web.Start(m.app("flip"))
	m.must(err)
	t.Cleanup(flipper.Kill)
	m.must(flipper.WaitOutput(m.ctx(), "ready"))
	for range 25 { // each generation makes the daemon look at its workloads' processes
		m.awaitGeneration(0)
		m.reaches(web, m.vip("api"))
	}
	select {
	case <-flipper.Done():
		t.Errorf("it has ended: %s", flipper.Output())
	default:
	}
	flipper.Kill()
	m.settle(0)
	m.reaches(web, m.vip("api"))
}

func TestACgroupMadeAnewAtTheSamePathIsCapturedAndNoPlaintextLeavesIt(t *testing.T) {
	m := newMesh(t)
	web, err := m.Place(0, "web", port)
	m.must(err)
	server := m.serve(web, ":8080")
	api := m.place(1, "api")
	m.allow("api", "web")
	m.start()
	m.reaches(web, m.vip("api"))
	capture, err := m.Capture()
	m.must(err)
	for range 3 {
		server.Kill()
		m.must(web.Cgroup.Remove())
		web.Cgroup, err = m.Nodes[0].Cgroup.Child("web")
		m.must(err)
		server = m.serve(web, ":8080")
		began := time.Now()
		for _, to := range []string{at(api.IPv4, port), m.vip("api")} {
			m.comesToReach(web, to)
		}
		t.Logf("captured within %v", time.Since(began))
		_, err = m.Daemons[0].AwaitProtected(m.ctx())
		m.must(err)
		for range 5 {
			m.reaches(web, m.vip("api"))
			m.reaches(web, at(api.IPv4, port))
		}
	}
	noPayload(t, capture, []byte("peer\n"))
	m.settle(0)
}

func TestAnApplicationThatEndsConnectionsAtOnceIsNotTakenForAnother(t *testing.T) {
	t.Parallel()
	const connections = 100
	for _, how := range []string{"closes", "resets"} {
		t.Run(how, func(t *testing.T) {
			m := newMesh(t)
			web := m.place(0, "web")
			api, err := m.Place(1, "api", port)
			m.must(err)
			server, err := api.Start(m.app("quick", fmt.Sprintf("-reset=%t", how == "resets")))
			m.must(err)
			m.must(server.WaitOutput(m.ctx(), "ready"))
			m.allow("api", "web")
			m.start()
			traced := m.traced(1)
			for range connections {
				out := m.dial(web, m.vip("api"))
				if how == "closes" && !strings.Contains(out, "accept=bye") {
					t.Errorf("what the application said is lost: %s", out)
				}
			}
			for range connections {
				c := traced.await("end of a connection", func(c admin.Connection) bool {
					return c.Direction == admin.Inbound && c.Event != admin.EventOpen
				})
				if c.Reason == catalog.ReasonNotTheWorkloads || c.Reason == catalog.ReasonPlaintext {
					t.Errorf("a connection is traced as refused for %s: %s", c.Reason, c.Detail)
				}
			}
			for _, reason := range []catalog.Reason{catalog.ReasonNotTheWorkloads, catalog.ReasonPlaintext} {
				if n := m.denials(1, reason); n != 0 {
					t.Errorf("%v connections are counted as refused for %s", n, reason)
				}
			}
		})
	}
}

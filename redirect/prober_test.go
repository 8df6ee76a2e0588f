package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// fromTheNode dials from the namespace that the pods are connected to, where a node's agent is.
func (n *node) fromTheNode(cgroup *netlab.Cgroup, addr string) string {
	n.t.Helper()
	outside := &pod{n: n, netns: n.hub}
	return outside.dialFrom(cgroup, "tcp", addr)
}

func (n *node) cgroup(name string) *netlab.Cgroup {
	n.t.Helper()
	c, err := n.lab.Cgroup().Child(name)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// checked makes a strict pod that serves on ports 8080 and 7070 and has the node for a neighbour, and an agent's cgroup
// that is its prober at 8080.
func (n *node) checked() (server *pod, agent *netlab.Cgroup) {
	n.t.Helper()
	server, agent = n.pod(), n.cgroup("agent")
	if err := n.hub.Address(fmt.Sprintf("pod%d", n.pods), netip.PrefixFrom(server.v4.Prev(), 24)); err != nil {
		n.t.Fatal(err)
	}
	for _, port := range []string{"8080", "7070"} {
		ctx, cancel := context.WithTimeout(n.t.Context(), 2*deadline)
		defer cancel()
		if err := server.app(server.cgroup, "NP_APP=listen", "NP_ADDR=:"+port).WaitOutput(ctx, "listening"); err != nil {
			n.t.Fatal(err)
		}
	}
	target := redirect.ProbeTarget{Addr: netip.AddrPortFrom(server.v4, 8080), Namespace: server.ns.Cookie, Workload: server.id}
	if err := errors.Join(
		n.r.SetRules([]redirect.Rule{{Namespace: server.ns.Cookie, Action: redirect.Strict, Workload: server.id}}),
		n.r.SetProbes([]redirect.ProbeTarget{target}),
		n.r.SetProbers([]string{agent.Path()}),
	); err != nil {
		n.t.Fatal(err)
	}
	return server, agent
}

func TestAProberPassesAStrictPortThatIsChecked(t *testing.T) {
	n := newNode(t)
	server, agent := n.checked()
	checked, other := server.v4.String()+":8080", server.v4.String()+":7070"
	if got := n.fromTheNode(agent, checked); !strings.Contains(got, `got "hello"`) {
		t.Errorf("the prober: %s", got)
	}
	below, err := agent.Child("script")
	if err != nil {
		t.Fatal(err)
	}
	if got := n.fromTheNode(below, checked); !strings.Contains(got, `got "hello"`) {
		t.Errorf("a check's program in a cgroup below the prober's: %s", got)
	}
	if got := n.fromTheNode(agent, other); !strings.Contains(got, "connection refused") {
		t.Errorf("the prober at a port without a check: %s", got)
	}
	if got := n.fromTheNode(n.cgroup("stranger"), checked); !strings.Contains(got, "connection refused") {
		t.Errorf("another process of the node: %s", got)
	}
	counts, err := n.r.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if counts["probed"] != 2 || counts["plaintext_refused"] != 2 {
		t.Errorf("counted %v", counts)
	}
	n.drained()
	if err := n.r.SetProbers(nil); err != nil {
		t.Fatal(err)
	}
	if got := n.fromTheNode(agent, checked); !strings.Contains(got, "connection refused") {
		t.Errorf("what is no prober any more: %s", got)
	}
}

func TestAProbeOfAnotherNamespacesLoopbackAdmitsNothing(t *testing.T) {
	n := newNode(t)
	server, agent := n.checked()
	target := redirect.ProbeTarget{Addr: netip.MustParseAddrPort("127.0.0.1:8080"), Namespace: server.ns.Cookie, Workload: server.id}
	if err := n.r.SetProbes([]redirect.ProbeTarget{target}); err != nil {
		t.Fatal(err)
	}
	ln, err := n.hub.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan string, 1)
	go func() { done <- n.fromTheNode(agent, "127.0.0.1:8080") }()
	conn, err := ln.Accept() // outside any workload: what is announced stays so while conn is open
	if err != nil {
		t.Fatal(err)
	}
	if n, err := n.r.Announced(server.id); err != nil || n != 0 {
		t.Errorf("%d connections are announced, %v", n, err)
	}
	conn.Close()
	<-done
}

func TestAProbeOfAMeshPortIsMarked(t *testing.T) {
	n := newNode(t)
	server, agent := n.checked()
	mesh := netip.AddrPortFrom(server.v4, 21500)
	if err := errors.Join(
		n.r.SetRules([]redirect.Rule{{Namespace: server.ns.Cookie, Addr: mesh.Addr(), Port: mesh.Port(), Action: redirect.Steer, Workload: server.id}}),
		n.r.SetProbes([]redirect.ProbeTarget{{Addr: mesh, Namespace: server.ns.Cookie, Workload: server.id}}),
	); err != nil {
		t.Fatal(err)
	}
	ln := server.ns.Inbound[0]
	for _, c := range []struct {
		who    string
		cgroup *netlab.Cgroup
		want   bool
	}{{"the prober", agent, true}, {"a peer", n.cgroup("peer"), false}} {
		done := make(chan string, 1)
		go func() { done <- n.fromTheNode(c.cgroup, mesh.String()) }()
		conn, err := ln.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		if got := n.r.Probed(conn); got != c.want {
			t.Errorf("%s: probed is %v", c.who, got)
		}
		conn.Close()
		<-done
	}
	n.drained()
}

func TestProbersOutliveTheDaemon(t *testing.T) {
	n := newNode(t)
	server, agent := n.checked()
	gone := n.cgroup("gone")
	if err := n.r.SetProbers([]string{agent.Path(), gone.Path()}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(gone.Remove(), n.r.Close()); err != nil {
		t.Fatal(err)
	}
	checked := server.v4.String() + ":8080"
	if got := n.fromTheNode(agent, checked); !strings.Contains(got, `got "hello"`) {
		t.Errorf("with no daemon: %s", got)
	}
	n.open()
	server.listen()
	if got := n.fromTheNode(agent, checked); !strings.Contains(got, `got "hello"`) {
		t.Errorf("after the take-over: %s", got)
	}
	pins, err := os.ReadDir(filepath.Join(n.r.Dir(), "probers"))
	if err != nil || len(pins) != 1 {
		t.Errorf("%d probers are pinned, want one: %v", len(pins), err)
	}
}

func TestWhoListensIsFoundByAddress(t *testing.T) {
	n := newNode(t)
	cgroup := n.cgroup("listener")
	id, err := cgroup.ID()
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("127.0.0.1:0")
	ln, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	at = netip.MustParseAddrPort(ln.Addr().String())
	ln.Close()
	if got, err := n.r.ListenerCgroup(at); err != nil || got != 0 {
		t.Errorf("nobody listens: cgroup %d, %v", got, err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	app, err := n.lab.Start(netlab.Command{Path: self, Env: []string{"NP_APP=listen", "NP_ADDR=" + at.String()}, Cgroup: cgroup})
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, app, "listening")
	got, err := n.r.ListenerCgroup(at)
	if err != nil || got != id {
		t.Errorf("cgroup %d, %v; want %d", got, err, id)
	}
	if dir, err := redirect.CgroupPath(got); err != nil || dir != cgroup.Path() {
		t.Errorf("cgroup %d is %s, %v; want %s", got, dir, err, cgroup.Path())
	}
	app.Kill()
	if err := cgroup.Remove(); err != nil {
		t.Fatal(err)
	}
	if dir, err := redirect.CgroupPath(got); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a cgroup that is gone: %s, %v", dir, err)
	}
}

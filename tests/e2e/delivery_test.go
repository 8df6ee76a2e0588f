package e2e

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// sidecar is a definition whose sidecar delivers to somewhere of its own choice.
func sidecar(name, address string, port uint16, proxy string) string {
	text := meshlab.Service(name, name+"-1", address, port, "")
	return strings.Replace(text, "sidecar_service {}", "sidecar_service {\n proxy {\n"+proxy+"\n}\n}", 1)
}

// moves changes a definition, and waits until the instance is delivered to somewhere else, or refused there.
func (m *mesh) moves(node int, instance string, define func()) {
	m.t.Helper()
	now := func() (admin.Application, error) {
		all, err := m.Daemons[node].Admin().Applications(m.ctx())
		i := slices.IndexFunc(all, func(a admin.Application) bool { return a.Instance == instance })
		if err != nil || i < 0 {
			return admin.Application{}, fmt.Errorf("%w: instance %s is served by nobody: %+v: %w", errNotYet, instance, all, err)
		}
		return all[i], nil
	}
	before, err := now()
	m.must(err)
	define()
	m.eventually(instance+" is delivered to elsewhere", func() error {
		if after, err := now(); err != nil || after == before {
			return fmt.Errorf("%w: %+v: %w", errNotYet, before, err)
		}
		return nil
	})
}

// TestADeliveryTargetThatIsNotTheWorkloadsIsRefused writes definitions of api that name somebody else's socket.
func TestADeliveryTargetThatIsNotTheWorkloadsIsRefused(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Nodes[1].HostWorkload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	m.serve(api, ":8080")
	m.define(1, "api", port, api.IPv4)
	m.allow("api", "web")
	victim, err := m.Nodes[1].HostWorkload("victim")
	m.must(err)
	foreign := m.serve(victim, "127.0.0.1:9100", at(victim.IPv4, 9100))
	elsewhere, err := m.Nodes[1].Workload("elsewhere")
	m.must(err)
	remote := m.serve(elsewhere, ":9100")
	socket := filepath.Join(m.Dir(), "victim.sock")
	unix, err := m.Nodes[1].HostWorkload("unix")
	m.must(err)
	_, err = unix.Start(netlab.Command{Path: programs.app, Args: []string{"serve", "-unix", socket}})
	m.must(err)
	m.start()
	m.reaches(web, m.vip("api"))
	traced := m.traced(1)

	for name, proxy := range map[string]string{
		"a foreign port on loopback":  "local_service_address = \"127.0.0.1\"\nlocal_service_port = 9100",
		"a foreign port on the node":  fmt.Sprintf("local_service_address = %q\nlocal_service_port = 9100", victim.IPv4),
		"an address of somebody else": fmt.Sprintf("local_service_address = %q\nlocal_service_port = 9100", elsewhere.IPv4),
		"a foreign unix socket":       fmt.Sprintf("local_service_socket_path = %q", socket),
	} {
		t.Run(name, func(t *testing.T) {
			m := m.in(t)
			m.moves(1, "api-1", func() { m.must(m.Define(1, "api", sidecar("api", api.IPv4.String(), port, proxy))) })
			m.getsNothing(web, m.vip("api"))
			c := traced.await("refused delivery", func(c admin.Connection) bool { return c.Verdict == admin.Denied && c.Direction == admin.Inbound })
			if c.Reason != catalog.ReasonNotTheWorkloads {
				t.Errorf("the reason is %s: %s", c.Reason, c.Detail)
			}
		})
	}
	for _, p := range []*netlab.Process{foreign, remote} {
		if strings.Contains(p.Output(), "accepted") {
			t.Errorf("a foreign listener was dialled: %s", p.Output())
		}
	}
	m.moves(1, "api-1", func() { m.define(1, "api", port, api.IPv4) }) // the delivery port of the last definition has a guard of its own
	m.reaches(web, m.vip("api"))
}

func TestASquatterOnTheApplicationsPortGetsNoDelivery(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	app := m.serve(api, ":8080")
	m.allow("api", "web")
	m.start()
	m.reaches(web, m.vip("api"))
	app.Kill()
	traced := m.traced(1)
	idle, err := api.Start(netlab.Command{Path: "sleep", Args: []string{"1000"}}) // the workload lives on without its listener
	m.must(err)
	defer idle.Kill()
	for _, address := range []string{"127.0.0.1:8080", ":8080", at(api.IPv4, port)} {
		squatter, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", address}, Namespace: api.Namespace})
		m.must(err)
		m.must(squatter.WaitOutput(m.ctx(), "ready"))
		m.getsNothing(web, m.vip("api"))
		if strings.Contains(squatter.Output(), "accepted") {
			t.Errorf("a squatter on %s got the connection: %s", address, squatter.Output())
		}
		traced.await("refused delivery", func(c admin.Connection) bool { return c.Reason == catalog.ReasonNotTheWorkloads })
		squatter.Kill()
	}
	idle.Kill()
	m.serve(api, ":8080")
	m.eventually("the application is reached again", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
}

// TestASquatterThatComesBetweenTheCheckAndTheDialGetsNoByte takes the application's port whenever that is free, so that some
// connections are made to the application's listener and accepted by the squatter's.
func TestASquatterThatComesBetweenTheCheckAndTheDialGetsNoByte(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	m.allow("api", "web")
	m.sleeper(api.Cgroup, api.Namespace)
	m.start()
	const address = "127.0.0.1:8080"
	application, err := api.Start(m.app("flicker", address))
	m.must(err)
	t.Cleanup(application.Kill)
	m.must(application.WaitOutput(m.ctx(), "ready"))
	var accepted, heard atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			squatter, err := api.Namespace.Listen("tcp4", address)
			if err != nil {
				continue // the application has it
			}
			_ = squatter.(*net.TCPListener).SetDeadline(time.Now().Add(2 * time.Millisecond))
			if conn, err := squatter.Accept(); err == nil {
				accepted.Add(1)
				_ = conn.SetDeadline(time.Now().Add(patience))
				n, _ := conn.Read(make([]byte, 64))
				heard.Add(int64(n))
				conn.Close()
			}
			squatter.Close()
		}
	}()
	defer func() { close(stop); <-stopped }()
	m.eventually("the squatter accepts some", func() error {
		p, err := web.Start(m.app("repeat", "-n", "50", "-at-once", "2", m.vip("api")))
		m.must(err)
		m.eventuallyEnds(p)
		if n := accepted.Load(); n < 10 {
			return fmt.Errorf("it has accepted %d: %s", n, p.Output())
		}
		return nil
	})
	if n := heard.Load(); n > 0 {
		t.Errorf("of %d connections that a squatter accepted it heard %d bytes", accepted.Load(), n)
	}
}

func TestAUnixSocketOfTheWorkloadIsDeliveredTo(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	socket := filepath.Join(m.Dir(), "api.sock")
	p, err := api.Start(netlab.Command{Path: programs.app, Args: []string{"serve", "-unix", socket}})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	m.must(m.Define(1, "api", sidecar("api", api.IPv4.String(), port, fmt.Sprintf("local_service_socket_path = %q", socket))))
	m.allow("api", "web")
	m.start()
	out := m.dial(web, "-half", "-payload", "100000", m.vip("api"), "sum")
	if !strings.Contains(out, "sum 100000 ") {
		t.Errorf("the answer is %s", out)
	}
}

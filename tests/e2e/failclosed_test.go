package e2e

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// bound is how long after its last sign of life a daemon may count as alive, with room for a busy machine.
const bound = time.Duration(redirect.StaleSeconds)*time.Second + 5*time.Second

// loopbackPorts lists the TCP ports on which somebody listens on loopback in a namespace.
func loopbackPorts(m *mesh, ns *netlab.Namespace) (ports []uint16) {
	m.t.Helper()
	m.must(ns.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/tcp")
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			// proc_pid_net(5): local address in hexadecimal and host order, state 0A is LISTEN
			if len(fields) > 3 && fields[3] == "0A" && strings.HasPrefix(fields[1], "0100007F:") {
				port, _ := strconv.ParseUint(fields[1][len("0100007F:"):], 16, 16)
				ports = append(ports, uint16(port))
			}
		}
		return err
	}))
	return ports
}

// squat listens, as a stranger, on every address that could catch what was meant for ports, and returns what it hears.
func squat(m *mesh, w *netlab.Workload, ports []uint16) *netlab.Process {
	m.t.Helper()
	var addresses []string
	for _, port := range ports {
		addresses = append(addresses, fmt.Sprintf("127.0.0.1:%d", port))
	}
	p, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: append([]string{"serve"}, addresses...), Namespace: w.Namespace})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "ready"))
	return p
}

func TestWithADeadDaemonNothingConnectsAndASquatterHearsNothing(t *testing.T) {
	m, web, api := pair(t)
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	out, in := loopbackPorts(m, web.Namespace), loopbackPorts(m, api.Namespace)
	if len(out) < 2 || len(in) < 2 {
		t.Fatalf("the daemons listen on %v and %v", out, in)
	}
	m.reaches(web, m.vip("api"))
	mesh := m.mesh(0, "api")
	steered, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"serve", mesh}, Namespace: api.Namespace})
	m.must(err) // nobody is bound to a mesh port
	m.must(steered.WaitOutput(m.ctx(), "ready"))
	m.reaches(web, m.vip("api"))
	m.kill(0)
	m.kill(1)
	squatters := []*netlab.Process{squat(m, web, out), squat(m, api, in), steered}
	capture, err := m.Capture()
	m.must(err)
	for _, args := range [][]string{
		{m.vip("api")}, {at(api.IPv4, port)}, {"-nonblocking", m.vip("api")}, {"-mapped", m.vip("api")}, {"-fastopen", m.vip("api")},
	} {
		began := time.Now()
		m.getsNothing(web, args...)
		if took := time.Since(began); took > bound {
			t.Errorf("%v is refused only after %v", args, took)
		}
	}
	m.getsNothing(stranger, "-timeout", "3s", at(api.IPv4, port))
	m.getsNothing(stranger, "-timeout", "3s", mesh)
	for _, p := range squatters {
		if strings.Contains(p.Output(), "accepted") {
			t.Errorf("a squatter got a connection: %s", p.Output())
		}
		p.Kill()
	}
	noPayload(t, capture, []byte("peer\n"))

	m.restart(0)
	m.restart(1)
	m.reaches(web, m.vip("api"))
}

func noPayload(t *testing.T, capture *netlab.Capture, text []byte) {
	t.Helper()
	rec, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, packet := range rec.Packets {
		if bytes.Contains(packet, text) {
			t.Errorf("%q is on the wire", text)
		}
	}
}

func TestAHungDaemonIsGivenUpWithinTheHeartbeatsBound(t *testing.T) {
	m, web, api := pair(t)
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	m.reaches(web, m.vip("api"))
	capture, err := m.Capture()
	m.must(err)
	for _, d := range m.Daemons {
		m.must(d.Process.Signal(syscall.SIGSTOP))
	}
	t.Cleanup(func() {
		for _, d := range m.Daemons {
			_ = d.Process.Signal(syscall.SIGCONT)
		}
	})
	stopped := time.Now()
	m.eventually("connections are refused", func() error {
		out := m.dial(web, "-timeout", "1s", m.vip("api"), "peer")
		if strings.Contains(out, "accept=") {
			t.Errorf("a hung daemon passed a connection: %s", out)
		}
		if !strings.Contains(out, "refused: ECONNREFUSED") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
	if took := time.Since(stopped); took > bound {
		t.Errorf("connections are refused only after %v", took)
	}
	m.getsNothing(stranger, "-timeout", "3s", at(api.IPv4, port))
	noPayload(t, capture, []byte("peer\n"))
	for _, d := range m.Daemons {
		m.must(d.Process.Signal(syscall.SIGCONT))
	}
	m.eventually("connections succeed again", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
}

func TestADaemonThatStopsLetsLiveConnectionsEndAndRefusesNewOnes(t *testing.T) {
	m, web, _ := pair(t)
	p := m.startDial(web, "held", m.vip("api"), "hold")
	d := m.Daemons[0]
	m.baselines[0] = nil
	m.must(d.Process.Signal(syscall.SIGTERM))
	m.eventually("new connections are refused", func() error {
		if out := m.dial(web, "-timeout", "2s", m.vip("api"), "peer"); strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
	select {
	case <-p.Done():
		t.Errorf("the live connection was cut: %s", p.Output())
	case <-d.Process.Done():
		t.Error("the daemon did not wait for the live connection")
	default:
	}
	p.Kill()
	m.must(d.Process.Wait(m.ctx()))
}

func TestWithOnFailureOpenADeadDaemonLetsInstanceAddressesPassAndNoVirtualIP(t *testing.T) {
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.allow("api", "web")
	for _, d := range m.Daemons {
		d.Extra = "on_failure = \"open\"\n"
	}
	m.start()
	m.reaches(web, m.vip("api"))
	m.kill(0)
	m.kill(1)
	m.eventually("the instance is reached in plaintext", func() error {
		if out := m.dial(web, "-timeout", "2s", at(api.IPv4, port), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
	m.getsNothing(web, "-timeout", "3s", m.vip("api"))
}

func TestARestartedDaemonKeepsVirtualIPsAndMeshPorts(t *testing.T) {
	m, web, _ := pair(t)
	addresses := func(s *admin.Status) (all []string) {
		for _, svc := range s.Services {
			all = append(all, svc.Virtual...)
			for _, inst := range svc.Instances {
				all = append(all, inst.Mesh)
			}
		}
		return all
	}
	before, err := m.Daemons[1].Admin().Status(m.ctx())
	m.must(err)
	m.stop(1)
	m.restart(1)
	after, err := m.Daemons[1].Admin().Status(m.ctx())
	m.must(err)
	if was, is := fmt.Sprint(addresses(before)), fmt.Sprint(addresses(after)); was != is {
		t.Errorf("addresses changed from %s to %s", was, is)
	}
	if _, err := netip.ParseAddrPort(m.vip("api")); err != nil {
		t.Error(err)
	}
	m.eventually("web reaches api", func() error {
		if out := m.dial(web, m.vip("api"), "peer"); !strings.Contains(out, "accept=") {
			return fmt.Errorf("%w: %s", errNotYet, out)
		}
		return nil
	})
}

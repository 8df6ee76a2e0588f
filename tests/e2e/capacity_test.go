package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

// The attempts of the workload that takes all it can, and what it may have.
const (
	attempts    = 50000
	processes   = 20 // one may not be allowed so many descriptors
	perWorkload = 2000
)

// TestAWorkloadWithFiftyThousandConnectionsMeetsItsCapAndItsNeighbourDoesNotNotice lets one workload open far more
// connections than its share, while another of the same node calls the same service.
func TestAWorkloadWithFiftyThousandConnectionsMeetsItsCapAndItsNeighbourDoesNotNotice(t *testing.T) {
	for name, place := range neighbours {
		t.Run(name, func(t *testing.T) {
			m, hog, neighbour := crowded(t, place)
			m.floods(hog, m.vip("api"), neighbour, "")
			const source = `source_service="hog"`
			opened, denied := m.decided(source, attempts)
			t.Logf("%v opened, %v denied", opened, denied)
			if opened == 0 {
				t.Errorf("none of %d attempts was opened", attempts)
			}
			// A connection that waits for its handshake has a place. It may wait in vain, and give the place back when all
			// attempts have been refused already. So places may be free now: they are taken, no more at once than need not wait.
			made := attempts
			for i := 0; i < 100 && opened < perWorkload; i++ {
				n := min(perWorkload-int(opened), perWorkload/64)
				made += n
				m.must(m.holds(hog, n, "", m.vip("api")).WaitOutput(m.ctx(), "held="))
				opened, _ = m.decided(source, made)
			}
			m.must(m.holds(hog, 1, "", m.vip("api")).WaitOutput(m.ctx(), "held="))
			if opened, denied = m.decided(source, made+1); opened != perWorkload {
				t.Errorf("with a limit of %d, %v are open", perWorkload, opened)
			}
			capacity := m.metric(0, "nodeproxy_denied_total", source, fmt.Sprintf("reason=%q", catalog.ReasonCapacity))
			if capacity < denied*0.999 {
				t.Errorf("%v were denied, of which %v for capacity:\n%s", denied, capacity, m.series(0, "nodeproxy_denied_total"))
			}
			status, err := m.Daemons[0].Admin().Status(m.ctx())
			m.must(err)
			if status.Connections.Active > perWorkload+10 {
				t.Errorf("%d connections are active, the limit is %d", status.Connections.Active, perWorkload)
			}
		})
	}
}

// TestFiftyThousandUnfinishedHandshakesDoNotLockOutANeighbour lets a workload dial the mesh port itself, as a peer with TLS of
// its own would, and never finish a handshake: half of them say nothing, the others half a hello. The neighbour has the same address.
func TestFiftyThousandUnfinishedHandshakesDoNotLockOutANeighbour(t *testing.T) {
	hello := clientHello(t)
	m, hog, neighbour := crowded(t, neighbours["in the node's namespace"])
	m.floods(hog, m.mesh(0, "api"), neighbour, "", hex.EncodeToString(hello[:len(hello)/2]))
	refused := m.metric(1, "nodeproxy_denied_total", `destination_service="api"`, fmt.Sprintf("reason=%q", catalog.ReasonCapacity))
	t.Logf("%v handshakes were refused for capacity", refused)
	if refused == 0 {
		t.Errorf("no handshake met its cap:\n%s", m.series(1, "nodeproxy_denied_total"))
	}
	if denied := m.metric(0, "nodeproxy_denied_total", `source_service="neighbour"`); denied != 0 {
		t.Errorf("%v of the neighbour's connections were denied:\n%s", denied, m.series(0, "nodeproxy_denied_total"))
	}
}

// neighbours are the ways in which two workloads can live on one node.
var neighbours = map[string]func(m *mesh, service string, port uint16) *netlab.Workload{
	"in a namespace each": func(m *mesh, service string, _ uint16) *netlab.Workload { return m.place(0, service) },
	"in the node's namespace": func(m *mesh, service string, port uint16) *netlab.Workload {
		w, err := m.Nodes[0].HostWorkload(service)
		m.must(err)
		m.Daemons[0].Enroll(w, service)
		m.define(0, service, port, w.IPv4)
		m.serve(w, fmt.Sprintf(":%d", port))
		return w
	},
}

// crowded is a mesh with a hog and its neighbour on node 1, which both call api on node 2.
func crowded(t *testing.T, place func(*mesh, string, uint16) *netlab.Workload) (m *mesh, hog, neighbour *netlab.Workload) {
	m = newMeshAlone(t)
	hog, neighbour = place(m, "hog", 8081), place(m, "neighbour", 8082)
	m.place(1, "api")
	m.allow("api", "hog", "neighbour")
	for _, d := range m.Daemons {
		d.Extra = fmt.Sprintf("limits {\n  connections  = 8000\n  per_workload = %d\n}\n", perWorkload)
	}
	m.must(hog.Namespace.Sysctl("net/ipv4/ip_local_port_range", "1024 65535"))
	m.start()
	return m, hog, neighbour
}

// floods lets hog open its connections, of which each says one of says, and asserts that each call of the neighbour's
// succeeds until they are all decided. What hog holds is held until the test ends.
func (m *mesh) floods(hog *netlab.Workload, to string, neighbour *netlab.Workload, says ...string) {
	m.t.Helper()
	held := make(chan error, processes)
	for i := range processes {
		p := m.holds(hog, attempts/processes, says[i%len(says)], to)
		go func() {
			ctx, cancel := context.WithTimeout(m.t.Context(), slowly)
			defer cancel()
			held <- p.WaitOutput(ctx, "held=")
		}()
	}
	calls := 0
	for open := processes; open > 0 && !m.t.Failed(); calls++ {
		select {
		case err := <-held:
			m.must(err)
			open--
		default:
			m.reaches(neighbour, m.vip("api"))
		}
	}
	m.t.Logf("the neighbour called %d times meanwhile", calls)
	for range 20 {
		m.reaches(neighbour, m.vip("api"))
	}
}

// decided waits until so many attempts of a source are opened or denied by node 1.
func (m *mesh) decided(source string, made int) (opened, denied float64) {
	m.t.Helper()
	m.eventually("every attempt is decided", func() error {
		opened, denied = m.metric(0, "nodeproxy_connections_opened_total", source), m.metric(0, "nodeproxy_denied_total", source)
		if opened+denied != float64(made) {
			return fmt.Errorf("of %d attempts %v were opened and %v denied", made, opened, denied)
		}
		return nil
	})
	return opened, denied
}

// holds starts a process of w that opens n connections and holds them until the test ends.
func (m *mesh) holds(w *netlab.Workload, n int, say, to string) *netlab.Process {
	m.t.Helper()
	stdin, release, err := os.Pipe()
	m.must(err)
	m.t.Cleanup(func() { release.Close(); stdin.Close() })
	p, err := w.Start(netlab.Command{Path: programs.app, Args: []string{"hold", "-n", fmt.Sprint(n), "-say", say, to}, Stdin: stdin})
	m.must(err)
	m.t.Cleanup(p.Kill)
	return p
}

// mesh is the mesh address of a service's only instance, as a node knows it.
func (m *mesh) mesh(node int, service string) string {
	m.t.Helper()
	status, err := m.Daemons[node].Admin().Status(m.ctx())
	m.must(err)
	for _, svc := range status.Services {
		if svc.Name == service && len(svc.Instances) == 1 {
			return svc.Instances[0].Mesh
		}
	}
	m.t.Fatalf("%s has not one instance: %+v", service, status.Services)
	return ""
}

// clientHello is what a TLS client sends first.
func clientHello(t *testing.T) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(near, &tls.Config{InsecureSkipVerify: true}).Handshake() // it fails when far is closed
	}()
	defer func() { near.Close(); <-done }()
	first := make([]byte, 1<<14)
	n, err := far.Read(first)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(first[:n])
}

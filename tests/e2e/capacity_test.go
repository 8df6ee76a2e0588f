package e2e

import (
	"context"
	"fmt"
	"os"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

// TestAWorkloadWithFiftyThousandConnectionsMeetsItsCapAndItsNeighbourDoesNotNotice lets one workload open far more
// connections than its share, while another of the same node calls the same service.
func TestAWorkloadWithFiftyThousandConnectionsMeetsItsCapAndItsNeighbourDoesNotNotice(t *testing.T) {
	const attempts, processes, limit = 50000, 20, 2000
	m := newMesh(t)
	hog, neighbour := m.place(0, "hog"), m.place(0, "neighbour")
	m.place(1, "api")
	m.allow("api", "hog", "neighbour")
	for _, d := range m.Daemons {
		d.Extra = fmt.Sprintf("limits {\n  connections  = 10000\n  per_workload = %d\n}\n", limit)
	}
	m.must(hog.Namespace.Sysctl("net/ipv4/ip_local_port_range", "1024 65535"))
	m.start()
	stdin, release, err := os.Pipe()
	m.must(err)
	defer stdin.Close()
	held := make(chan error, processes)
	for range processes { // a process may not be allowed so many descriptors
		p, err := hog.Start(netlab.Command{Path: programs.app, Args: []string{"hold", "-n", fmt.Sprint(attempts / processes), m.vip("api")}, Stdin: stdin})
		m.must(err)
		t.Cleanup(p.Kill)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), slowly)
			defer cancel()
			held <- p.WaitOutput(ctx, "held=")
		}()
	}
	calls := 0
	for open := processes; open > 0 && !t.Failed(); calls++ {
		select {
		case err := <-held:
			m.must(err)
			open--
		default:
			m.reaches(neighbour, m.vip("api"))
		}
	}
	t.Logf("the neighbour called %d times meanwhile", calls)
	for range 20 {
		m.reaches(neighbour, m.vip("api"))
	}
	// What the hog opens faster than the other node takes handshakes fails there; the rest meets the cap here.
	const source = `source_service="hog"`
	opened, denied := m.metric(0, "nodeproxy_connections_opened_total", source), m.metric(0, "nodeproxy_denied_total", source)
	capacity := m.metric(0, "nodeproxy_denied_total", source, fmt.Sprintf("reason=%q", catalog.ReasonCapacity))
	if opened != limit || opened+denied < attempts*0.99 || capacity < attempts/2 {
		t.Errorf("of %d attempts with a limit of %d, %v were opened and %v denied, of which %v for capacity:\n%s", attempts, limit, opened, denied, capacity, m.series(0, "nodeproxy_denied_total"))
	}
	status, err := m.Daemons[0].Admin().Status(m.ctx())
	m.must(err)
	if status.Connections.Active > limit+10 {
		t.Errorf("%d connections are active, the limit is %d", status.Connections.Active, limit)
	}
	m.must(release.Close())
}

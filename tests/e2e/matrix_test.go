package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// TestEveryFamilyAndNodeIsCapturedWhenInTheMeshAndUntouchedWhenNot dials from an enrolled workload to services of the mesh
// and to servers outside it, on the same node and the other, by IPv4, IPv6 and v4-mapped addresses.
func TestEveryFamilyAndNodeIsCapturedWhenInTheMeshAndUntouchedWhenNot(t *testing.T) {
	onEveryPath(t, testEveryFamilyAndNode)
}

func testEveryFamilyAndNode(t *testing.T, m *mesh, between admin.Path) {
	web := m.place(0, "web")
	targets := make(map[string]*netlab.Workload)
	for node, place := range []string{"same node", "other node"} {
		service := fmt.Sprintf("api%d", node+1)
		w := m.place(node, service)
		m.define(node, service, port, w.IPv4, w.IPv6)
		m.allow(service, "web")
		targets[place+", captured"] = w
		plain, err := m.Nodes[node].Workload(fmt.Sprintf("plain%d", node+1))
		m.must(err)
		m.serve(plain, fmt.Sprintf(":%d", port))
		targets[place+", not captured"] = plain
	}
	m.start()
	traced := m.traced(0)
	for name, target := range targets {
		for _, family := range []struct {
			name  string
			to    netip.Addr
			from  netip.Addr
			flags []string
		}{
			{"IPv4", target.IPv4, web.IPv4, nil},
			{"IPv6", target.IPv6, web.IPv6, nil},
			{"v4-mapped", target.IPv4, web.IPv4, []string{"-mapped"}},
		} {
			t.Run(name+", "+family.name, func(t *testing.T) {
				m := m.in(t)
				to := at(family.to, port)
				out := m.dial(web, append(family.flags, to, "peer")...)
				for _, want := range []string{
					"peer=" + to, "accept=" + hostPrefix(family.from), "getpeername=" + hostPrefix(family.from), "end: eof",
				} {
					if !strings.Contains(unmapped(out), want) {
						t.Errorf("the exchange does not show %q: %s", want, out)
					}
				}
				if !strings.HasSuffix(name, ", captured") {
					return
				}
				want := between
				if strings.HasPrefix(name, "same node") {
					want = admin.PathDirect
					if m.agents != nil && family.to.Is6() { // Consul's default is a delivery to 127.0.0.1, of another family
						want = admin.PathMTLS
					}
				}
				traced.await("closed connection to "+to, func(c admin.Connection) bool {
					return c.Event == "close" && c.Destination.Address == to && c.Path == want && c.Direction == admin.Outbound && c.Verdict == admin.Allowed
				})
			})
		}
	}
	if rejected := m.metric(1, "nodeproxy_source_address_rejected_total"); rejected != 0 {
		t.Errorf("node 2 did not believe node 1 in %v of its clients' addresses", rejected)
	}
	if opened := m.metric(0, "nodeproxy_connections_opened_total", `direction="outbound"`); opened != 6 {
		t.Errorf("node 1 opened %v outbound connections, 6 were to the mesh", opened)
	}
}

// hostPrefix is ip as it begins an ip:port.
func hostPrefix(ip netip.Addr) string {
	return strings.TrimSuffix(netip.AddrPortFrom(ip, 0).String(), "0")
}

var v4Mapped = regexp.MustCompile(`\[::ffff:([0-9.]+)\]:`)

// unmapped shows IPv4 addresses in their own form.
func unmapped(text string) string {
	return v4Mapped.ReplaceAllString(text, "$1:")
}

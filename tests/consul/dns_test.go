package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

// dig asks a name server and returns the data of the answers, one a line.
func (m *mesh) dig(w *netlab.Workload, args ...string) string {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: "dig", Args: append([]string{"+short", "+tries=1", "+time=5"}, args...)})
	m.must(err)
	_ = p.Wait(m.ctx()) // it fails where there is no answer
	return strings.TrimSpace(p.Output())
}

func TestNamesAreAnsweredFromConsulAsConsulDoes(t *testing.T) {
	if _, err := exec.LookPath("dig"); err != nil {
		netlab.Lacks(t, "dig (apt-get install bind9-dnsutils)")
	}
	m := newMesh(t)
	web, api := m.place(0, "web"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.Daemons[0].Extra = "dns {\n  enabled = true\n}\n"
	m.start([]string{"web"}, []string{"api"})
	vip := netip.MustParseAddrPort(m.vip(0, "api")).Addr().String()
	m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/agent/token/default", map[string]string{"Token": Management}, nil))
	shell, err := m.Nodes[0].HostWorkload("shell")
	m.must(err)
	for _, q := range []struct{ name, qtype, want string }{
		{"api.virtual.consul", "A", vip},
		{"api.service.consul", "A", api.IPv4.String()},
		{"api.service.dc1.consul", "A", api.IPv4.String()},
		{"api.service.consul", "AAAA", ""},
		{"_api._tcp.service.consul", "SRV", fmt.Sprintf("1 1 %d %x.addr.dc1.consul.", port, api.IPv4.AsSlice())},
		{fmt.Sprintf("%x.addr.dc1.consul", api.IPv4.AsSlice()), "A", api.IPv4.String()},
	} {
		ours, theirs := "", ""
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			ours = m.dig(web, "@192.0.2.99", q.name, q.qtype) // where nobody is
			theirs = m.dig(shell, "@127.0.0.1", "-p", "8600", q.name, q.qtype)
			if ours == q.want && theirs == q.want {
				break
			}
		}
		if ours != q.want || theirs != q.want {
			t.Errorf("%s %s: ours is %q, Consul's %q, want %q", q.name, q.qtype, ours, theirs, q.want)
		}
	}
}

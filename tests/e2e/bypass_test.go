package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"nodeproxy.io/tests/netlab"
)

func TestAServiceReachesItselfByVirtualIPAndByItsOwnAddress(t *testing.T) {
	m := newMesh(t)
	api := m.place(1, "api")
	m.define(1, "api", port, api.IPv4, api.IPv6)
	m.allow("api", "api")
	m.start()
	for _, to := range []string{m.vip("api"), at(api.IPv4, port), at(api.IPv6, port)} {
		m.reaches(api, to)
	}
}

func TestLoopbackUDPAndForeignDestinationsAreUntouched(t *testing.T) {
	m, web, api := pair(t)
	plain, err := m.Nodes[1].Workload("plain")
	m.must(err)
	m.serve(plain, ":8080")
	answering, err := api.Start(netlab.Command{Path: programs.app, Args: []string{"udp", ":8080"}})
	m.must(err)
	m.must(answering.WaitOutput(m.ctx(), "ready"))

	for name, tc := range map[string]struct {
		to   string
		from string
	}{
		"127.0.0.1":               {"127.0.0.1:8080", "accept=127.0.0.1:"},
		"::1":                     {"[::1]:8080", "accept=[::1]:"},
		"a destination elsewhere": {at(plain.IPv4, port), "accept=" + hostPrefix(web.IPv4)},
		"elsewhere by IPv6":       {at(plain.IPv6, port), "accept=" + hostPrefix(web.IPv6)},
	} {
		if out := unmapped(m.dial(web, tc.to, "peer")); !strings.Contains(out, tc.from) {
			t.Errorf("%s: the server does not print %q: %s", name, tc.from, out)
		}
	}
	p, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"udp", at(api.IPv4, port), "question"}})
	m.must(err)
	m.must(p.Wait(m.ctx()))
	if !strings.Contains(p.Output(), "answer heard question from "+at(api.IPv4, port)) {
		t.Errorf("UDP: %s", p.Output())
	}
	if n := m.metric(1, "nodeproxy_unprotected_udp_total"); n == 0 {
		t.Error("the datagram to a workload's port is not counted")
	}
	if n := m.metric(0, "nodeproxy_connections_opened_total"); n != 0 {
		t.Errorf("node 1 proxied %v connections, and none was to the mesh", n)
	}
}

func TestACgroupThatIsNotEnrolledRunsNoProgramOfOurs(t *testing.T) {
	m, web, _ := pair(t)
	plain, err := m.Nodes[0].HostWorkload("plain")
	m.must(err)
	if n := effective(t, web.Cgroup.Path()); n == 0 {
		t.Error("an enrolled cgroup has no program: the test cannot see them")
	}
	for _, path := range []string{plain.Cgroup.Path(), m.Nodes[0].Cgroup.Path(), m.Cgroup().Path()} {
		if n := effective(t, path); n != 0 {
			t.Errorf("%d programs run for %s, which is not enrolled", n, path)
		}
	}
}

// effective counts the programs that run for the sockets of a cgroup, its ancestors' included.
func effective(t *testing.T, path string) (n int) {
	t.Helper()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, attach := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCgroupInet4GetPeername,
		ebpf.AttachCgroupInet6GetPeername, ebpf.AttachCGroupSockOps,
		ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
	} {
		const effectiveFlag = 1 // BPF_F_QUERY_EFFECTIVE
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attach, QueryFlags: effectiveFlag})
		if err != nil {
			t.Fatal(err)
		}
		n += len(result.Programs)
	}
	return n
}

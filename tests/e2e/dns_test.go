package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// otherIP is what the name server answers for other.test.
const otherIP = "203.0.113.7"

// enableDNS enables it on a node whose daemon is not running yet.
func (m *mesh) enableDNS(node int) { m.Daemons[node].Extra += "dns {\n  enabled = true\n}\n" }

// nameServer runs dnsmasq on addresses of a namespace, until the test ends. It knows other.test, and big.test, whose TXT
// record does not fit 512 bytes, and that there is nothing below consul. Its log names the clients.
func (m *mesh) nameServer(ns *netlab.Namespace, addresses ...netip.Addr) *netlab.Process {
	m.t.Helper()
	args := []string{"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
		"--log-queries", "--log-facility=-", "--bind-interfaces", "--host-record=other.test," + otherIP, "--local=/consul/", "--local=/test/",
		"--txt-record=big.test" + strings.Repeat(`,"`+strings.Repeat("x", 200)+`"`, 5)}
	for _, a := range addresses {
		args = append(args, "--listen-address="+a.String())
	}
	p, err := m.Lab.Start(netlab.Command{Path: tools(m.t, "dnsmasq")["dnsmasq"], Args: args, Namespace: ns})
	m.must(err)
	m.must(p.WaitOutput(m.ctx(), "started"))
	return p
}

// withResolvConf wraps a command so that it finds these lines in /etc/resolv.conf.
func (m *mesh) withResolvConf(lines string, args ...string) netlab.Command {
	m.t.Helper()
	f, err := os.CreateTemp(m.Dir(), "resolv.conf")
	m.must(err)
	_, err = f.WriteString(lines)
	m.must(err)
	m.must(f.Close())
	const script = `mount --bind "$0" /etc/resolv.conf && exec "$@"`
	return netlab.Command{Path: "unshare", Args: append([]string{"-m", "sh", "-c", script, f.Name()}, args...)}
}

// resolver is a way in which applications turn a name into addresses: a command that is completed by the name.
type resolver struct {
	name    string
	command []string
}

// resolvers compiles what has to be.
func (m *mesh) resolvers() []resolver {
	m.t.Helper()
	tool := tools(m.t, "getent", "gcc", "musl-gcc")
	compile := func(out string, compiler string, args ...string) string {
		m.t.Helper()
		path := filepath.Join(m.Dir(), out)
		cmd := exec.Command(compiler, append([]string{"-O1", "-Wall", "-Werror", "-o", path, "testdata/resolve.c"}, args...)...)
		if text, err := cmd.CombinedOutput(); err != nil {
			m.t.Fatalf("%s: %v\n%s", cmd, err, text)
		}
		return path
	}
	return []resolver{
		{"glibc", []string{tool["getent"], "ahosts"}},
		{"musl", []string{compile("resolve-musl", tool["musl-gcc"], "-static")}},
		{"c-ares", []string{compile("resolve-cares", tool["gcc"], "-DCARES", "-lcares")}},
		{"Go", []string{programs.app, "resolve"}},
	}
}

// lookUp runs a resolver in a workload and returns what it prints, without an error when the name is unknown.
func (m *mesh) lookUp(w *netlab.Workload, r resolver, conf, name string) string {
	m.t.Helper()
	p, err := w.Start(m.withResolvConf(conf, append(slices.Clone(r.command), name)...))
	m.must(err)
	_ = p.Wait(m.ctx())
	return p.Output()
}

// finds asserts that a resolver finds an address of a name, and nothing else.
func (m *mesh) finds(w *netlab.Workload, r resolver, conf, name, address string) {
	m.t.Helper()
	out := m.lookUp(w, r, conf, name)
	found := false
	for line := range strings.Lines(out) {
		fields := strings.Fields(strings.TrimPrefix(line, "address "))
		if len(fields) == 0 {
			continue
		}
		if fields[0] != address {
			m.t.Errorf("%s finds %s for %s, not %s:\n%s", r.name, fields[0], name, address, out)
			return
		}
		found = true
	}
	if !found {
		m.t.Errorf("%s does not find %s", r.name, name)
	}
}

// dig runs dig in a workload.
func (m *mesh) dig(w *netlab.Workload, args ...string) string {
	m.t.Helper()
	p, err := w.Start(netlab.Command{Path: tools(m.t, "dig")["dig"], Args: args})
	m.must(err)
	_ = p.Wait(m.ctx())
	return p.Output()
}

// awaitDNS waits until the DNS of a node's workload is as state says, or begins so.
func (m *mesh) awaitDNS(node int, w *netlab.Workload, state string) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		for _, found := range s.Workloads {
			if found.Cgroup == w.Cgroup.Path() {
				if !strings.HasPrefix(found.DNS, state) || state == "" && found.DNS != "" {
					return fmt.Errorf("its DNS is %q", found.DNS)
				}
				return nil
			}
		}
		return fmt.Errorf("no workload %s", w.Cgroup.Path())
	})
	m.must(err)
}

// dnsPair is pair with DNS on node 1, a name server on each address of both nodes, and what define adds. conf is for web.
func dnsPair(t *testing.T, define ...func(m *mesh)) (m *mesh, web, api *netlab.Workload, servers [2]*netlab.Process, conf string) {
	t.Helper()
	m = newMesh(t)
	web, api = m.place(0, "web"), m.place(1, "api")
	m.allow("api", "web")
	m.enableDNS(0)
	for i, n := range m.Nodes {
		servers[i] = m.nameServer(n.Namespace, n.IPv4, n.IPv6)
	}
	for _, f := range define {
		f(m)
	}
	m.start()
	m.awaitDNS(0, web, "on")
	return m, web, api, servers, fmt.Sprintf("nameserver %s\n", m.Nodes[0].IPv4)
}

func TestEveryResolverFindsTheNamesOfTheMesh(t *testing.T) {
	m, web, api, servers, conf := dnsPair(t)
	m.nameServer(web.Namespace, netip.MustParseAddr("127.0.0.53"))
	vip := m.virtual["api"].String()
	for _, r := range m.resolvers() {
		t.Run(r.name, func(t *testing.T) {
			m := m.in(t)
			for name, conf := range map[string]string{
				"a name server of the network": conf,
				"by IPv6":                      fmt.Sprintf("nameserver %s\n", m.Nodes[0].IPv6),
				"on loopback":                  "nameserver 127.0.0.53\n",
				"two":                          conf + fmt.Sprintf("nameserver %s\n", m.Nodes[1].IPv4),
				"of both families":             conf + fmt.Sprintf("nameserver %s\n", m.Nodes[1].IPv6),
			} {
				t.Run(name, func(t *testing.T) {
					m := m.in(t)
					m.finds(web, r, conf, "api.virtual.consul", vip)
					m.finds(web, r, conf, "api.service.consul", api.IPv4.String())
					m.finds(web, r, conf, "other.test", otherIP)
				})
			}
			m.finds(web, r, conf, "API.Connect.dc1.CONSUL", api.IPv4.String())
			if out := m.lookUp(web, r, conf, "nobody.service.consul"); strings.Contains(out, "address") {
				t.Errorf("an unknown service is found: %s", out)
			}
		})
	}
	m.reaches(web, netip.AddrPortFrom(m.virtual["api"], 80).String())
	if want := "query[A] other.test from " + web.IPv4.String(); !strings.Contains(servers[0].Output(), want) {
		t.Errorf("the name server has not seen %q:\n%s", want, servers[0].Output())
	}
	if out := servers[0].Output() + servers[1].Output(); strings.Contains(out, "api.virtual.consul") {
		t.Errorf("a query for a name of the mesh has left the workload:\n%s", out)
	}
	if answered := m.metric(0, "nodeproxy_dns_answered_total"); answered < 4*5*2 {
		t.Errorf("%v queries are counted as answered", answered)
	}
	if forwarded := m.metric(0, "nodeproxy_dns_forwarded_total"); forwarded < 4*5 {
		t.Errorf("%v queries are counted as forwarded", forwarded)
	}
}

func TestMessagesAreThoseOfANameServer(t *testing.T) {
	m, web, api, _, _ := dnsPair(t, func(m *mesh) {
		var many []netip.Addr
		for i := range 60 {
			many = append(many, netip.AddrFrom4([4]byte{10, 2, 200, byte(i + 1)}))
		}
		m.define(1, "many", port, many...)
	})
	server := "@" + m.Nodes[0].IPv4.String()
	vip := m.virtual["api"].String()
	for _, c := range []struct {
		name  string
		args  []string
		want  []string
		never string
	}{
		{"A", []string{"api.virtual.consul", "A"}, []string{"status: NOERROR", "flags: qr aa rd ra", vip, "udp: 4096"}, ""},
		{"the letter case of the question", []string{"aPi.vIRtual.COnsul", "A"}, []string{"aPi.vIRtual.COnsul.\t0\tIN\tA\t" + vip}, ""},
		{"AAAA of a name with IPv4 alone", []string{"api.virtual.consul", "AAAA"}, []string{"status: NOERROR", "ANSWER: 0", "AUTHORITY: 1", "SOA"}, ""},
		{"a type that nobody has", []string{"api.virtual.consul", "TYPE65"}, []string{"status: NOERROR", "ANSWER: 0"}, ""},
		{"SRV", []string{"api.service.consul", "SRV"}, []string{fmt.Sprintf("SRV\t1 1 %d %s", port, hexName(api.IPv4)), hexName(api.IPv4) + " 0\tIN\tA\t" + api.IPv4.String()}, ""},
		{"the target of an SRV record", []string{hexName(api.IPv4), "A"}, []string{api.IPv4.String()}, ""},
		{"TCP", []string{"+tcp", "api.virtual.consul", "A"}, []string{vip, "(TCP)"}, ""},
		{"TCP, several queries on one connection", []string{"+tcp", "+keepopen", "api.virtual.consul", "A", "+tcp", "+keepopen", server, "other.test", "A", "+tcp", "+keepopen", server, "api.service.consul"},
			[]string{vip, otherIP, api.IPv4.String()}, ""},
		{"without EDNS, more than 512 bytes", []string{"+noedns", "many.service.consul", "A"}, []string{"Truncated, retrying in TCP mode", "ANSWER: 60", "(TCP)"}, ""},
		{"without EDNS, and no TCP", []string{"+noedns", "+ignore", "many.service.consul", "A"}, []string{"flags: qr aa tc"}, "(TCP)"},
		{"with EDNS", []string{"+bufsize=4096", "many.service.consul", "A"}, []string{"ANSWER: 60", "(UDP)"}, "Truncated"},
		{"an EDNS version that nobody has", []string{"+edns=3", "+noednsneg", "api.virtual.consul"}, []string{"status: BADVERS"}, ""},
		{"forwarded, without EDNS", []string{"+noedns", "big.test", "TXT"}, []string{"Truncated, retrying in TCP mode", strings.Repeat("x", 200), "(TCP)"}, ""},
		{"forwarded, with EDNS", []string{"+bufsize=1200", "big.test", "TXT"}, []string{strings.Repeat("x", 200), "(UDP)"}, "Truncated"},
		{"forwarded, by TCP", []string{"+tcp", "big.test", "TXT"}, []string{strings.Repeat("x", 200), "(TCP)"}, ""},
		{"an unknown service", []string{"nobody.service.consul", "A"}, []string{"status: NXDOMAIN"}, "aa rd"},
		{"another datacenter", []string{"api.service.dc9.consul", "A"}, []string{"status: NXDOMAIN"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := m.in(t).dig(web, append([]string{server, "+tries=1", "+time=10"}, c.args...)...)
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if c.never != "" && strings.Contains(out, c.never) || strings.Contains(out, "unexpected source") {
				t.Errorf("%q, or an unexpected source, in\n%s", c.never, out)
			}
		})
	}
}

func hexName(addr netip.Addr) string { return fmt.Sprintf("%x.addr.dc1.consul.", addr.AsSlice()) }

func TestQueriesOutliveTheDaemon(t *testing.T) {
	m, web, _, _, conf := dnsPair(t)
	r := m.resolvers()
	// A name server that takes queries and never answers: the daemon has a query on its way when it ends.
	silent, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"silent", "127.0.0.99:53"}, Namespace: web.Namespace})
	m.must(err)
	m.must(silent.WaitOutput(m.ctx(), "ready"))
	pending := func(name string) {
		t.Helper()
		p, err := web.Start(netlab.Command{Path: tools(t, "dig")["dig"], Args: []string{"@127.0.0.99", "+tries=1", "+time=30", name}})
		m.must(err)
		t.Cleanup(p.Kill)
		m.must(silent.WaitOutput(m.ctx(), name))
	}
	m.finds(web, r[0], conf, "api.virtual.consul", m.virtual["api"].String())
	pending("hung")
	m.must(m.Daemons[0].Process.Signal(syscall.SIGSTOP))
	m.lookUp(web, r[0], conf, "other.test") // glibc asks twice from one connected socket: this one may be lost
	for _, r := range r {
		m.finds(web, r, conf, "other.test", otherIP)
	}
	m.must(m.Daemons[0].Process.Signal(syscall.SIGCONT))
	m.eventually("the daemon that was hung answers again", func() error {
		if out := m.lookUp(web, r[0], conf, "api.virtual.consul"); !strings.Contains(out, m.virtual["api"].String()) {
			return fmt.Errorf("it says %s", out)
		}
		return nil
	})
	pending("killed")
	m.kill(0)
	for _, r := range r {
		m.finds(web, r, conf, "other.test", otherIP)
		if out := m.lookUp(web, r, conf, "api.virtual.consul"); strings.Contains(out, "240.") {
			t.Errorf("%s is answered by nobody: %s", r.name, out)
		}
	}
	m.restart(0)
	m.awaitDNS(0, web, "on")
	for _, r := range r {
		m.finds(web, r, conf, "api.virtual.consul", m.virtual["api"].String())
	}
	m.stop(0)
	m.finds(web, r[0], conf, "other.test", otherIP)
}

func TestASquatterOnTheDNSPortGetsNothing(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	m.enableDNS(0)
	m.nameServer(m.Nodes[0].Namespace, m.Nodes[0].IPv4)
	squatter, err := m.Lab.Start(netlab.Command{Path: programs.app, Args: []string{"silent", "127.0.0.1:15053"}, Namespace: web.Namespace})
	m.must(err)
	m.must(squatter.WaitOutput(m.ctx(), "ready"))
	m.start()
	m.awaitDNS(0, web, "off: listen for name queries on port 15053 in network namespace ")
	glibc := resolver{"glibc", []string{"getent", "ahosts"}}
	conf := fmt.Sprintf("nameserver %s\n", m.Nodes[0].IPv4)
	m.finds(web, glibc, conf, "other.test", otherIP)
	out := m.run(m.nodeShell(0), netlab.Command{Path: programs.nodeproxy, Args: []string{"status", "--socket", m.Daemons[0].Socket()}})
	if !strings.Contains(out, "another process has it") {
		t.Errorf("status does not say why there is no DNS:\n%s", out)
	}
	squatter.Kill()
	m.awaitDNS(0, web, "on")
	m.settle(0) // it has its sockets now
	m.finds(web, glibc, conf, "api.virtual.consul", m.virtual["api"].String())
	if strings.Contains(squatter.Output(), "heard") {
		t.Errorf("the squatter got queries: %s", squatter.Output())
	}
}

// nodeShell is a workload that nobody enrolled, in the node's own namespace.
func (m *mesh) nodeShell(node int) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].HostWorkload("shell")
	m.must(err)
	return w
}

func TestWithoutDNSNothingIsAttachedForIt(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	m.nameServer(m.Nodes[0].Namespace, m.Nodes[0].IPv4)
	m.start()
	m.awaitDNS(0, web, "")
	before := effective(t, web.Cgroup.Path())
	m.stop(0)
	m.enableDNS(0)
	m.restart(0)
	m.awaitDNS(0, web, "on")
	if with := effective(t, web.Cgroup.Path()); with != before+8 {
		t.Errorf("%d programs with DNS, %d without", with, before)
	}
	stranger, err := m.Nodes[0].Workload("stranger")
	m.must(err)
	if n := effective(t, stranger.Cgroup.Path()); n != 0 {
		t.Errorf("%d programs on a workload that is not enrolled", n)
	}
	server := "@" + m.Nodes[0].IPv4.String()
	if out := m.dig(stranger, server, "api.virtual.consul"); !strings.Contains(out, "status: NXDOMAIN") {
		t.Errorf("a workload that is not enrolled is answered: %s", out)
	}
	m.stop(0)
	m.Daemons[0].Extra = ""
	m.restart(0)
	if without := effective(t, web.Cgroup.Path()); without != before {
		t.Errorf("%d programs once DNS is switched off, %d before", without, before)
	}
	if out := m.dig(web, server, "api.virtual.consul"); !strings.Contains(out, "status: NXDOMAIN") {
		t.Errorf("names are answered without DNS: %s", out)
	}
}

func TestALabelDeclinesNames(t *testing.T) {
	m := newMeshAlone(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.nameServer(m.Nodes[0].Namespace, m.Nodes[0].IPv4)
	m.Daemons[0].Labels = "  xattr {\n    enabled = true\n  }\n"
	cart, err := m.Nodes[0].Workload("cart")
	m.must(err)
	m.define(0, "cart", port, cart.IPv4)
	m.serve(cart, ":8080")
	m.label(cart.Cgroup, "service", "cart", "dns", "enabled")
	m.start()
	m.awaitRefused(cart.Cgroup, "dns.enabled is false")
	m.stop(0)
	m.enableDNS(0)
	m.restart(0)
	server := "@" + m.Nodes[0].IPv4.String()
	ask := func(want string) {
		t.Helper()
		m.eventually("the answer is "+want, func() error {
			if out := m.dig(cart, server, "api.virtual.consul"); !strings.Contains(out, "status: "+want) {
				return fmt.Errorf("%w: %s", errNotYet, out)
			}
			return nil
		})
	}
	ask("NOERROR")
	m.label(cart.Cgroup, "dns", "disabled")
	ask("NXDOMAIN")
	m.awaitDNS(0, cart, "off: its label")
	if out := m.dig(web, server, "api.virtual.consul"); !strings.Contains(out, "status: NOERROR") {
		t.Errorf("a workload without the label is not answered: %s", out)
	}
}

func TestWorkloadsInTheNodesNamespaceFindTheNames(t *testing.T) {
	m := newMesh(t)
	db, err := m.Nodes[0].HostWorkload("db")
	m.must(err)
	m.Daemons[0].Enroll(db, "db")
	m.define(0, "db", 5432, db.IPv4)
	m.serve(db, at(db.IPv4, 5432))
	api := m.place(1, "api")
	m.allow("api", "db")
	m.enableDNS(0)
	loopback := netip.MustParseAddr("127.0.0.53")
	m.nameServer(m.Nodes[0].Namespace, loopback)
	m.start()
	m.awaitDNS(0, db, "on")
	glibc := resolver{"glibc", []string{"getent", "ahosts"}}
	conf := fmt.Sprintf("nameserver %s\n", loopback)
	m.finds(db, glibc, conf, "api.virtual.consul", m.virtual["api"].String())
	m.finds(db, glibc, conf, "api.service.consul", api.IPv4.String())
	m.finds(db, glibc, conf, "other.test", otherIP)
	m.reaches(db, m.vip("api"))
	shell := m.nodeShell(0)
	if out := m.dig(shell, "@"+loopback.String(), "api.virtual.consul"); !strings.Contains(out, "status: NXDOMAIN") {
		t.Errorf("a process of no workload is answered: %s", out)
	}
	if out := m.run(shell, netlab.Command{Path: programs.nodeproxy, Args: []string{"check", "--workloads", "--config", m.Daemons[0].ConfigPath(), "--socket", m.Daemons[0].Socket()}}); !strings.Contains(out, "dns db (db)") {
		t.Errorf("check does not say whether there is DNS:\n%s", out)
	}
}

package workload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// proberLook is how often it is looked who listens where probers do.
const proberLook = 2 * time.Second

// Probers says who on this node checks applications by connecting to them in plaintext. They may connect to the ports for
// which a check is registered, and are never workloads.
type Probers struct {
	// Cgroups are directories on cgroup2: inbound.probers.
	Cgroups []string

	// Agent is where the Consul agent answers: host:port or unix:///path. If a process of this node listens there, its cgroup
	// is a prober's. "" for none.
	Agent string

	// Kubelet is the same of the kubelet: host:port.
	Kubelet string
}

// probers is what a Manager knows of them. Only reconcile changes it.
type probers struct {
	listening []*listeningProber
	looked    time.Time

	admitted []string
	problems []catalog.Problem
}

// listeningProber is one that is found by where it listens.
type listeningProber struct {
	name    string // as in "the Consul agent"
	address string
	outside bool                   // it is in no pod
	cgroup  atomic.Pointer[string] // nil where it is not on this node, or was not running yet
	lost    error                  // why its cgroup is not known, nil when it is or is nowhere here
}

func (p Probers) listening() (all []*listeningProber) {
	if p.Agent != "" {
		all = append(all, &listeningProber{name: "the Consul agent", address: p.Agent})
	}
	if p.Kubelet != "" {
		all = append(all, &listeningProber{name: "the kubelet", address: p.Kubelet, outside: true})
	}
	return all
}

// isProbers says which prober's cgroup is dir or below it, "" for none. Such a cgroup cannot be a workload.
func (m *Manager) isProbers(dir string) string {
	for _, c := range m.proberCgroups() {
		if within(c, dir) {
			return c
		}
	}
	return ""
}

// proberCgroups are the configured ones and those of who listens.
func (m *Manager) proberCgroups() []string {
	all := slices.Clone(m.cfg.Probers.Cgroups)
	for _, p := range m.probers.listening {
		if cgroup := p.cgroup.Load(); cgroup != nil && !slices.Contains(all, *cgroup) {
			all = append(all, *cgroup)
		}
	}
	return all
}

// findProbers looks who listens at the probers' addresses. While nobody does, the last one stays known: its cgroup must not
// become a workload because the agent restarts. Nor does a workload stop being one because it listens there.
func (m *Manager) findProbers() {
	if time.Since(m.probers.looked) < proberLook {
		return
	}
	m.probers.looked = time.Now()
	for _, p := range m.probers.listening {
		dir, err := m.listenerCgroup(p)
		known := p.cgroup.Load()
		if err == nil && dir != "" && (known == nil || *known != dir) {
			if err = m.mayProbe(p, dir); err == nil {
				p.cgroup.Store(&dir)
			}
		}
		p.lost = err
	}
}

// mayProbe makes sure that dir is in no cgroup that is enrolled, by this daemon or by an earlier one, and not a pod's that has
// taken the kubelet's port.
func (m *Manager) mayProbe(p *listeningProber, dir string) error {
	if p.outside && strings.Contains(dir, "kubepods") {
		return fmt.Errorf("what listens at %s is a pod, in %s: see why %s does not", p.address, dir, p.name)
	}
	for _, e := range m.redirect.Enrolled() {
		if path, err := redirect.CgroupPath(e.Cgroup); err == nil && within(dir, path) {
			return fmt.Errorf("what listens at %s is in %s, which is a workload: un-enroll that, or start %s in another cgroup", p.address, path, p.name)
		}
	}
	return nil
}

func (m *Manager) listenerCgroup(p *listeningProber) (string, error) {
	address := p.address
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return unixListenerCgroup(path)
	}
	host, port, err := net.SplitHostPort(strings.TrimPrefix(strings.TrimPrefix(address, "https://"), "http://"))
	if err != nil {
		return "", fmt.Errorf("find %s at %q: %w", p.name, address, err)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	at, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return "", nil // another host's name
	}
	id, err := m.redirect.ListenerCgroup(at)
	if err != nil || id == 0 {
		return "", err
	}
	return redirect.CgroupPath(id)
}

// unixListenerCgroup is the cgroup of the process that listens on a unix socket, "" when none does.
func unixListenerCgroup(path string) (string, error) {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "unix", path)
	if err != nil {
		return "", nil // it is not running
	}
	defer conn.Close()
	pid, err := peerPID(conn.(*net.UnixConn))
	if err != nil {
		return "", fmt.Errorf("find the agent at %s: %w", path, err)
	}
	return redirect.ProcessCgroup(pid)
}

// admitProbers tells the kernel who the probers are and where they may connect. next is not shown to anybody yet.
func (m *Manager) admitProbers(next *view, ready []*entry) {
	targets := m.probeTargets(next.snap, ready)
	admitted, problems := m.judgeProbers(len(targets) > 0)
	if err := errors.Join(m.redirect.SetProbes(targets), m.redirect.SetProbers(admitted)); err != nil {
		problems = append(problems, catalog.Problem{Kind: "prober", Text: fmt.Sprintf("health checks of strict services may fail: %v", err)})
	}
	for _, dir := range admitted {
		if !slices.Contains(m.probers.admitted, dir) {
			m.log.Info("prober admitted to the ports that it checks", "cgroup", dir)
		}
	}
	m.probers.admitted, m.probers.problems = admitted, problems
}

// judgeProbers says which cgroups are probers', and what is wrong with the others. needed: there is something to probe.
func (m *Manager) judgeProbers(needed bool) (admitted []string, problems []catalog.Problem) {
	problem := func(format string, args ...any) {
		problems = append(problems, catalog.Problem{Kind: "prober", Text: fmt.Sprintf(format, args...)})
	}
	for _, dir := range m.proberCgroups() {
		if why := m.refusesProber(dir); why != "" {
			problem("cgroup %s is no prober, so its health checks of strict services fail: %s", dir, why)
			continue
		}
		admitted = append(admitted, dir)
	}
	for _, p := range m.probers.listening {
		switch {
		case !needed || p.lost == nil && p.cgroup.Load() != nil:
		case p.lost != nil:
			problem("%s's health checks of strict services may fail: %v", p.name, p.lost)
		default:
			problem("%s's health checks of strict services fail: no process of this node listens at %s, where it should be: name its cgroup in inbound.probers", p.name, p.address)
		}
	}
	return admitted, problems
}

// refusesProber says why a cgroup cannot be a prober's, or "".
func (m *Manager) refusesProber(dir string) string {
	switch {
	case dir == m.mount:
		return "the root cgroup holds every process of the node: start what checks in a cgroup of its own"
	case within(m.cgroup, dir):
		return "nodeproxy itself runs in it: start what checks in a cgroup of its own"
	case within(dir, filepath.Join(m.mount, "user.slice")):
		return "it is a user's: start what checks as a service of the system"
	case !ownedByRoot(dir):
		return "it is not root's: whoever owns it could put any process there"
	}
	for _, e := range m.workloads {
		if within(e.Cgroup, dir) || within(dir, e.Cgroup) {
			return fmt.Sprintf("workload %s of service %q shares it: start what checks in a cgroup of its own", e.Cgroup, e.Service)
		}
	}
	return ""
}

// ownedByRoot also holds for what is not there: nobody is in it.
func ownedByRoot(dir string) bool {
	var st unix.Stat_t
	err := unix.Stat(dir, &st)
	return errors.Is(err, os.ErrNotExist) || err == nil && st.Uid == 0
}

// probeTargets lists the places at which probers check the instances of this node's workloads: the checked ports at every
// address of the workload's namespaces, loopback included where that is the node's, and the node's own that lead there.
func (m *Manager) probeTargets(snap *catalog.Snapshot, ready []*entry) []redirect.ProbeTarget {
	var all []redirect.ProbeTarget
	for _, e := range m.protected(ready) {
		for _, inode := range e.inodes {
			s := m.namespaces[inode]
			if s == nil {
				continue
			}
			ports := slices.Clone(e.claim.Probed)
			for _, inst := range e.instancesIn(snap) {
				ports = append(ports, inst.Probed...)
			}
			slices.Sort(ports)
			for _, port := range slices.Compact(ports) {
				for _, ip := range s.probeAddrs() {
					all = append(all, redirect.ProbeTarget{Addr: netip.AddrPortFrom(ip, port), Namespace: s.Cookie, Workload: e.ID})
				}
			}
			all = append(all, m.mappedProbes(snap, e, s)...)
		}
	}
	return all
}

// mappedProbes are the node's places at which probers check instances that e serves from s.
func (m *Manager) mappedProbes(snap *catalog.Snapshot, e *entry, s *space) (all []redirect.ProbeTarget) {
	for _, inst := range e.instancesIn(snap) {
		to := e.mapping(inst.Address)
		if !to.IsValid() || !s.has(to.Addr()) {
			continue
		}
		if slices.Contains(inst.Probed, inst.Address.Port()) {
			all = append(all, redirect.ProbeTarget{Addr: inst.Address, Namespace: s.Cookie, Workload: e.ID, Mapped: to})
		}
		if host := m.hostSpace(); host != nil && !inst.Native && slices.Contains(inst.Probed, inst.Mesh.Port()) {
			all = append(all, redirect.ProbeTarget{Addr: inst.Mesh, Namespace: host.Cookie, Workload: e.ID})
		}
	}
	return all
}

func (s *space) probeAddrs() []netip.Addr {
	all := slices.DeleteFunc(slices.Clone(s.addrs), func(ip netip.Addr) bool { return ip.IsLoopback() || ip.IsLinkLocalUnicast() })
	if s.Host {
		all = append(all, loopbacks...)
	}
	return all
}

var loopbacks = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// probeRules steer, on the node's loopback, the mesh ports that are checked there: Consul's own check of a sidecar without
// an address connects to 127.0.0.1.
func probeRules(s *served) []redirect.Rule {
	mesh := s.instance.Mesh
	if !s.Namespace.Host || !slices.Contains(s.instance.Probed, mesh.Port()) {
		return nil
	}
	var all []redirect.Rule
	for _, ip := range loopbacks {
		all = append(all, redirect.Rule{Namespace: s.Namespace.Cookie, Addr: ip, Port: mesh.Port(), Action: redirect.Steer, Workload: s.Workloads[0].ID})
	}
	return all
}

// Probed implements the proxy's Kernel.
func (m *Manager) Probed(conn *net.TCPConn) bool { return m.redirect.Probed(conn) }

// peerPID is the process that listened at the other end of conn.
func peerPID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var errCred error
	if err := raw.Control(func(fd uintptr) {
		cred, errCred = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if errCred != nil {
		return 0, errCred
	}
	return int(cred.Pid), nil
}

package workload

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// Dial implements the proxy's Kernel.
func (m *Manager) Dial(ctx context.Context, ns *Namespace, to netip.AddrPort) (*net.TCPConn, error) {
	s := m.view.Load().spaces[ns.Cookie]
	if s == nil {
		return nil, fmt.Errorf("dial %s: network namespace %d is gone", to, ns.Inode)
	}
	return s.Dial(ctx, netip.Addr{}, to, redirect.Announcement{})
}

// Owns implements the proxy's Kernel.
func (m *Manager) Owns(ip netip.Addr) bool {
	v := m.view.Load()
	if slices.Contains(v.host, ip) {
		return true
	}
	for _, s := range v.spaces {
		if s.has(ip) {
			return true
		}
	}
	return false
}

// DialCheck connects to where a health check of a local instance points, from inside the instance's namespace, past its
// own guard. An instance that no workload serves is checked from the node. It waits until the workloads are known: before
// that, an earlier daemon's guard would refuse it and the instance would be taken for dead.
func (m *Manager) DialCheck(ctx context.Context, instance, network, addr string) (net.Conn, error) {
	select {
	case <-m.ready:
	case <-ctx.Done():
		return nil, fmt.Errorf("check instance %s at %s: the workloads are not known yet: %w", instance, addr, context.Cause(ctx))
	}
	for _, s := range m.view.Load().served {
		if s.Instance != instance || len(s.Workloads) == 0 {
			continue
		}
		to, err := literal(ctx, addr)
		if err != nil {
			return nil, fmt.Errorf("check instance %s at %q: %w", instance, addr, err)
		}
		if s.mapped.IsValid() && to.Port() == s.instance.Address.Port() {
			to = s.mapped
		}
		return s.space.Dial(ctx, netip.Addr{}, to, redirect.Announcement{Kind: redirect.Check, Workload: s.Workloads[0].ID})
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

// literal resolves addr as the node does, but for localhost, which is the workload's own.
func literal(ctx context.Context, addr string) (netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ips[0].Unmap(), uint16(port)), nil
}

// Deliver implements the proxy's Kernel.
func (m *Manager) Deliver(ctx context.Context, to *Served, client netip.AddrPort) (net.Conn, error) {
	for {
		v := m.view.Load()
		conn, err := v.deliver(ctx, to, client)
		if err == nil || ctx.Err() != nil || m.view.Load() == v {
			return conn, err
		}
		// The workload became another one meanwhile, and the kernel did not know the first any more.
	}
}

func (v *view) deliver(ctx context.Context, to *Served, client netip.AddrPort) (net.Conn, error) {
	for _, all := range []map[servedKey]*served{v.served, v.former} {
		for _, s := range all {
			if s.Instance != to.Instance || s.Namespace.Cookie != to.Namespace.Cookie || len(s.Workloads) == 0 {
				continue
			}
			if s.instance.DeliverySocket != "" {
				return deliverUnix(ctx, v, s)
			}
			return deliverTCP(ctx, v, s, client)
		}
	}
	return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownWorkload, Err: fmt.Errorf("no enrolled workload serves instance %s any more", to.Instance)}
}

// deliverTCP checks before and after: nothing but the workload's own listener is dialled, and what accepted is the
// workload's, even if somebody else bound the port in between, or since it was last looked.
func deliverTCP(ctx context.Context, v *view, s *served, client netip.AddrPort) (net.Conn, error) {
	if listeners, ok := s.space.heard.find(s.port()); ok {
		if conn, err := deliverAmong(ctx, v, s, client, listeners); err == nil || ctx.Err() != nil {
			return conn, err
		}
	}
	seen := time.Now()
	listeners, err := s.listeners()
	if err != nil {
		return nil, err
	}
	conn, err := deliverAmong(ctx, v, s, client, listeners)
	if err == nil {
		s.space.heard.add(s.port(), listeners, seen)
	}
	return conn, err
}

func deliverAmong(ctx context.Context, v *view, s *served, client netip.AddrPort, listeners []redirect.Socket) (net.Conn, error) {
	target, w, err := pickTarget(v, s, client, listeners)
	if err != nil {
		return nil, err
	}
	if client.Addr().IsLoopback() || client.Addr().IsUnspecified() {
		client = netip.AddrPort{} // the application must never take a stranger for itself
	}
	conn, err := s.space.Dial(ctx, netip.Addr{}, target, redirect.Announcement{Kind: redirect.Delivery, Workload: w.ID, Client: client})
	if err != nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: fmt.Errorf("connect to the application of instance %s at %s: %w", s.Instance, target, err)}
	}
	if err := checkAccepted(ctx, v, s, conn, target); err != nil {
		conn.SetLinger(0)
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// listeners are those on the port of the application, whoever's they are.
func (s *served) listeners() ([]redirect.Socket, error) {
	listeners, err := s.space.Listeners(s.port())
	if err != nil {
		return nil, &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: err}
	}
	return listeners, nil
}

// pickTarget finds the address on which the workload listens for the instance, and refuses if anybody else's of the listeners
// could get the connection.
func pickTarget(v *view, s *served, client netip.AddrPort, listeners []redirect.Socket) (netip.AddrPort, *Workload, error) {
	port := s.port()
	if ip := s.instance.Delivery.Addr(); ip.IsValid() && !ip.IsUnspecified() && !ip.IsLoopback() && !s.space.has(ip) {
		return netip.AddrPort{}, nil, &catalog.Refusal{Reason: catalog.ReasonNotTheWorkloads, Err: fmt.Errorf(
			"deliver to instance %s: address %s is not one of the workload's network namespace; correct the service definition", s.Instance, ip)}
	}
	var foreign error
	for _, ip := range s.candidates(client) {
		w, found := v.ownerOf(s, listeners, ip)
		target := netip.AddrPortFrom(ip, port)
		if w != nil {
			return target, w, nil
		}
		if found && foreign == nil {
			foreign = &catalog.Refusal{Reason: catalog.ReasonNotTheWorkloads, Err: fmt.Errorf(
				"deliver to instance %s: what listens on %s is not in the workload's cgroup %s; correct the service definition or stop that process",
				s.Instance, target, s.Workloads[0].Cgroup)}
		}
	}
	if foreign != nil {
		return netip.AddrPort{}, nil, foreign
	}
	return netip.AddrPort{}, nil, &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: fmt.Errorf(
		"deliver to instance %s: nothing listens on port %d in its network namespace; is the application up?", s.Instance, port)}
}

// port is where the application listens. A sidecar's definition without one of its own has that of the instance, which the node
// may lead to another.
func (s *served) port() uint16 {
	own := s.instance.Address.Port()
	if port := s.instance.Delivery.Port(); port != 0 && port != own {
		return port
	}
	return cmp.Or(s.mapped.Port(), own)
}

// address is the application's own, other than loopback.
func (s *served) address() netip.Addr {
	if s.mapped.IsValid() {
		return s.mapped.Addr()
	}
	return s.instance.Address.Addr()
}

// candidates are the addresses to try, in order: the one the definition names, or loopback and then the instance's own,
// each first in the client's address family, so that the application can be shown the client's address. What the node leads to
// is an address that the definition cannot know.
func (s *served) candidates(client netip.AddrPort) []netip.Addr {
	if ip := s.instance.Delivery.Addr(); ip.IsValid() && !ip.IsUnspecified() && !(s.mapped.IsValid() && ip.IsLoopback()) {
		return []netip.Addr{ip}
	}
	v4, v6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	all := []netip.Addr{v4, v6}
	if client.Addr().Is6() {
		all = []netip.Addr{v6, v4}
	}
	all = append(all, s.address())
	for _, ip := range s.space.addrs {
		if ip != s.address() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() {
			all = append(all, ip)
		}
	}
	return all
}

func (s *space) has(ip netip.Addr) bool { return slices.Contains(s.addrs, ip) }

// ownerOf says which of the workloads that serve s owns every listener that a connection to ip could reach. found: there
// is one at all; a nil workload: at least one belongs to somebody else.
func (v *view) ownerOf(s *served, listeners []redirect.Socket, ip netip.Addr) (w *Workload, found bool) {
	for _, l := range listeners {
		if !reaches(l, ip) {
			continue
		}
		found = true
		if w = v.owner(s, l.Cgroup); w == nil {
			return nil, true
		}
	}
	return w, found
}

func reaches(l redirect.Socket, ip netip.Addr) bool {
	at := l.Local.Addr()
	if at.IsUnspecified() {
		return at.Is4() == ip.Is4() || at.Is6() && !l.V6Only
	}
	return at == ip
}

// owner returns the workload serving s in whose cgroup, or below but not in an inner workload's, cgroup is.
func (v *view) owner(s *served, cgroup uint64) *Workload {
	if cgroup == 0 {
		return nil
	}
	for _, w := range s.Workloads {
		if v.subtree[w.ID][cgroup] || v.below(w, cgroup) {
			return w
		}
	}
	return nil
}

// below looks for a cgroup of w that is younger than the view.
func (v *view) below(w *Workload, id uint64) bool {
	others := make(map[string]bool)
	for _, other := range v.byID {
		others[other.Cgroup] = other.Cgroup != w.Cgroup
	}
	found := false
	err := filepath.WalkDir(w.Cgroup, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil || !d.IsDir():
			return skipGone(err)
		case others[path]:
			return filepath.SkipDir // an inner workload's
		}
		if got, err := redirect.CgroupID(path); err == nil && got == id {
			found = true
			return filepath.SkipAll
		}
		return nil
	})
	return err == nil && found
}

// checkAccepted makes sure that the workload's own socket accepted conn. Where the accepted socket cannot be asked, because
// it waits for data first (TCP_DEFER_ACCEPT) or is closed already, whoever listens there is asked.
func checkAccepted(ctx context.Context, v *view, s *served, conn *net.TCPConn, target netip.AddrPort) error {
	client := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	for wait := 100 * time.Microsecond; ; wait *= 2 {
		sock, err := s.space.Accepted(client, target)
		switch {
		case err == nil && sock.Cgroup != 0 && !sock.Listening:
			if v.owner(s, sock.Cgroup) == nil {
				return notTheWorkloads(s, target)
			}
			return nil
		case err == nil && !sock.Listening || !established(conn):
			return checkListeners(v, s, target)
		case err != nil && !errors.Is(err, unix.ENOENT):
			return &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: err}
		}
		// The last ACK of the handshake is still on its way.
		select {
		case <-ctx.Done():
			return &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: fmt.Errorf("deliver to instance %s at %s: %w", s.Instance, target, context.Cause(ctx))}
		case <-time.After(wait):
		}
	}
}

func checkListeners(v *view, s *served, target netip.AddrPort) error {
	listeners, err := s.space.Listeners(target.Port())
	if err != nil {
		return &catalog.Refusal{Reason: catalog.ReasonDeliveryFailed, Err: err}
	}
	if w, found := v.ownerOf(s, listeners, target.Addr()); found && w == nil {
		return notTheWorkloads(s, target)
	}
	return nil
}

func notTheWorkloads(s *served, target netip.AddrPort) error {
	return &catalog.Refusal{Reason: catalog.ReasonNotTheWorkloads, Err: fmt.Errorf(
		"deliver to instance %s: the process that accepted at %s is not in the workload's cgroup", s.Instance, target)}
}

// established reports whether neither end has closed conn.
func established(conn *net.TCPConn) bool {
	const tcpEstablished = 1
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	state := uint8(0)
	err = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return err == nil && state == tcpEstablished
}

// deliverUnix connects to a socket path as the workload's processes see it, and checks who listens there.
func deliverUnix(ctx context.Context, v *view, s *served) (net.Conn, error) {
	path := s.instance.DeliverySocket
	refuse := func(reason catalog.Reason, err error) (net.Conn, error) {
		return nil, &catalog.Refusal{Reason: reason, Err: fmt.Errorf("deliver to instance %s at %s: %w", s.Instance, path, err)}
	}
	for _, w := range s.Workloads {
		pid, err := anyProcess(w.Cgroup)
		if err != nil {
			continue
		}
		fd, err := openInRoot(pid, path)
		if err != nil {
			return refuse(catalog.ReasonDeliveryFailed, err)
		}
		defer unix.Close(fd)
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd))
		if err != nil {
			return refuse(catalog.ReasonDeliveryFailed, err)
		}
		if err := v.checkListener(s, conn.(*net.UnixConn)); err != nil {
			conn.Close()
			return refuse(catalog.ReasonNotTheWorkloads, err)
		}
		return conn, nil
	}
	return refuse(catalog.ReasonDeliveryFailed, errors.New("the workload has no process"))
}

// openInRoot opens path below the root of process pid; symlinks cannot lead out of it.
func openInRoot(pid, path string) (int, error) {
	root, err := unix.Open("/proc/"+pid+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open root of process %s: %w", pid, err)
	}
	defer unix.Close(root)
	return unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
}

// checkListener makes sure that the process which listens at the other end of conn is in the workload's cgroup.
func (v *view) checkListener(s *served, conn *net.UnixConn) error {
	pid, err := peerPID(conn)
	if err != nil {
		return err
	}
	cgroup, err := redirect.ProcessCgroup(pid)
	if err != nil {
		return err
	}
	for _, w := range s.Workloads {
		if within(cgroup, w.Cgroup) {
			return nil
		}
	}
	return fmt.Errorf("process %d, which listens there, is in cgroup %s, not in the workload's", pid, cgroup)
}

// anyProcess returns the pid of some process in the cgroup or below.
func anyProcess(dir string) (string, error) {
	pid := ""
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return skipGone(err)
		}
		procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if fields := strings.Fields(string(procs)); err == nil && len(fields) > 0 {
			pid = fields[0]
			return filepath.SkipAll
		}
		return nil
	})
	if err == nil && pid == "" {
		err = errors.New("no process in " + dir)
	}
	return pid, err
}

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// MaxTargets is how many instances one Grant chooses among.
const MaxTargets = int(outboundConstantGRANT_TARGETS)

// Grant lets the processes of a workload in one of its namespaces go straight to an instance of this node when they dial
// an address that is redirected, without the proxy. It is in force while the daemon beats.
type Grant struct {
	Workload  uint32
	Namespace uint64         // cookie of the client's
	Dialled   netip.AddrPort // port 0: every port
	NotAfter  time.Time      // by the wall clock; live connections outlive it
	Targets   []Target       // of Dialled's address family; those after MaxTargets are left out
}

// Target is where an instance listens.
type Target struct {
	Namespace uint64 // cookie
	Address   netip.AddrPort
	Source    netip.Addr // the client's address towards it, from Probe: a socket bound to another one is left to the proxy
	Closes    uint64     // of its namespace, read before the listener was seen: once another one has closed the grant rests
	Group     uint32     // of the workloads that may accept: whoever else does is cut off
}

// SetGrants makes the grants exactly those given, by diff. Connections on a grant that ends live on: see Granted.
func (r *Redirect) SetGrants(grants []Grant) error {
	want := make(map[outboundGrantKey]outboundGrant, len(grants))
	for _, g := range grants {
		key := outboundGrantKey{Ip: toAddr(g.Dialled.Addr()), Netns: g.Namespace, Workload: g.Workload, Port: swap(g.Dialled.Port())}
		value := outboundGrant{NotAfter: uint64(max(0, g.NotAfter.UnixNano()))}
		for _, t := range g.Targets[:min(len(g.Targets), MaxTargets)] {
			to := &value.Target[value.N]
			to.Ip, to.Port, to.Src = toAddr(t.Address.Addr()), swap(t.Address.Port()), toAddr(t.Source)
			to.Netns, to.Closes, to.Group = t.Namespace, t.Closes, t.Group
			value.N++
		}
		want[key] = value
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.grants.sync("grants", r.obj.Grants, want)
}

// Closes counts the listeners of workloads that have closed in the namespace since it was first opened.
func (ns *Namespace) Closes() (uint64, error) {
	var n uint64
	if err := ns.r.obj.Closes.Lookup(ns.Cookie, &n); err != nil {
		return 0, fmt.Errorf("count closed listeners of network namespace %d: %w", ns.Inode, err)
	}
	return n, nil
}

// countCloses begins the count, unless an earlier daemon has.
func (ns *Namespace) countCloses() error {
	err := ns.r.obj.Closes.Update(ns.Cookie, uint64(0), ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("count closed listeners of network namespace %d: %w", ns.Inode, err)
	}
	return nil
}

// noDevice is what a muzzled socket is bound to, NO_DEVICE of the programs.
const noDevice = 0x7fffffff

// Granted is a connection on a grant, whose client is not closed yet.
type Granted struct {
	Cookie      uint64 // of the client's socket
	Workload    uint32 // the client's, when it connected
	From, To    uint64 // cookies of the client's and the destination's namespace
	Client      netip.AddrPort
	Dialled     netip.AddrPort
	Destination netip.AddrPort // the instance
	Opened      time.Time      // zero: not established
	Accepted    bool           // by a socket of a workload
	Muzzled     bool           // another workload than the grant's was about to accept: it is cut off, and to be destroyed
	PID         uint32
	Comm        string

	device uint32 // what the client's socket is bound to
}

// Granted lists the connections on grants, also those made under an earlier daemon.
func (r *Redirect) Granted() ([]Granted, error) {
	const chunk = 4096
	keys, values := make([]uint64, chunk), make([]outboundGranted, chunk)
	clock, err := readClock()
	if err != nil {
		return nil, err
	}
	var all []Granted
	var cursor ebpf.MapBatchCursor
	for {
		n, err := r.obj.Granted.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			all = append(all, clock.granted(keys[i], &values[i]))
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list connections on grants: %w", err)
		}
	}
}

func (c clock) granted(cookie uint64, g *outboundGranted) Granted {
	return Granted{
		Cookie: cookie, Workload: g.Workload, From: g.Netns, To: g.T.Netns, Accepted: g.Accepted != 0, PID: g.Pid, Comm: comm(g.Comm),
		Client: fromEndpoint(g.T.Src, g.T.Sport), Dialled: fromEndpoint(g.Dialled, g.DialledPort),
		Destination: fromEndpoint(g.T.Dst, g.T.Dport), Opened: c.wall(g.Opened), Muzzled: g.Device == noDevice, device: g.Device,
	}
}

// Destroy resets a connection on a grant. One that is gone already is no error.
func (r *Redirect) Destroy(g Granted) error {
	ns := r.namespace(g.From)
	if ns == nil {
		return r.destroyAccepted(g)
	}
	err := ns.diag.destroy(g.request())
	if gone(err) {
		_, err = r.forget(g)
	}
	if err != nil {
		return fmt.Errorf("reset the connection %s → %s: %w", g.Client, g.Destination, err)
	}
	return nil
}

// destroyAccepted resets a connection from the destination's end, where the client's namespace is not open any more.
func (r *Redirect) destroyAccepted(g Granted) error {
	if ns := r.namespace(g.To); ns != nil {
		s, err := ns.acceptedOf(g)
		if err == nil && s.Cookie != 0 {
			req := diagRequest{family: familyOf(g.Destination.Addr()), src: g.Destination.Addr(), sport: g.Destination.Port(),
				dst: g.Client.Addr(), dport: g.Client.Port(), cookie: s.Cookie}
			err = ns.diag.destroy(req)
		}
		if err != nil && !gone(err) {
			return fmt.Errorf("reset the connection %s → %s: %w", g.Client, g.Destination, err)
		}
	}
	_, err := r.forget(g)
	return err
}

// acceptedOf finds the destination's end of a connection, which is in this namespace.
func (ns *Namespace) acceptedOf(g Granted) (Socket, error) {
	s, err := ns.Accepted(g.Client, g.Destination)
	if err == nil && s.Listening {
		err = unix.ENOENT // in place of a connection that is gone the kernel finds the listener
	}
	return s, err
}

// Ended removes the connections on grants that are gone but whose client was not seen to close, as when its cgroup was
// un-enrolled, and returns them. Where the client's namespace is not open any more the destination's end tells, and where
// neither is, the connection is not ours any more.
func (r *Redirect) Ended() ([]Granted, error) {
	all, err := r.Granted()
	if err != nil {
		return nil, err
	}
	var ended []Granted
	for _, g := range all {
		live, err := r.live(g)
		if err != nil {
			return ended, fmt.Errorf("look for the connection %s → %s: %w", g.Client, g.Destination, err)
		}
		if live {
			continue
		}
		removed, err := r.forget(g)
		if err != nil {
			return ended, err
		}
		if removed {
			ended = append(ended, g)
		}
	}
	return ended, nil
}

func (r *Redirect) live(g Granted) (bool, error) {
	var err error
	if ns := r.namespace(g.From); ns != nil {
		_, err = ns.diag.query(g.request())
	} else if ns := r.namespace(g.To); ns != nil {
		_, err = ns.acceptedOf(g)
	} else {
		return false, nil
	}
	if gone(err) {
		return false, nil
	}
	return err == nil, err
}

// forget removes what the maps hold of a connection that is gone, and says whether a program was not faster.
func (r *Redirect) forget(g Granted) (removed bool, err error) {
	err = r.obj.Granted.Delete(g.Cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("forget the connection %s → %s: %w", g.Client, g.Destination, err)
	}
	var w outboundWorkload
	if r.obj.Workloads.Lookup(g.Workload, &w) != nil {
		return true, nil // un-enrolled
	}
	w.Granted--
	err = r.obj.Workloads.Update(g.Workload, w, ebpf.UpdateExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, fmt.Errorf("count connections of workload %d: %w", g.Workload, err)
	}
	return true, nil
}

func (g *Granted) request() diagRequest {
	return diagRequest{family: familyOf(g.Client.Addr()), src: g.Client.Addr(), sport: g.Client.Port(),
		dst: g.Destination.Addr(), dport: g.Destination.Port(), device: g.device, cookie: g.Cookie}
}

func (r *Redirect) namespace(cookie uint64) *Namespace {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.namespaces[cookie]
}

func familyOf(ip netip.Addr) uint8 {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// ErrNoWay says that a probe did not arrive as it left: no route, a filter, or another address or port put in its place.
var ErrNoWay = errors.New("a connection does not arrive with the addresses it left with: is there no route, or is one of them translated on the way?")

// probePatience is how long a probe may take: it stays on this node, but its first packet may have to find a neighbour.
const probePatience = 3 * time.Second

// Probe finds out whether connections from ns to an address of the namespace with cookie to arrive there as they leave, and
// from which address. No application notices: the guard of that namespace refuses the SYN. It is on the account of a
// workload, and fails with ErrNoWay.
func (ns *Namespace) Probe(workload uint32, to uint64, at netip.AddrPort) (source netip.Addr, err error) {
	fd := -1
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(int(familyOf(at.Addr())), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return err
	})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("open socket in network namespace %d: %w", ns.Inode, err)
	}
	defer unix.Close(fd)
	p := outboundPeer{Kind: uint16(outboundDirectKindDIRECT_PATH), Workload: workload, Netns: to}
	if err := ns.r.obj.SkPeer.Put(int32(fd), p); err != nil {
		return netip.Addr{}, fmt.Errorf("announce probe: %w", err)
	}
	if err := await(fd, at); err != nil {
		return netip.Addr{}, fmt.Errorf("probe %s from network namespace %d: %w", at, ns.Inode, err)
	}
	if err := ns.r.obj.SkPeer.Lookup(int32(fd), &p); err != nil {
		return netip.Addr{}, fmt.Errorf("read probe: %w", err)
	}
	if p.Kind != uint16(outboundDirectKindDIRECT_PATH_SEEN) {
		return netip.Addr{}, fmt.Errorf("probe %s from network namespace %d: %w", at, ns.Inode, ErrNoWay)
	}
	return fromAddr(p.Ip), nil
}

// await connects and waits until that has failed.
func await(fd int, to netip.AddrPort) error {
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	if to.Addr().Is4() {
		sa = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	if err := unix.Connect(fd, sa); !errors.Is(err, unix.EINPROGRESS) {
		return nil // refused at once
	}
	for end := time.Now().Add(probePatience); ; {
		left := time.Until(end).Milliseconds()
		if left <= 0 {
			return nil
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 0 || err != nil {
			return err
		}
	}
}

package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// DNS is where the name queries of a namespace's workloads arrive. The address at which one arrives says which name server was
// asked, and the answer must come from there. It is closed with its Namespace.
type DNS struct {
	Packets []*DNSPackets
	Streams []*net.TCPListener

	ns *Namespace
}

// DNSPackets are datagrams of queries. Its methods may be called concurrently.
type DNSPackets struct {
	conn *net.UDPConn
	at   netip.AddrPort // zero address: every one of 127.53.0.0/16
}

// OpenDNS listens for name queries and lets those of the namespace's workloads be steered there. Where another process has
// one of the ports the error says so, nothing is steered, and it may be called again. The namespace may have IPv6 or not.
func (ns *Namespace) OpenDNS() (_ *DNS, err error) {
	if ns.r.dns == nil {
		return nil, ns.r.noDNS
	}
	d := &DNS{ns: ns}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := d.listen("udp4", netip.AddrPortFrom(netip.IPv4Unspecified(), DNSPort)); err != nil {
		return nil, err
	}
	for i := range uint16(dnsDnsConstantDNS_RESOLVERS6) {
		err := d.listen("udp6", netip.AddrPortFrom(netip.IPv6Loopback(), DNSPort+i))
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	err = ns.r.dns.Spaces.Update(ns.Cookie, dnsDnsSpace{}, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) { // an earlier daemon's keeps its slots: sockets are connected to them
		return nil, fmt.Errorf("open namespace %d for name queries: %w", ns.Inode, err)
	}
	ns.r.mu.Lock()
	ns.dns = d
	ns.r.mu.Unlock()
	return d, nil
}

// listen adds the two sockets of an address.
func (d *DNS) listen(network string, at netip.AddrPort) error {
	conn, ln, err := d.inherit(at)
	if conn == nil && ln == nil && err == nil {
		err = d.ns.Do(func() (err error) {
			lc := net.ListenConfig{Control: prepareDNSSocket}
			lc.SetMultipathTCP(false) // its sockets take no filter
			if conn, err = lc.ListenPacket(context.Background(), network, at.String()); err == nil {
				ln, err = lc.Listen(context.Background(), "tcp"+network[3:], at.String())
			}
			return err
		})
	}
	if conn != nil {
		packets := &DNSPackets{conn: conn.(*net.UDPConn)}
		if at.Addr().Is6() {
			packets.at = at
		}
		d.Packets = append(d.Packets, packets)
		err = errors.Join(err, d.show(packets.conn))
	}
	if ln != nil {
		d.Streams = append(d.Streams, ln.(*net.TCPListener))
		err = errors.Join(err, d.show(ln.(*net.TCPListener)))
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("listen for name queries on port %d in network namespace %d: another process has it: end that process, or let it listen elsewhere", at.Port(), d.ns.Inode)
	}
	if err != nil {
		return fmt.Errorf("listen for name queries on %s in network namespace %d: %w", at, d.ns.Inode, err)
	}
	return nil
}

// show tells the kernel that the socket is the daemon's.
func (d *DNS) show(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = d.ns.r.dns.Listeners.Put(int32(fd), uint32(1)) })
	return errors.Join(err, inner)
}

// prepareDNSSocket makes a socket on every IPv4 address take nothing but what is sent to 127.53.0.0/16, which comes from this
// very namespace, before it takes room in its queue.
func prepareDNSSocket(network, _ string, raw syscall.RawConn) error {
	if network == "udp6" || network == "tcp6" {
		return nil
	}
	const netOff = 0xfff00000 // SKF_NET_OFF
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: netOff + 16}, // the destination
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: 0xffff0000},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0x7f350000, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	var inner error
	err := raw.Control(func(fd uintptr) {
		inner = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
		if inner == nil && network == "udp4" {
			inner = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(err, inner)
}

// Resolver is the name server that was asked by what arrived at the address at. It is false for what no hook of ours has
// steered there.
func (d *DNS) Resolver(at netip.AddrPort) (netip.AddrPort, bool) {
	return d.ns.r.dns.resolver(d.ns.Cookie, at)
}

// DialPackets opens a connected UDP socket inside the namespace, at a port that the kernel picks. from may be zero.
func (d *DNS) DialPackets(from netip.Addr, to netip.AddrPort) (*net.UDPConn, error) {
	family, any := unix.AF_INET, netip.IPv4Unspecified()
	if to.Addr().Is6() {
		family, any = unix.AF_INET6, netip.IPv6Unspecified()
	}
	if !from.IsValid() {
		from = any
	}
	fd := -1
	err := d.ns.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open socket in network namespace %d: %w", d.ns.Inode, err)
	}
	f := os.NewFile(uintptr(fd), "query to "+to.String())
	defer f.Close()
	if from != any {
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))); err != nil {
			return nil, fmt.Errorf("ask %s from %s: %w", to, from, err)
		}
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return nil, fmt.Errorf("ask %s: %w", to, err)
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", to, err)
	}
	return c.(*net.UDPConn), nil
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	}
	return &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
}

// DialStream connects to a name server from inside the namespace. from may be zero.
func (d *DNS) DialStream(ctx context.Context, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	return d.ns.Dial(ctx, from, to, Announcement{})
}

// Read waits for a query. at is the address it was sent to.
func (p *DNSPackets) Read(b []byte) (n int, from, at netip.AddrPort, err error) {
	if p.at.IsValid() {
		n, from, err = p.conn.ReadFromUDPAddrPort(b)
		return n, from, p.at, err
	}
	var oob [128]byte
	n, oobn, _, from, err := p.conn.ReadMsgUDPAddrPort(b, oob[:])
	if err != nil {
		return 0, netip.AddrPort{}, netip.AddrPort{}, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, netip.AddrPort{}, netip.AddrPort{}, fmt.Errorf("read where a query was sent to: %w", err)
	}
	for _, m := range messages {
		// struct in_pktinfo: interface, the address to answer from, the address in the header
		if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 12 {
			at = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[8:12])), DNSPort)
		}
	}
	return n, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), at, nil
}

// SetReadDeadline makes Read fail with os.ErrDeadlineExceeded from then on, in this process.
func (p *DNSPackets) SetReadDeadline(at time.Time) error { return p.conn.SetReadDeadline(at) }

// Write sends an answer to the client at to, from the address that its query was sent to.
func (p *DNSPackets) Write(b []byte, to, at netip.AddrPort) error {
	if p.at.IsValid() {
		_, err := p.conn.WriteToUDPAddrPort(b, to)
		return err
	}
	oob := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: at.Addr().As4()})
	_, _, err := p.conn.WriteMsgUDPAddrPort(b, oob, to)
	return err
}

// Close ends Read and Accept, and lets the queries of the namespace pass. The name servers keep their slots until the
// namespace is closed.
func (d *DNS) Close() error {
	var errs []error
	for _, p := range d.Packets {
		errs = append(errs, ignoreClosed(p.conn.Close()))
	}
	for _, ln := range d.Streams {
		errs = append(errs, ignoreClosed(ln.Close()))
	}
	return errors.Join(errs...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Socket is what the kernel says of one TCP socket of a namespace (sock_diag(7)).
type Socket struct {
	Local  netip.AddrPort // a wildcard address is unspecified: 0.0.0.0, or :: which takes IPv4 too unless V6Only
	Remote netip.AddrPort // unspecified for a listener
	V6Only bool
	Cookie uint64 // no other socket ever has it
	Cgroup uint64 // id of its creator's cgroup; 0 when it is not known yet
	Inode  uint32
	// Handshaking is a connection whose last ACK has not arrived, or that waits for data (TCP_DEFER_ACCEPT). It has no cgroup yet.
	Handshaking bool
	Listening   bool

	device uint32 // that it is bound to
}

// Listeners lists the sockets of the namespace that listen on port; 0: on any.
func (ns *Namespace) Listeners(port uint16) ([]Socket, error) { return listeners(ns.diag, port) }

func listeners(d *diag, port uint16) ([]Socket, error) {
	var all []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := diagRequest{family: family, states: 1 << tcpListen, sport: port, dump: true}
		found, err := d.query(req)
		if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.ENOENT)) {
			return nil, fmt.Errorf("list listeners on port %d: %w", port, err)
		}
		for _, s := range found {
			if port == 0 || s.Local.Port() == port {
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// Accepted finds the server's end of the connection from client to server, both in this namespace.
func (ns *Namespace) Accepted(client, server netip.AddrPort) (Socket, error) {
	found, err := ns.diag.query(diagRequest{family: familyOf(server.Addr()), states: ^uint32(0), src: server.Addr(), sport: server.Port(), dst: client.Addr(), dport: client.Port()})
	if err != nil {
		return Socket{}, fmt.Errorf("find accepted socket of %s → %s: %w", client, server, err)
	}
	if len(found) == 0 {
		return Socket{}, fmt.Errorf("find accepted socket of %s → %s: %w", client, server, unix.ENOENT)
	}
	return found[0], nil
}

// sockets lists the TCP sockets of the namespace, but for those that are closed or wait for late segments. It keeps nobody
// from asking for listeners meanwhile.
func (ns *Namespace) sockets() (all []Socket, err error) {
	d, err := openDiag(ns)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := d.query(diagRequest{family: family, states: ^uint32(1<<tcpTimeWait | 1<<tcpClose), dump: true})
		if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.ENOENT)) {
			return nil, fmt.Errorf("list sockets of network namespace %d: %w", ns.Inode, err)
		}
		all = append(all, found...)
	}
	return all, nil
}

// Reset ends a connection of the namespace at once; both sides see a reset. One that has ended is no error.
func (ns *Namespace) Reset(s Socket) error {
	req := diagRequest{family: unix.AF_INET6, src: s.Local.Addr(), sport: s.Local.Port(), dst: s.Remote.Addr(), dport: s.Remote.Port(), device: s.device, cookie: s.Cookie}
	if s.Local.Addr().Is4() {
		req.family = unix.AF_INET
	}
	if err := ns.diag.destroy(req); err != nil && !gone(err) {
		return fmt.Errorf("reset %s → %s: %w", s.Local, s.Remote, err)
	}
	return nil
}

const (
	sockDiagByFamily = 20
	sockDestroy      = 21 // SOCK_DESTROY of linux/sock_diag.h
	tcpSynRecv       = 3
	tcpTimeWait      = 6
	tcpClose         = 7
	tcpListen        = 10
	attrSKV6Only     = 11 // INET_DIAG_SKV6ONLY
	attrCgroupID     = 21 // INET_DIAG_CGROUP_ID
	sizeofID         = 48 // struct inet_diag_sockid
	sizeofRequest    = 8 + sizeofID
	sizeofMessage    = 4 + sizeofID + 20
)

// diag is a sock_diag socket in one namespace. Queries take turns.
type diag struct {
	mu  sync.Mutex
	fd  int
	seq uint32
}

// answers are buffers for what the kernel answers: there are many sockets, and few of them ask at a time.
var answers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

type diagRequest struct {
	family       uint8
	states       uint32
	dump         bool
	src, dst     netip.Addr
	sport, dport uint16
	device       uint32 // what the socket is bound to
	cookie       uint64 // 0: any
	typ          uint16 // 0: sockDiagByFamily
}

func openDiag(ns *Namespace) (d *diag, err error) {
	err = ns.Do(func() (err error) {
		d, err = newDiag()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open sock_diag in network namespace %d: %w", ns.Inode, err)
	}
	return d, nil
}

// newDiag opens one in the namespace of the calling thread.
func newDiag() (*diag, error) {
	d := &diag{}
	var err error
	d.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("%w (is the kernel built with INET_DIAG?)", err)
	}
	// The kernel answers within the call; the deadline guards against a lost answer.
	if err := unix.SetsockoptTimeval(d.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, errors.Join(fmt.Errorf("set sock_diag deadline: %w", err), d.close())
	}
	return d, nil
}

func (d *diag) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil
	}
	err := unix.Close(d.fd)
	d.fd = -1
	return err
}

func (d *diag) query(req diagRequest) ([]Socket, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil, errors.New("network namespace is closed")
	}
	d.seq++
	if err := unix.Sendto(d.fd, req.encode(d.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	buf := answers.Get().(*[32 << 10]byte)
	defer answers.Put(buf)
	var found []Socket
	for {
		n, _, err := unix.Recvfrom(d.fd, buf[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		done, err := d.parse(buf[:n], req.dump, &found)
		if done || err != nil {
			return found, err
		}
	}
}

// destroy resets the connection that the request names by its cookie too: without one, what else would be found in place
// of a connection that is gone is the listener.
func (d *diag) destroy(req diagRequest) error {
	req.typ, req.states = sockDestroy, ^uint32(0)
	_, err := d.query(req)
	return err
}

// gone says whether a query's error means that there is no such connection.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) }

func (q diagRequest) encode(seq uint32) []byte {
	flags, typ := uint16(unix.NLM_F_REQUEST), uint16(sockDiagByFamily)
	if q.dump {
		flags |= unix.NLM_F_DUMP
	}
	if q.typ != 0 {
		flags, typ = flags|unix.NLM_F_ACK, q.typ
	}
	b := make([]byte, 0, unix.NLMSG_HDRLEN+sizeofRequest)
	ne := binary.NativeEndian
	b = ne.AppendUint32(b, unix.NLMSG_HDRLEN+sizeofRequest)
	b = ne.AppendUint16(b, typ)
	b = ne.AppendUint16(b, flags)
	b = ne.AppendUint32(b, seq)
	b = ne.AppendUint32(b, 0)
	b = append(b, q.family, unix.IPPROTO_TCP, 0, 0)
	b = ne.AppendUint32(b, q.states)
	b = binary.BigEndian.AppendUint16(b, q.sport)
	b = binary.BigEndian.AppendUint16(b, q.dport)
	b = appendDiagAddr(b, q.src)
	b = appendDiagAddr(b, q.dst)
	b = ne.AppendUint32(b, q.device)
	if q.cookie == 0 {
		return ne.AppendUint64(b, ^uint64(0)) // INET_DIAG_NOCOOKIE
	}
	return ne.AppendUint32(ne.AppendUint32(b, uint32(q.cookie)), uint32(q.cookie>>32))
}

func appendDiagAddr(b []byte, ip netip.Addr) []byte {
	var raw [16]byte
	copy(raw[:], ip.AsSlice())
	return append(b, raw[:]...)
}

// parse reads one datagram of the answer. done: the answer is complete.
func (d *diag) parse(b []byte, dump bool, found *[]Socket) (done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(ne.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true, errors.New("sock_diag answer is truncated")
		}
		body := b[unix.NLMSG_HDRLEN:size]
		typ, seq := ne.Uint16(b[4:]), ne.Uint32(b[8:])
		b = b[min(len(b), (size+3)&^3):]
		if seq != d.seq {
			continue // the late answer to a query that ran into its deadline
		}
		switch typ {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return true, errors.New("sock_diag answer is truncated")
			}
			if code := int32(ne.Uint32(body)); code != 0 {
				return true, unix.Errno(-code)
			}
			return true, nil
		case sockDiagByFamily:
			if len(body) < sizeofMessage {
				return true, errors.New("sock_diag answer is truncated")
			}
			*found = append(*found, parseSocket(body))
			done = !dump
		}
	}
	return done, nil
}

func parseSocket(body []byte) Socket {
	ne := binary.NativeEndian
	id := body[4:]
	end := func(port, ip []byte) netip.AddrPort {
		if body[0] == unix.AF_INET {
			ip = ip[:4]
		}
		addr, _ := netip.AddrFromSlice(ip)
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(port))
	}
	s := Socket{
		Local:       end(id, id[4:20]),
		Remote:      end(id[2:], id[20:36]),
		device:      ne.Uint32(id[36:]),
		Inode:       ne.Uint32(body[4+sizeofID+16:]),
		Cookie:      uint64(ne.Uint32(id[40:])) | uint64(ne.Uint32(id[44:]))<<32,
		Handshaking: body[1] == tcpSynRecv,
		Listening:   body[1] == tcpListen,
	}
	for attrs := body[sizeofMessage:]; len(attrs) >= 4; {
		size, typ := int(ne.Uint16(attrs)), ne.Uint16(attrs[2:])
		if size < 4 || size > len(attrs) {
			break
		}
		switch payload := attrs[4:size]; {
		case typ == attrCgroupID && len(payload) >= 8:
			s.Cgroup = ne.Uint64(payload)
		case typ == attrSKV6Only && len(payload) >= 1:
			s.V6Only = payload[0] != 0
		}
		attrs = attrs[min(len(attrs), (size+3)&^3):]
	}
	return s
}

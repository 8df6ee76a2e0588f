package check

import (
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanaryCommand is the hidden command by which the program runs RunErrands.
const CanaryCommand = "canary"

// errandTimeout bounds a connect, and what follows it.
const errandTimeout = 2 * time.Second

// errandKind says what a canary process does.
type errandKind string

const (
	through   errandKind = "through"   // connect, and wait for the other end to close
	mapped    errandKind = "mapped"    // through, to an IPv4 address by an IPv6 socket
	plaintext errandKind = "plaintext" // connect to an address of this network namespace
	handshake errandKind = "handshake" // plaintext, and TLS without a client certificate
)

// errand is one connection of a canary process.
type errand struct {
	Kind errandKind     `json:"kind"`
	To   netip.AddrPort `json:"to"`
}

// outcome is what became of an errand.
type outcome struct {
	errand
	Skipped   bool           `json:"skipped,omitempty"` // it makes no sense in this network namespace
	Connected bool           `json:"connected,omitempty"`
	Refused   bool           `json:"refused,omitempty"` // the connect, with ECONNREFUSED
	Error     string         `json:"error,omitempty"`   // of the connect, or of the handshake before a certificate came
	Peer      netip.AddrPort `json:"peer,omitzero"`     // as getpeername(2) has it
	Closed    bool           `json:"closed,omitempty"`  // by the other end
	Identity  string         `json:"identity,omitempty"`
	NotAfter  time.Time      `json:"not_after,omitzero"`
	Alert     string         `json:"alert,omitempty"` // the server's answer to the missing certificate
}

// RunErrands is a canary process, which was born in the workload's network namespace. It runs the errands that it reads from
// in, and writes their outcomes to out.
func RunErrands(in io.Reader, out io.Writer) error {
	var errands []errand
	if err := json.NewDecoder(in).Decode(&errands); err != nil {
		return fmt.Errorf("read errands: %w: only \"nodeproxy check --workloads\" starts this command", err)
	}
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0) // best effort: if the workload's memory is short, we go first
	runtime.LockOSThread()                                          // for good: the process ends with this
	if name, err := unix.BytePtrFromString("np-canary"); err == nil {
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0) // what the trace shows instead of "exe"
	}
	outcomes := make([]outcome, len(errands))
	for i, e := range errands {
		outcomes[i] = outcome{errand: e}
		outcomes[i].run()
	}
	return json.NewEncoder(out).Encode(outcomes)
}

// run must stay on the calling thread as long as it opens sockets: the thread's network namespace counts.
func (o *outcome) run() {
	if (o.Kind == plaintext || o.Kind == handshake) && !isLocal(o.To.Addr()) {
		o.Skipped = true
		return
	}
	fd, err := unix.Socket(o.family(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		o.Skipped, o.Error = errors.Is(err, unix.EAFNOSUPPORT), fmt.Sprintf("open a socket: %s", err)
		return
	}
	err = o.connect(fd)
	closed := errors.Is(err, unix.ECONNRESET) // accepted, and closed before we looked
	if err != nil && !closed {
		_ = unix.Close(fd)
		o.Refused, o.Error = errors.Is(err, unix.ECONNREFUSED), fmt.Sprintf("connect to %s: %s", o.To, err)
		return
	}
	o.Connected, o.Closed, o.Peer = true, closed, peerName(fd)
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	if o.Kind == plaintext || closed {
		return
	}
	conn, err := net.FileConn(f)
	if err != nil {
		o.Error = err.Error()
		return
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(errandTimeout)); err != nil {
		o.Error = err.Error()
		return
	}
	if o.Kind == handshake {
		o.shakeHands(conn)
		return
	}
	_, err = conn.Read(make([]byte, 1))
	o.Closed = err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

func (e errand) family() int {
	if e.To.Addr().Is4() && e.Kind != mapped {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (e errand) connect(fd int) error {
	var to unix.Sockaddr = &unix.SockaddrInet6{Port: int(e.To.Port()), Addr: e.To.Addr().As16()}
	if e.family() == unix.AF_INET {
		to = &unix.SockaddrInet4{Port: int(e.To.Port()), Addr: e.To.Addr().As4()}
	}
	err := unix.Connect(fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		err = finishConnect(fd)
	}
	return err
}

func finishConnect(fd int) error {
	deadline := time.Now().Add(errandTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("no answer within %s", errandTimeout)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			break
		}
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}

// peerName is what getpeername(2) says, invalid where it fails. It is asked for by SO_PEERNAME, which runs the same hooks
// and answers also once the other end has reset the connection.
func peerName(fd int) netip.AddrPort {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return netip.AddrPort{}
	}
	var raw unix.RawSockaddrInet6 // the larger one
	size := uint32(unix.SizeofSockaddrInet6)
	if domain == unix.AF_INET {
		size = unix.SizeofSockaddrInet4 // more is an error
	}
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERNAME,
		uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&raw.Port))[:])
	if domain == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&raw)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(raw.Addr).Unmap(), port)
}

func isLocal(ip netip.Addr) bool {
	local, _ := net.InterfaceAddrs() // none, where they cannot be read
	return slices.ContainsFunc(local, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr() == ip
	})
}

// shakeHands looks at the certificate that the server shows, and at its answer to having got none. With TLS 1.3 that comes
// after the handshake.
func (o *outcome) shakeHands(conn net.Conn) {
	secure := tls.Client(conn, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // nothing is sent: the certificate is only shown to the operator
	})
	if err := secure.Handshake(); err != nil {
		o.Error = err.Error()
		return
	}
	if certs := secure.ConnectionState().PeerCertificates; len(certs) > 0 {
		o.NotAfter = certs[0].NotAfter
		if len(certs[0].URIs) > 0 {
			o.Identity = certs[0].URIs[0].String()
		}
	}
	_, err := secure.Read(make([]byte, 1))
	if remote, ok := errors.AsType[*net.OpError](err); ok && remote.Op == "remote error" {
		o.Alert = remote.Err.Error()
	}
}

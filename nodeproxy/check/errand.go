package check

import (
	"crypto/tls"
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

const (
	errandTimeout = 2 * time.Second // of a connect, and of what follows it
	maxTries      = 30
)

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
	From      netip.AddrPort `json:"from,omitzero"`
	Peer      netip.AddrPort `json:"peer,omitzero"`    // as getpeername(2) has it
	Closed    bool           `json:"closed,omitempty"` // by the other end
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
		// A connection that was closed before its addresses could be read proves less: try a few more.
		for range maxTries {
			outcomes[i] = outcome{errand: e}
			outcomes[i].run()
			if !outcomes[i].Connected || outcomes[i].Peer.IsValid() {
				break
			}
		}
	}
	return json.NewEncoder(out).Encode(outcomes)
}

// run must stay on the calling thread as long as it opens sockets: the thread's network namespace counts.
func (o *outcome) run() {
	if (o.Kind == plaintext || o.Kind == handshake) && !isLocal(o.To.Addr()) {
		o.Skipped = true
		return
	}
	fd, err := o.connect()
	if errors.Is(err, unix.ECONNRESET) {
		o.Connected, o.Closed = true, true // accepted, and closed before we looked
		return
	}
	if err != nil {
		o.Skipped, o.Refused = errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ECONNREFUSED)
		o.Error = err.Error()
		return
	}
	o.Connected = true
	o.From, o.Peer = addresses(fd)
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	if o.Kind == plaintext {
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

// connect returns a connected socket, which is the caller's.
func (e errand) connect() (fd int, err error) {
	ip := e.To.Addr()
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(e.To.Port()), Addr: ip.As16()})
	if ip.Is4() && e.Kind != mapped {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(e.To.Port()), Addr: ip.As4()}
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a socket: %w", err)
	}
	err = unix.Connect(fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		err = finishConnect(fd)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", e.To, err)
	}
	return fd, nil
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

// addresses are what getsockname(2) and getpeername(2) say, invalid where they fail.
func addresses(fd int) (own, peer netip.AddrPort) {
	if sa, err := unix.Getsockname(fd); err == nil {
		own = addrPort(sa)
	}
	if sa, err := unix.Getpeername(fd); err == nil {
		peer = addrPort(sa)
	}
	return own, peer
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
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

package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a blocking TCP socket. Load and server use system calls and no runtime poller: its wake-ups would be a good
// part of a plain round trip, and hide what a proxy adds.
type socket int

// patience bounds every wait of the load, so that a broken path ends the run and does not hang it.
const patience = 20 * time.Second

func dial(to netip.AddrPort) (socket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a socket: %w", err)
	}
	s := socket(fd)
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
	)
	if err == nil {
		err = s.connect(&unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	}
	if err != nil {
		s.close()
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return s, nil
}

// connect goes on waiting after a signal: Linux then finds the connection where it was (connect(2) on a blocking socket that
// is connecting), and the runtime sends itself signals.
func (s socket) connect(to unix.Sockaddr) error {
	for {
		if err := unix.Connect(int(s), to); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func listen(at netip.AddrPort) (socket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a socket: %w", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), // accepted sockets inherit it
		unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}),
		unix.Listen(fd, 4096),
	)
	if err != nil {
		socket(fd).close()
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	return socket(fd), nil
}

func (s socket) accept() (socket, error) {
	for {
		fd, _, err := unix.Accept4(int(s), unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		return socket(fd), err
	}
}

// Read implements io.Reader.
func (s socket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(s), p)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// Write implements io.Writer.
func (s socket) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		n, err := unix.Write(int(s), p[done:])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return done, fmt.Errorf("write: %w", err)
		}
		done += max(n, 0)
	}
	return len(p), nil
}

func (s socket) close() { _ = unix.Close(int(s)) } // its bytes were acknowledged by an answer

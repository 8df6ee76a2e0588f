package main

import (
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// options says how dial opens its socket and what it does with it.
type options struct {
	bind        string
	device      string
	fastOpen    bool
	mapped      bool
	nonBlocking bool
	payload     int64
	half        bool
	reset       bool
	close       bool
	timeout     time.Duration
}

// dial connects and prints "connected local=… peer=…", then what comes, then "end: eof", "end: reset" or "end: ERROR". If it
// cannot connect it prints "refused: ERROR" with the errno's name.
func dial(args []string) error {
	var o options
	flags := flag.NewFlagSet("dial", flag.ContinueOnError)
	flags.StringVar(&o.bind, "bind", "", "bind to this ip:port first")
	flags.StringVar(&o.device, "device", "", "bind to this device first")
	flags.BoolVar(&o.fastOpen, "fastopen", false, "send the command with the SYN")
	flags.BoolVar(&o.mapped, "mapped", false, "dial an IPv4 address from an IPv6 socket")
	flags.BoolVar(&o.nonBlocking, "nonblocking", false, "connect without blocking, then poll")
	flags.Int64Var(&o.payload, "payload", 0, "send this many bytes after the command")
	flags.BoolVar(&o.half, "half", false, "half-close after sending")
	flags.BoolVar(&o.reset, "reset", false, "reset the connection after the first answer")
	flags.BoolVar(&o.close, "close", false, "close the connection after the first answer")
	flags.DurationVar(&o.timeout, "timeout", 30*time.Second, "give up after")
	if err := flags.Parse(args); err != nil {
		return err
	}
	command := flags.Arg(1)
	if command != "" {
		command += "\n"
	}
	if path := flags.Arg(0); strings.HasPrefix(path, "/") {
		return o.dialUnix(path, command)
	}
	to, err := netip.ParseAddrPort(flags.Arg(0))
	if err != nil {
		return err
	}
	conn, err := o.connect(to, command)
	if err != nil {
		fmt.Printf("refused: %s\n", errorName(err))
		return nil
	}
	defer conn.Close()
	fmt.Printf("connected local=%s peer=%s\n", conn.LocalAddr(), peerName(conn))
	if o.fastOpen {
		command = ""
	}
	return o.talk(conn, command)
}

func (o *options) dialUnix(path, command string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		fmt.Printf("refused: %s\n", errorName(err))
		return nil
	}
	defer conn.Close()
	fmt.Printf("connected peer=%s\n", path)
	return o.talk(conn.(*net.UnixConn), command)
}

func (o *options) talk(conn interface {
	net.Conn
	CloseWrite() error
}, command string) error {
	_ = conn.SetDeadline(time.Now().Add(o.timeout))
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, command)
		if err == nil {
			_, err = io.Copy(conn, io.LimitReader(pattern{}, o.payload))
		}
		if err == nil && o.half {
			err = conn.CloseWrite()
		}
		sent <- err
	}()
	if o.reset || o.close {
		_, _ = conn.Read(make([]byte, 1500))
		if tcp, ok := conn.(*net.TCPConn); ok && o.reset {
			_ = tcp.SetLinger(0)
		}
		return conn.Close()
	}
	_, err := io.Copy(os.Stdout, conn)
	switch {
	case err == nil:
		fmt.Println("end: eof")
	case errors.Is(err, unix.ECONNRESET):
		fmt.Println("end: reset")
	default:
		fmt.Printf("end: %s\n", errorName(err))
	}
	if err := <-sent; err != nil {
		fmt.Printf("send: %s\n", errorName(err))
	}
	return nil
}

func (o *options) connect(to netip.AddrPort, command string) (*net.TCPConn, error) {
	family := unix.AF_INET
	if to.Addr().Is6() || o.mapped {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	if o.device != "" {
		if err := unix.BindToDevice(fd, o.device); err != nil {
			return nil, err
		}
	}
	if o.bind != "" {
		from, err := netip.ParseAddrPort(o.bind)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, sockaddr(from, family))); err != nil {
			return nil, err
		}
	}
	if err := o.establish(fd, sockaddr(to, family), command); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

func (o *options) establish(fd int, to unix.Sockaddr, command string) error {
	switch {
	case o.fastOpen:
		return unix.Sendto(fd, []byte(command), unix.MSG_FASTOPEN, to)
	case o.nonBlocking:
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		if err := unix.Connect(fd, to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(o.timeout.Milliseconds())); err != nil {
			return err
		}
		if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
			return errors.Join(err, unix.Errno(code))
		}
		return nil
	default:
		return unix.Connect(fd, to)
	}
}

// hold opens connections and keeps them until stdin ends.
func hold(args []string) error {
	flags := flag.NewFlagSet("hold", flag.ContinueOnError)
	n := flags.Int("n", 1, "connections")
	say := flags.String("say", "", "what is sent on each, in hexadecimal")
	await := flags.Bool("await", false, "open each when something has come on the one before")
	if err := flags.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(flags.Arg(0))
	if err != nil {
		return err
	}
	hello, err := hex.DecodeString(*say)
	if err != nil {
		return err
	}
	refused := make(map[string]int)
	var held []int
	for range *n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to, unix.AF_INET)); err != nil {
			refused[errorName(err)]++
			_ = unix.Close(fd)
			continue
		}
		_, _ = unix.Write(fd, hello) // it may be closed by now
		if *await {
			if _, err := unix.Read(fd, make([]byte, 1)); err != nil {
				return err
			}
		}
		held = append(held, fd)
	}
	fmt.Printf("held=%d refused=%v\n", len(held), refused)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// repeat opens and closes connections one after the other, from several goroutines.
func repeat(args []string) error {
	flags := flag.NewFlagSet("repeat", flag.ContinueOnError)
	n := flags.Int("n", 1, "connections")
	atOnce := flags.Int("at-once", 1, "how many at once")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var left, answered atomic.Int64
	left.Store(int64(*n))
	failures := make(chan string, *n)
	var clients sync.WaitGroup
	for range *atOnce {
		clients.Go(func() {
			for left.Add(-1) >= 0 {
				if err := peerOf(flags.Arg(0)); err != nil {
					failures <- errorName(err)
					continue
				}
				answered.Add(1)
			}
		})
	}
	clients.Wait()
	close(failures)
	failed := make(map[string]int)
	for name := range failures {
		failed[name]++
	}
	fmt.Printf("answered=%d failed=%v\n", answered.Load(), failed)
	return nil
}

// peerOf has one connection answered and closes it.
func peerOf(address string) error {
	conn, err := net.DialTimeout("tcp", address, 30*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err == nil && !strings.HasPrefix(string(answer), "accept=") {
		err = fmt.Errorf("answer %.40q", answer)
	}
	return err
}

func sockaddr(a netip.AddrPort, family int) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// errorName is the errno's name, such as ECONNREFUSED, or the error's text.
func errorName(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "timeout"
	}
	return err.Error()
}

package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// quick accepts on a port of every IPv4 address and ends each connection at once: it says "accept=bye" and closes, or
// with -reset says nothing and resets. It does not sleep meanwhile, so as to be quicker than whoever looks. It runs until it is killed.
func quick(args []string) error {
	flags := flag.NewFlagSet("quick", flag.ContinueOnError)
	reset := flags.Bool("reset", false, "reset instead of closing")
	port := flags.Int("port", 8080, "listen on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: *port}), unix.Listen(fd, 128)); err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if *reset {
			err = unix.SetsockoptLinger(conn, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		} else {
			_, _ = unix.Write(conn, []byte("accept=bye\n")) // the client may be gone
		}
		if err := errors.Join(err, unix.Close(conn)); err != nil {
			return err
		}
	}
}

// flip moves the process from its network namespace into new ones and back as fast as it can, until it is killed.
func flip([]string) error {
	runtime.LockOSThread() // the process's namespace, for others, is that of its first thread: see init
	open := func() (*os.File, error) { return os.Open("/proc/thread-self/ns/net") }
	home, err := open()
	if err != nil {
		return err
	}
	var others [8]*os.File
	for i := range others {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if others[i], err = open(); err != nil {
			return err
		}
	}
	enter := func(ns *os.File) error { return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET) }
	if err := enter(home); err != nil {
		return err
	}
	fmt.Println("ready")
	for i := 0; ; i++ {
		if err := errors.Join(enter(others[i%len(others)]), enter(home)); err != nil {
			return err
		}
	}
}

// init keeps the main goroutine of flip on the process's first thread.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "flip" {
		runtime.LockOSThread()
	}
}

package nodeproxy

import (
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// The back-off of an accept that fails, as it does while the process is out of file descriptors.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = time.Second
)

func (p *Proxy) accept(ln *net.TCPListener, serve func(*net.TCPConn)) {
	if err := keepListener(ln); err != nil {
		p.cfg.Log.Error("set keep-alive on a listener: it is set on each connection", "listener", ln.Addr(), "error", err)
	}
	first, inherited := true, false
	acceptAll(p, ln.Addr(), ln.AcceptTCP, func(conn *net.TCPConn) {
		if first { // package net may set its own on each connection, as it does for a listener made from a file
			first, inherited = false, keptIdle(conn) == keepAlive.Idle
		}
		if !inherited {
			_ = conn.SetKeepAliveConfig(keepAlive) // it fails only when conn is closed already
		}
		serve(conn)
	})
}

// keepListener sets keepAlive on a listener: what it accepts inherits that, which spares each connection four system calls.
func keepListener(ln *net.TCPListener) error {
	raw, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	var errSet error
	err = raw.Control(func(fd uintptr) {
		set := func(level, option, value int) error { return unix.SetsockoptInt(int(fd), level, option, value) }
		errSet = errors.Join(
			set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds())),
			set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval.Seconds())),
			set(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count),
		)
	})
	return errors.Join(err, errSet)
}

// keptIdle is after how long conn asks an idle peer whether it is there; 0 if never.
func keptIdle(conn *net.TCPConn) (idle time.Duration) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if on, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); on != 0 {
			seconds, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
			idle = time.Duration(seconds) * time.Second
		}
	})
	return idle
}

// acceptAll calls serve for every connection of a listener, until that is closed. serve must not block.
//
// Errors of accept pass with time (a connection that was aborted, no file descriptor or memory left), so the loop waits
// a little longer after each and never gives a listener up. The connections wait in the backlog meanwhile.
func acceptAll[C net.Conn](p *Proxy, at net.Addr, accept func() (C, error), serve func(C)) {
	var backoff time.Duration
	for {
		conn, err := accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			backoff = 0
			serve(conn)
			continue
		}
		if backoff == 0 {
			p.cfg.Log.Warn("accept: new connections wait: raise the limit of open files (LimitNOFILE) if it is the cause", "listener", at, "error", err)
		}
		backoff = min(max(2*backoff, minAcceptBackoff), maxAcceptBackoff)
		time.Sleep(backoff)
	}
}

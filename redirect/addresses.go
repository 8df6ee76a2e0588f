package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addresses are those of a namespace, and what the kernel tells of changes of them (rtnetlink(7)).
type addresses struct {
	news int // a netlink socket

	mu    sync.Mutex
	known []netip.Addr
	read  bool
}

func openAddresses(ns *Namespace) (a *addresses, err error) {
	a = &addresses{}
	err = ns.Do(func() (err error) {
		a.news, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		if err := unix.Bind(a.news, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR}); err != nil {
			return errors.Join(err, unix.Close(a.news))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("watch addresses of network namespace %d: %w", ns.Inode, err)
	}
	return a, nil
}

func (a *addresses) close() error { return unix.Close(a.news) }

// quiet takes what the kernel has told, and says whether that was nothing. What it had no room for it tells too.
func (a *addresses) quiet() bool {
	var one [1]byte
	for quiet := true; ; quiet = false {
		if _, _, err := unix.Recvfrom(a.news, one[:], unix.MSG_TRUNC); errors.Is(err, unix.EAGAIN) {
			return quiet
		} else if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}

// Addresses lists the IP addresses of the namespace's interfaces. The kernel is asked for them only after it has told of a change. The
// slice is not the caller's.
func (ns *Namespace) Addresses() ([]netip.Addr, error) {
	a := ns.addresses
	if a == nil {
		return ns.readAddresses()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.quiet() && a.read { // before the look: what changes after it is told at the next
		return a.known, nil
	}
	all, err := ns.readAddresses()
	a.read = err == nil
	if err != nil {
		return nil, err
	}
	if !slices.Equal(all, a.known) {
		a.known = all
	}
	return a.known, nil
}

func (ns *Namespace) readAddresses() ([]netip.Addr, error) {
	var all []netip.Addr
	err := ns.Do(func() error {
		// Other families would each open a socket.
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				all = append(all, ip.Unmap())
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses of network namespace %d: %w", ns.Inode, err)
	}
	return all, nil
}

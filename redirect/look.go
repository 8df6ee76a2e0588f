package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Look is what there is in a network namespace at one moment.
type Look struct {
	Inode     uint64 // of /proc/PID/ns/net
	Foreign   bool   // it belongs to another user namespace than this process: who made it may have given it any address
	Addresses []netip.Addr
	Listeners []Socket
}

// Has says whether ip is an address of the namespace.
func (l *Look) Has(ip netip.Addr) bool { return slices.Contains(l.Addresses, ip) }

// Listens says whether a connection to at would reach s.
func (s Socket) Listens(at netip.AddrPort) bool {
	ip := s.Local.Addr()
	return s.Local.Port() == at.Port() && (ip == at.Addr() || ip.IsUnspecified() && (ip.Is4() == at.Addr().Is4() || ip.Is6() && !s.V6Only))
}

// LookInto looks into the network namespace of a process once, and keeps nothing open.
func LookInto(pid int) (*Look, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("look into the network namespace of process %d: %w", pid, err)
	}
	defer file.Close()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("find own network namespace: %w", err)
	}
	defer home.Close()
	ns := &Namespace{file: file, r: &Redirect{home: home}}
	look := new(Look)
	err = ns.identify()
	if err == nil {
		look.Inode = ns.Inode
		look.Foreign, err = isForeign(file)
	}
	if err == nil {
		look.Addresses, err = ns.Addresses()
	}
	if err != nil {
		return nil, fmt.Errorf("look into the network namespace of process %d: %w", pid, err)
	}
	d, err := openDiag(ns)
	if err != nil {
		return nil, err
	}
	look.Listeners, err = listeners(d, 0)
	return look, errors.Join(err, d.close())
}

// isForeign says whether a network namespace belongs to another user namespace than this process.
func isForeign(netns *os.File) (bool, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, netns.Fd(), unix.NS_GET_USERNS, 0)
	if errors.Is(errno, unix.EPERM) {
		return true, nil // it is none of ours, nor below
	}
	if errno != 0 {
		return false, fmt.Errorf("find whose it is: %w", errno)
	}
	defer unix.Close(int(fd))
	var st, own unix.Stat_t
	if err := errors.Join(unix.Fstat(int(fd), &st), unix.Stat("/proc/self/ns/user", &own)); err != nil {
		return false, fmt.Errorf("find whose it is: %w", err)
	}
	return st.Ino != own.Ino, nil
}

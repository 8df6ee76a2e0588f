package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace without a name, with its loopback up. It lives as long as the Lab holds it or a
// process is in it.
type Namespace struct {
	inode  uint64
	cookie uint64 // like inode, but never given to another namespace

	mu     sync.RWMutex // held for reading while the descriptor is in use
	file   *os.File
	handle *netlink.Handle
}

// Namespace makes a network namespace with IPv4 and IPv6, loopback up, and duplicate address detection off. Close of the
// Lab lets go of it.
func (l *Lab) Namespace() (*Namespace, error) {
	file, err := unshareNet()
	if err != nil {
		return nil, err
	}
	n := &Namespace{file: file}
	l.onClose(n.close)
	if err := n.setUp(); err != nil {
		return nil, fmt.Errorf("set up a network namespace: %w", err)
	}
	l.mu.Lock()
	l.cookies = append(l.cookies, n.cookie)
	l.mu.Unlock()
	return n, nil
}

// unshareNet makes a namespace and returns to the caller's. A thread is not simply thrown away with its goroutine: the
// process's first thread cannot be, and would hold the namespace for ever.
func unshareNet() (*os.File, error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	file, err := os.Open("/proc/thread-self/ns/net")
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, errors.Join(err, fmt.Errorf("leave the new network namespace: %w", back)) // the thread stays locked
	}
	runtime.UnlockOSThread()
	return file, err
}

func (n *Namespace) setUp() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return err
	}
	n.inode = st.Ino
	if err := n.Do(func() (err error) {
		if n.cookie, err = currentCookie(); err != nil {
			return err
		}
		n.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE) // every other family may be missing from the kernel
		return err
	}); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	for _, conf := range []string{"all", "default"} {
		if err := n.Sysctl("net/ipv6/conf/"+conf+"/accept_dad", "0"); err != nil {
			return err
		}
		if err := n.Sysctl("net/ipv6/conf/"+conf+"/disable_ipv6", "0"); err != nil {
			return err
		}
	}
	lo, err := n.handle.LinkByName("lo")
	if err != nil {
		return err
	}
	return n.handle.LinkSetUp(lo)
}

// currentCookie identifies the namespace that the calling thread is in.
func currentCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

func (n *Namespace) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.handle != nil {
		n.handle.Close()
	}
	return n.file.Close()
}

// Inode identifies the namespace, as /proc/PID/ns/net does.
func (n *Namespace) Inode() uint64 { return n.inode }

// Cookie identifies the namespace, as SO_NETNS_COOKIE does.
func (n *Namespace) Cookie() uint64 { return n.cookie }

// Path names the namespace for other programs (nsenter --net=PATH) while the Lab is open.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// enter moves the calling thread into the namespace. The caller has locked the thread.
func (n *Namespace) enter() error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %d: %w", n.inode, err)
	}
	return nil
}

// Do runs f on a thread that is inside the namespace and returns f's error. Only what f does on its own goroutine happens
// there: f must not start goroutines that open sockets, resolve names, or end by runtime.Goexit (testing's FailNow).
func (n *Namespace) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		err := errors.New("run in a network namespace: the function did not return")
		defer func() { result <- err }()
		runtime.LockOSThread()
		home, openErr := os.Open("/proc/thread-self/ns/net")
		if openErr != nil {
			err = openErr
			return
		}
		defer home.Close()
		if err = n.enter(); err != nil {
			return
		}
		defer func() {
			// A thread that is stuck in the namespace stays locked, and so ends with this goroutine.
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	return <-result
}

// Dial connects from inside the namespace. address must be literal: names are resolved on other threads.
func (n *Namespace) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialWith(ctx, net.Dialer{}, network, address)
}

// DialWith is Dial with a dialer of the caller's.
func (n *Namespace) DialWith(ctx context.Context, d net.Dialer, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace. address must be literal. The caller closes the listener.
func (n *Namespace) Listen(network, address string) (ln net.Listener, err error) {
	err = n.Do(func() (err error) {
		ln, err = net.Listen(network, address)
		return err
	})
	return ln, err
}

// Sysctl sets a value below /proc/sys in this namespace, such as net/ipv4/ip_forward.
func (n *Namespace) Sysctl(key, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
		return nil
	})
}

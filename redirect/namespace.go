package redirect

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace in which the daemon listens. It keeps the namespace alive until Close.
type Namespace struct {
	Cookie uint64 // SO_NETNS_COOKIE
	Inode  uint64 // of the namespace's file
	Host   bool   // the daemon's own

	Outbound []*net.TCPListener // where redirected connections arrive: IPv4, and IPv6 where there is one
	Inbound  []*net.TCPListener // where steered connections arrive

	file      *os.File
	diag      *diag
	addresses *addresses // nil: they are read each time
	lookup    link.Link
	dns       *DNS          // nil until OpenDNS
	prog      *ebpf.Program // what it runs
	dir       string        // of its pins
	r         *Redirect

	foreign foreign // ForeignRedirect's own
}

// OpenNamespace listens in the network namespace that file stands for (/proc/PID/ns/net), guards it with sk_lookup and
// only then lets redirects go there. A namespace is opened once at a time. It takes ownership of file. Until SetRules says otherwise nothing inbound is touched.
func (r *Redirect) OpenNamespace(file *os.File) (_ *Namespace, err error) {
	ns := &Namespace{file: file, r: r}
	if err := ns.identify(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	r.mu.Lock()
	_, open := r.namespaces[ns.Cookie]
	r.mu.Unlock()
	if open {
		return nil, errors.Join(fmt.Errorf("open network namespace %d: it is open already", ns.Inode), file.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ns.undo())
		}
	}()
	if ns.diag, err = openDiag(ns); err != nil {
		return nil, err
	}
	if ns.addresses, err = openAddresses(ns); err != nil {
		return nil, err
	}
	if err := ns.countCloses(); err != nil {
		return nil, err
	}
	if ns.Outbound, err = ns.listen(outboundListenerKindLISTENER_OUTBOUND); err != nil {
		return nil, err
	}
	if ns.Inbound, err = ns.listen(outboundListenerKindLISTENER_INBOUND); err != nil {
		return nil, err
	}
	if err := ns.attachLookup(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.obj.NsReady.Put(ns.Cookie, ns.ports()); err != nil {
		return nil, fmt.Errorf("open namespace %d for redirects: %w", ns.Inode, err)
	}
	r.namespaces[ns.Cookie] = ns
	delete(r.inherited, ns.Cookie)
	return ns, nil
}

// Close stops redirects to the namespace, removes its guard and closes its listeners, in that order, so that nothing that
// is still enrolled there falls through.
func (ns *Namespace) Close() error {
	ns.r.mu.Lock()
	delete(ns.r.namespaces, ns.Cookie)
	delete(ns.r.programs, ns.prog)
	ns.r.mu.Unlock()
	return ns.undo()
}

func (ns *Namespace) undo() error {
	var errs []error
	if err := ns.r.obj.NsReady.Delete(ns.Cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("close namespace %d for redirects: %w", ns.Inode, err))
	}
	errs = append(errs, ns.r.forgetDNSSpace(ns.Cookie))
	if err := ns.r.obj.Closes.Delete(ns.Cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("forget closed listeners of network namespace %d: %w", ns.Inode, err))
	}
	if ns.lookup != nil {
		errs = append(errs, os.RemoveAll(ns.dir), ns.lookup.Close())
	}
	return errors.Join(append(errs, ns.closeSockets())...)
}

// closeSockets closes what dies with the process anyway, and leaves what is pinned.
func (ns *Namespace) closeSockets() error {
	var errs []error
	for _, ln := range append(ns.Outbound, ns.Inbound...) {
		if err := ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if ns.dns != nil {
		errs = append(errs, ns.dns.Close())
	}
	if ns.diag != nil {
		errs = append(errs, ns.diag.close())
	}
	if ns.addresses != nil {
		errs = append(errs, ns.addresses.close())
	}
	if ns.prog != nil {
		errs = append(errs, ns.prog.Close())
	}
	return errors.Join(append(errs, ns.file.Close())...)
}

func (ns *Namespace) ports() outboundNsReady {
	var ready outboundNsReady
	for _, ln := range ns.Outbound {
		at := ln.Addr().(*net.TCPAddr).AddrPort()
		if at.Addr().Is4() {
			ready.Port4 = at.Port()
		} else {
			ready.Port6 = at.Port()
		}
	}
	return ready
}

// Do runs f on a thread that is inside the namespace. f must not start goroutines that rely on that.
func (ns *Namespace) Do(f func() error) error {
	if err := ns.enter(); err != nil {
		return err
	}
	errDo := f()
	return errors.Join(errDo, ns.leave())
}

// enter takes the caller's goroutine into the namespace, on a thread of its own, until leave. An error leaves it where it was.
func (ns *Namespace) enter() error {
	if ns.Host {
		return nil
	}
	runtime.LockOSThread()
	raw, err := ns.file.SyscallConn()
	if err == nil { // the file stays open meanwhile, so that Close on another goroutine cannot give its number to another one
		var errEnter error
		err = raw.Control(func(fd uintptr) { errEnter = unix.Setns(int(fd), unix.CLONE_NEWNET) })
		err = errors.Join(err, errEnter)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %d: %w", ns.Inode, err)
	}
	return nil
}

func (ns *Namespace) leave() error {
	if ns.Host {
		return nil
	}
	if err := unix.Setns(int(ns.r.home.Fd()), unix.CLONE_NEWNET); err != nil {
		// The thread stays locked: it ends with this goroutine instead of serving another one in the wrong namespace.
		return fmt.Errorf("leave network namespace %d: %w", ns.Inode, err)
	}
	runtime.UnlockOSThread()
	return nil
}

// identify reads what names the namespace.
func (ns *Namespace) identify() error {
	var st, own unix.Stat_t
	if err := unix.Fstat(int(ns.file.Fd()), &st); err != nil {
		return fmt.Errorf("look at network namespace: %w", err)
	}
	if err := unix.Fstat(int(ns.r.home.Fd()), &own); err != nil {
		return fmt.Errorf("look at own network namespace: %w", err)
	}
	ns.Inode, ns.Host = st.Ino, st.Ino == own.Ino
	return ns.Do(func() (err error) {
		ns.Cookie, err = netnsCookie()
		if err != nil {
			return fmt.Errorf("read cookie of network namespace %d: %w", ns.Inode, err)
		}
		return nil
	})
}

// listen opens one listener per address family on loopback and shows it to sk_lookup. IPv6 is left out where the
// namespace has none.
func (ns *Namespace) listen(kind outboundListenerKind) ([]*net.TCPListener, error) {
	var lns []*net.TCPListener
	for _, at := range []struct {
		network, addr string
		family        uint32
	}{{"tcp4", "127.0.0.1:0", unix.AF_INET}, {"tcp6", "[::1]:0", unix.AF_INET6}} {
		key := outboundListenerKey{Netns: ns.Cookie, Kind: uint32(kind), Family: at.family}
		ln, err := ns.inheritListener(key)
		if ln == nil && err == nil {
			ln, err = ns.listenOne(at.network, at.addr, kind)
		}
		if at.family == unix.AF_INET6 && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)) {
			continue
		}
		if err != nil {
			return lns, fmt.Errorf("listen on %s in network namespace %d: %w (is its loopback interface up?)", at.addr, ns.Inode, err)
		}
		lns = append(lns, ln)
		if err := ns.showListener(ln, key); err != nil {
			return lns, err
		}
	}
	return lns, nil
}

// inboundBacklog is how many connections of peers wait to be accepted, at most. A peer waits no longer than for its
// handshake: behind a thousand of a stranger's it would be gone when its turn comes, while a SYN that was dropped comes again.
const inboundBacklog = 512

func (ns *Namespace) listenOne(network, addr string, kind outboundListenerKind) (*net.TCPListener, error) {
	var ln net.Listener
	err := ns.Do(func() (err error) {
		lc := net.ListenConfig{KeepAlive: -1} // whoever accepts sets it
		lc.SetMultipathTCP(false)             // a SOCKHASH takes plain TCP sockets only
		ln, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	tcp := ln.(*net.TCPListener)
	if kind == outboundListenerKindLISTENER_INBOUND {
		err = limitBacklog(tcp)
	}
	return tcp, err
}

func limitBacklog(ln *net.TCPListener) error {
	raw, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	var errListen error
	err = raw.Control(func(fd uintptr) { errListen = unix.Listen(int(fd), inboundBacklog) })
	return errors.Join(err, errListen)
}

// listenersOf lists the open listeners of a kind with the keys by which sk_lookup finds them.
func (ns *Namespace) listenersOf(kind outboundListenerKind) iter.Seq2[*net.TCPListener, outboundListenerKey] {
	lns := ns.Outbound
	if kind == outboundListenerKindLISTENER_INBOUND {
		lns = ns.Inbound
	}
	return func(yield func(*net.TCPListener, outboundListenerKey) bool) {
		for _, ln := range lns {
			key := outboundListenerKey{Netns: ns.Cookie, Kind: uint32(kind), Family: unix.AF_INET6}
			if ln.Addr().(*net.TCPAddr).AddrPort().Addr().Is4() {
				key.Family = unix.AF_INET
			}
			if !yield(ln, key) {
				return
			}
		}
	}
}

func (ns *Namespace) showListener(ln *net.TCPListener, key outboundListenerKey) error {
	raw, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	var errPut error
	err = raw.Control(func(fd uintptr) {
		if !ns.isShown(int(fd), key) {
			errPut = ns.r.obj.Listeners.Put(key, uint64(fd))
		}
	})
	if err != nil {
		return err
	}
	if errPut != nil {
		return fmt.Errorf("show listener %s to the kernel: %w", ln.Addr(), errPut)
	}
	return nil
}

// attachLookup attaches the guard to this namespace, or puts it into the link that an earlier daemon pinned.
func (ns *Namespace) attachLookup() error {
	prog, err := newEntry(ns.Cookie, ns.r.obj.Places, ns.r.obj.Guard)
	if err != nil {
		return fmt.Errorf("load guard of network namespace %d: %w", ns.Inode, err)
	}
	ns.prog = prog
	ns.dir = filepath.Join(ns.r.dir, "namespaces", strconv.FormatUint(ns.Cookie, 10))
	pin := filepath.Join(ns.dir, "sk_lookup")
	if l, err := link.LoadPinnedLink(pin, nil); err == nil {
		if err := l.Update(prog); err == nil {
			ns.lookup = l
			return nil
		}
		if err := errors.Join(l.Unpin(), l.Close()); err != nil {
			return fmt.Errorf("replace guard of network namespace %d: %w", ns.Inode, err)
		}
	}
	if err := os.MkdirAll(ns.dir, 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	l, err := link.AttachNetNs(int(ns.file.Fd()), prog)
	if err != nil {
		return errors.Join(fmt.Errorf("guard network namespace %d: %w", ns.Inode, err), os.RemoveAll(ns.dir))
	}
	ns.lookup = l
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin guard of network namespace %d: %w", ns.Inode, err)
	}
	return nil
}

// Kind says what a connection dialled by the daemon is, for the guard of the namespace it is dialled in.
type Kind uint16

// The kinds of a Dial.
const (
	ToPeer   Kind = 0                                       // to another node or namespace: announced to nobody
	Delivery      = Kind(outboundDirectKindDIRECT_DELIVERY) // to the workload, authorised
	Check         = Kind(outboundDirectKindDIRECT_CHECK)    // a health check of the workload's port
)

// Announcement is what a Dial tells the kernel before it connects.
type Announcement struct {
	Kind     Kind
	Workload uint32         // on whose account
	Client   netip.AddrPort // whom the application sees as its peer; zero: the daemon's own address
}

// Dial connects to a literal address from inside the namespace. local may be zero. Guards of this namespace let the
// connection pass if it is announced, and nobody else's. It has no keep-alive.
func (ns *Namespace) Dial(ctx context.Context, local netip.Addr, to netip.AddrPort, a Announcement) (*net.TCPConn, error) {
	network := "tcp4"
	if to.Addr().Is6() {
		network = "tcp6"
	}
	// Only the creation of the socket depends on the thread's namespace. Of a literal address package net makes it on this goroutine, and calls
	// Control at once.
	if err := ns.enter(); err != nil {
		return nil, err
	}
	made := false
	d := net.Dialer{
		KeepAlive: -1,
		Control: func(_, _ string, raw syscall.RawConn) error {
			if made { // it tries once more, outside
				return os.NewSyscallError("connect", unix.EADDRNOTAVAIL)
			}
			made = true
			if err := ns.leave(); err != nil {
				return err
			}
			var inner error
			err := raw.Control(func(fd uintptr) {
				if inner = ns.announce(int(fd), a); inner == nil && a.Kind == Delivery && !local.IsValid() {
					inner = connectEarly(fd, to)
				}
			})
			return errors.Join(err, inner)
		},
	}
	d.SetMultipathTCP(false)
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	c, err := d.DialContext(ctx, network, to.String())
	if !made {
		err = errors.Join(err, ns.leave())
	}
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connectEarly begins to connect. Within a namespace that is done when it returns, and whoever connects again is told so:
// nobody has to wait for the poller.
func connectEarly(fd uintptr, to netip.AddrPort) error {
	var at unsafe.Pointer
	var size uintptr
	if to.Addr().Is4() {
		sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: swap(to.Port()), Addr: to.Addr().As4()}
		at, size = unsafe.Pointer(&sa), unsafe.Sizeof(sa)
	} else {
		sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swap(to.Port()), Addr: to.Addr().As16()}
		at, size = unsafe.Pointer(&sa), unsafe.Sizeof(sa)
	}
	// It does not block, and the scheduler need not be told: that costs half as much again.
	if _, _, errno := syscall.RawSyscall(unix.SYS_CONNECT, fd, uintptr(at), size); errno != 0 && errno != unix.EINPROGRESS {
		return os.NewSyscallError("connect", errno)
	}
	return nil
}

// announce tells the kernel of the connection that fd is going to be.
func (ns *Namespace) announce(fd int, a Announcement) error {
	if a.Kind == ToPeer {
		return nil
	}
	p := outboundPeer{Kind: uint16(a.Kind), Workload: a.Workload}
	if a.Client.IsValid() {
		p.Ip, p.Port = toAddr(a.Client.Addr()), swap(a.Client.Port())
	}
	if err := ns.r.obj.SkPeer.Put(int32(fd), p); err != nil {
		return fmt.Errorf("announce connection: %w", err)
	}
	return nil
}

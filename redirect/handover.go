package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// formerDir is where the links on the cgroups of earlier daemons are, in the pin directory, each named by the cgroup's id: what
// is accepted from a listener runs the programs of the cgroup in which it was made, whoever accepts.
const formerDir = "former"

// lockFile names the pin directory's lock among Files.
const lockFile = "lock"

// Files are what a daemon that takes over needs of this one, by the names under which its Open asks for them: the lock of
// the node, and its Sockets. They stay this Redirect's.
func (r *Redirect) Files() map[string]syscall.Conn {
	files := r.Sockets()
	files[lockFile] = r.lock
	return files
}

// Sockets are those at which connections and queries arrive: all that a daemon needs of one that is dead.
func (r *Redirect) Sockets() map[string]syscall.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	files := make(map[string]syscall.Conn)
	for _, ns := range r.namespaces {
		for _, kind := range []outboundListenerKind{outboundListenerKindLISTENER_OUTBOUND, outboundListenerKindLISTENER_INBOUND} {
			for ln, key := range ns.listenersOf(kind) {
				files[listenerFile(key)] = ln
			}
		}
		if ns.dns == nil {
			continue
		}
		for _, p := range ns.dns.Packets {
			files[ns.dnsFile(p.conn.LocalAddr())] = p.conn
		}
		for _, ln := range ns.dns.Streams {
			files[ns.dnsFile(ln.Addr())] = ln
		}
	}
	return files
}

func listenerFile(key outboundListenerKey) string {
	return fmt.Sprintf("listener/%d/%d/%d", key.Netns, key.Kind, key.Family)
}

func (ns *Namespace) dnsFile(at net.Addr) string {
	return fmt.Sprintf("dns/%d/%s/%s", ns.Cookie, at.Network(), at)
}

// Freeze ends what happens in the kernel without a call from outside: Events waits until Thaw. Of the methods, only those may
// be called meanwhile that neither enroll, nor set, nor repair.
func (r *Redirect) Freeze() { r.reading.Lock() }

// Thaw undoes Freeze. What the daemon that was to follow has enrolled and guarded besides is taken over, as by Open: Prune is to
// be called again. What it has changed of the rest is for an Audit of the maps to repair.
func (r *Redirect) Thaw() error {
	defer r.reading.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(
		eachPinned(filepath.Join(r.dir, "cgroups"), func(id uint64, dir string) error {
			if r.enrolled[id] != nil {
				return nil
			}
			return r.adoptOne(id, dir)
		}),
		eachPinned(filepath.Join(r.dir, "namespaces"), func(cookie uint64, _ string) error {
			if r.namespaces[cookie] == nil {
				r.inherited[cookie] = true
			}
			return nil
		}),
	)
}

// Yield gives the node up to the daemon that took over: only Close may follow, and what serves connections that were accepted
// before. Freeze must have been called.
func (r *Redirect) Yield() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := errors.Join(r.events.Close(), r.lock.Close())
	r.lock = nil
	r.reading.Unlock()
	return err
}

// takeLock takes the pin directory's lock, or shares that of the daemon before.
func (r *Redirect) takeLock() (*os.File, error) {
	f := r.inherit(lockFile)
	if f == nil {
		return lockDir(r.dir)
	}
	handed, errHanded := f.Stat()
	here, err := os.Stat(r.dir)
	if err := errors.Join(err, errHanded); err != nil || !os.SameFile(handed, here) {
		return nil, errors.Join(fmt.Errorf("take over the lock of %s: it is of another directory", r.dir), err, f.Close())
	}
	if err := flock(f); err != nil { // the open file is the same, and so is the lock
		return nil, errors.Join(fmt.Errorf("take over the lock of %s: %w", r.dir, err), f.Close())
	}
	return f, nil
}

// keepFormer puts this version's program on the cgroups of earlier daemons, of which listeners may have been handed on, and
// adds the one before if its cgroup is another. Without a hand-over there are no such listeners.
func (r *Redirect) keepFormer(handed bool) error {
	dir := filepath.Join(r.dir, formerDir)
	if handed {
		if err := r.addFormer(dir); err != nil {
			return fmt.Errorf("keep the link of the daemon before: %w", err)
		}
	}
	return eachPinned(dir, func(id uint64, pin string) error {
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", pin, err)
		}
		if !handed || linkedCgroup(l) == 0 {
			return errors.Join(os.Remove(pin), l.Close())
		}
		if err := l.Update(r.obj.ProxySockops); err != nil {
			return errors.Join(fmt.Errorf("update %s: %w", pin, err), l.Close())
		}
		r.former[id] = l
		return nil
	})
}

// addFormer moves the pin of the daemon before aside, if it is on another cgroup than this one's.
func (r *Redirect) addFormer(dir string) error {
	pin := filepath.Join(r.dir, daemonPin)
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	own, err := CgroupID(r.cgroup)
	if err != nil {
		return err
	}
	id := linkedCgroup(l)
	if id == own || id == 0 {
		return nil
	}
	if err := os.Rename(pin, filepath.Join(dir, strconv.FormatUint(id, 10))); err != nil {
		return err
	}
	err = os.Rename(filepath.Join(dir, strconv.FormatUint(own, 10)), pin) // this cgroup was a daemon's before
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// dropFormer forgets the links of cgroups that are gone and of which no socket is left.
func (r *Redirect) dropFormer() []error {
	var errs []error
	for id, l := range r.former {
		if linkedCgroup(l) != 0 {
			continue
		}
		delete(r.former, id)
		errs = append(errs, os.Remove(filepath.Join(r.dir, formerDir, strconv.FormatUint(id, 10))), l.Close())
	}
	return errs
}

// inheritListener is the listener of the daemon before, nil if there is none.
func (ns *Namespace) inheritListener(key outboundListenerKey) (*net.TCPListener, error) {
	f := ns.r.inherit(listenerFile(key))
	if f == nil {
		return nil, nil
	}
	ln, err := inheritSocket(f, ns.Cookie, net.FileListener)
	if err != nil {
		return nil, fmt.Errorf("take over a listener of network namespace %d: %w", ns.Inode, err)
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("take over a listener of network namespace %d: it is on %s", ns.Inode, ln.Addr()), ln.Close())
	}
	return tcp, nil
}

// inheritSocket makes what use makes of a socket, if that is of a network namespace.
func inheritSocket[C any](f *os.File, namespace uint64, use func(*os.File) (C, error)) (c C, err error) {
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return c, err
	}
	var cookie uint64
	var errCookie error
	err = raw.Control(func(fd uintptr) {
		cookie, errCookie = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	})
	if err := errors.Join(err, errCookie); err != nil {
		return c, err
	}
	if cookie != namespace {
		return c, fmt.Errorf("it is of network namespace with cookie %d, not %d", cookie, namespace)
	}
	return use(f)
}

// inherit takes over the two sockets of an address from the daemon before. There may be none.
func (d *DNS) inherit(at netip.AddrPort) (conn net.PacketConn, ln net.Listener, err error) {
	packets := d.ns.r.inherit(d.ns.dnsFile(net.UDPAddrFromAddrPort(at)))
	stream := d.ns.r.inherit(d.ns.dnsFile(net.TCPAddrFromAddrPort(at)))
	if packets != nil {
		conn, err = inheritSocket(packets, d.ns.Cookie, net.FilePacketConn)
	}
	if stream != nil && err == nil {
		ln, err = inheritSocket(stream, d.ns.Cookie, net.FileListener)
	}
	return conn, ln, err
}

// isShown says whether the kernel has this very listener under key.
func (ns *Namespace) isShown(fd int, key outboundListenerKey) bool {
	own, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return false
	}
	var cookie uint64
	err = ns.r.obj.Listeners.Lookup(key, &cookie) // of a SOCKHASH user space reads the socket's cookie
	return err == nil && cookie == own
}

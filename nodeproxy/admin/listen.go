package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// listenUnix takes over inherited, which is bound to path, or binds that, mode 0600, in a directory that it makes if need be. A socket that is already there is replaced
// only when nobody answers on it; the directory is locked meanwhile, so that two daemons that start at once cannot
// both find nobody.
func listenUnix(path string, inherited *os.File) (*net.UnixListener, error) {
	if inherited != nil {
		defer inherited.Close()
		ln, err := net.FileListener(inherited)
		if err != nil {
			return nil, fmt.Errorf("take over admin.socket %s: %w", path, err)
		}
		return ln.(*net.UnixListener), nil
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the admin socket's directory: %w", err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// On Linux the mode of an unbound socket is the mode of the file that bind makes: there is no moment at which
	// anybody else could connect.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on admin.socket %s: %w", path, err)
	}
	return ln.(*net.UnixListener), nil
}

// backlog is cut to net.core.somaxconn.
const backlog = 4096

// claim makes this process the one that the kernel names to who connects: until then that is who has bound the socket.
func claim(socket *net.UnixListener) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("claim the admin socket: %w", err)
	}
	var listenErr error
	err = raw.Control(func(fd uintptr) { listenErr = unix.Listen(int(fd), backlog) })
	if err := errors.Join(err, listenErr); err != nil {
		return fmt.Errorf("claim the admin socket: %w", err)
	}
	return nil
}

func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the admin socket's directory: %w", err)
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("lock the admin socket's directory %s: %w", dir, err)
	}
	return func() { _ = d.Close() }, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at admin.socket %s: %w", path, err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("admin.socket %s is there and is not a socket: remove it, or set another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("admin.socket %s is in use by another daemon: stop it, or set another path", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the stale admin.socket %s: %w", path, err)
	}
	return nil
}

// guardedListener accepts no more than max connections at a time, and only those that admit, which may be nil, lets in.
// Others are closed at once, so that no stranger can use up the daemon's descriptors.
type guardedListener struct {
	net.Listener
	log   *slog.Logger
	admit func(net.Conn) error

	mu     sync.Mutex
	open   int
	max    int
	warned time.Time
}

func (l *guardedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if err := l.take(conn); err != nil {
			l.warn(err)
			_ = conn.Close()
			continue
		}
		return &guardedConn{Conn: conn, release: sync.OnceFunc(l.release)}, nil
	}
}

func (l *guardedListener) take(conn net.Conn) error {
	if l.admit != nil {
		if err := l.admit(conn); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.max {
		return fmt.Errorf("%d clients are connected already", l.max)
	}
	l.open++
	return nil
}

// warn logs at most once a minute: strangers must not fill the log either.
func (l *guardedListener) warn(err error) {
	l.mu.Lock()
	due := time.Since(l.warned) >= time.Minute
	if due {
		l.warned = time.Now()
	}
	l.mu.Unlock()
	if due {
		l.log.Warn("client turned away", "listener", l.Addr().String(), "error", err)
	}
}

func (l *guardedListener) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
}

type guardedConn struct {
	net.Conn
	release func()
}

func (c *guardedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// rootOnly admits root, and the daemon's own user.
func rootOnly(conn net.Conn) error {
	cred, err := peer(conn)
	if err != nil {
		return err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("uid %d is not root", cred.Uid)
	}
	return nil
}

// peer is who is at the other end of a unix connection.
func peer(conn net.Conn) (*unix.Ucred, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("read the peer's credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("read the peer's credentials: %w", err)
	}
	return cred, nil
}

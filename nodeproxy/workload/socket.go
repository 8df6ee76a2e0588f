package workload

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// defaultSocketMode is of an upstream's socket whose registration says nothing: for the workload's own user.
const defaultSocketMode = 0o600

// socketKey names an upstream's unix socket: a workload, one of the mount namespaces of its processes, and a path in there.
type socketKey struct {
	cgroup string
	mounts uint64
	path   string
	mode   uint32
}

func (k socketKey) compare(o socketKey) int {
	return cmp.Or(cmp.Compare(k.cgroup, o.cgroup), cmp.Compare(k.mounts, o.mounts), cmp.Compare(k.path, o.path), cmp.Compare(k.mode, o.mode))
}

// upstreamSocket is one that the daemon listens on. It is the workload's file, and the daemon's listener.
type upstreamSocket struct {
	key  socketKey
	ln   *net.UnixListener
	dir  *os.File // the directory that it is in
	base string
	node unix.Stat_t
	user fileUser // who has made it
}

// sockets are the upstreams' unix sockets. Only reconcile uses them, and the end of Run.
type sockets struct {
	open  map[socketKey]*upstreamSocket
	serve func(*upstreamSocket)
}

// syncSockets makes the sockets of the enrolled workloads' upstreams, where their processes see them, and removes those that
// are not wanted any more. A workload without processes keeps the ones it has.
func (m *Manager) syncSockets(v *view) {
	wanted := make(map[socketKey]bool)
	for _, e := range m.workloads {
		if !e.enrolled || e.Mesh != Enabled || v.snap == nil {
			continue
		}
		ups := v.socketUpstreams(e.ID)
		if len(ups) == 0 {
			continue
		}
		spaces := mountSpaces(e)
		for _, up := range ups {
			mode := up.SocketMode
			if mode == 0 {
				mode = defaultSocketMode
			}
			for inode, pid := range spaces {
				key := socketKey{e.Cgroup, inode, up.Socket, mode}
				wanted[key] = true
				if err := m.openSocket(key, pid); err != nil {
					e.contested = append(e.contested, fmt.Sprintf("upstream %q at %s: %v", up.Name, up.Socket, err))
				}
			}
			for key := range m.sockets.open {
				if len(spaces) == 0 && key.cgroup == e.Cgroup && key.path == up.Socket && key.mode == mode {
					wanted[key] = true
				}
			}
		}
	}
	for key, s := range m.sockets.open {
		if !wanted[key] {
			delete(m.sockets.open, key)
			s.close(m)
		}
	}
}

func (v *view) socketUpstreams(id uint32) []*catalog.Upstream {
	var all []*catalog.Upstream
	for _, inst := range v.callers[id] {
		for _, up := range v.snap.Upstreams[inst] {
			if up.Socket != "" {
				all = append(all, up)
			}
		}
	}
	return all
}

// startTime is how long a process may take to enter its own mount namespace and root: whoever starts a container does that in
// the container's cgroup, and nothing is to be made in the node's file system meanwhile.
const startTime = time.Second

// mountSpaces are the mount namespaces of e's processes, with a process in each.
func mountSpaces(e *entry) map[uint64]string {
	found := make(map[uint64]string)
	_ = filepath.WalkDir(e.Cgroup, func(dir string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return skipGone(err)
		}
		if id, err := redirect.CgroupID(dir); err != nil || !e.subtree[id] {
			return nil // an inner workload's
		}
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for pid := range strings.FieldsSeq(string(procs)) {
			var st unix.Stat_t
			if err := unix.Stat("/proc/"+pid+"/ns/mnt", &st); err == nil && found[st.Ino] == "" && len(found) < maxNamespaces && age(pid) > startTime {
				found[st.Ino] = pid
			}
		}
		return nil
	})
	return found
}

// age is for how long process pid has been there, 0 if that is not known.
func age(pid string) time.Duration {
	text, err := os.ReadFile("/proc/" + pid + "/stat")
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var now unix.Timespec
	if err != nil || len(fields) < 20 || unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return 0
	}
	const tick = time.Second / 100 // USER_HZ
	started, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(now.Nano()) - time.Duration(started)*tick
}

// openSocket listens as pid would, unless it is done.
func (m *Manager) openSocket(key socketKey, pid string) error {
	if s := m.sockets.open[key]; s != nil {
		if s.there() {
			return nil
		}
		delete(m.sockets.open, key) // somebody has removed it
		s.close(m)
	}
	for other, s := range m.sockets.open { // it is there with another mode
		if other.cgroup == key.cgroup && other.mounts == key.mounts && other.path == key.path {
			delete(m.sockets.open, other)
			s.close(m)
		}
	}
	user, err := fileUserOf(pid)
	if err != nil {
		return err
	}
	if s := m.inheritSocket(key, user); s != nil {
		m.sockets.open[key] = s
		m.sockets.serve(s)
		return nil
	}
	s := &upstreamSocket{key: key, base: path.Base(key.path), user: user}
	if err := user.do(func() error { return s.open(pid, m.sockets.at) }); err != nil || s.ln == nil {
		return err
	}
	m.sockets.open[key] = s
	m.sockets.serve(s)
	return nil
}

// at is the socket of ours that a file is, nil for none.
func (o *sockets) at(file *unix.Stat_t) *upstreamSocket {
	for _, s := range o.open {
		if s.node.Ino == file.Ino && s.node.Dev == file.Dev {
			return s
		}
	}
	return nil
}

// open makes the socket below the root of process pid: symbolic links do not lead out of it. The caller does it as the user of
// the process: its links lead to nothing that it could not make itself. Nobody can connect before it listens. There is no
// listener, and no error, where two mount namespaces share the directory.
func (s *upstreamSocket) open(pid string, ours func(*unix.Stat_t) *upstreamSocket) (err error) {
	dirFD, err := openInRoot(pid, path.Dir(s.key.path))
	if err != nil {
		return fmt.Errorf("open its directory: %w: user %d of the workload has to have it", err, s.user.uid)
	}
	s.dir = os.NewFile(uintptr(dirFD), path.Dir(s.key.path))
	defer func() {
		if s.ln == nil {
			s.dir.Close()
		}
	}()
	at := "/proc/self/fd/" + strconv.Itoa(dirFD) + "/" + s.base
	err = unix.Fstatat(dirFD, s.base, &s.node, unix.AT_SYMLINK_NOFOLLOW)
	if other := ours(&s.node); err == nil && other != nil {
		if other.key.cgroup == s.key.cgroup && other.key.path == s.key.path {
			return nil
		}
		return fmt.Errorf("it is the same file as upstream socket %s of %s: change one of them", other.key.path, other.key.cgroup)
	}
	if err == nil {
		err = s.makeRoom(at)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), s.key.path)
	defer file.Close()
	if err := errors.Join(unix.Fchmod(fd, 0), unix.Bind(fd, &unix.SockaddrUnix{Name: at})); err != nil { // bind takes over the socket's mode
		return fmt.Errorf("make it: %w: user %d of the workload has to be able to", err, s.user.uid)
	}
	if err := errors.Join(unix.Listen(fd, unix.SOMAXCONN), s.permit()); err != nil {
		return errors.Join(err, unix.Unlinkat(dirFD, s.base, 0))
	}
	ln, err := net.FileListener(file)
	if err != nil {
		return errors.Join(err, unix.Unlinkat(dirFD, s.base, 0))
	}
	s.ln = ln.(*net.UnixListener)
	s.ln.SetUnlinkOnClose(false) // its name is that of a directory of ours
	return nil
}

// makeRoom removes a socket on which nobody listens, as a daemon that was killed leaves it. Whatever else is there stays.
func (s *upstreamSocket) makeRoom(at string) error {
	if s.node.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return errors.New("there is something that is no socket: remove it, or change local_bind_socket_path")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: at}); {
	case err == nil, errors.Is(err, unix.EAGAIN):
		return errors.New("another process listens there, a sidecar perhaps: stop it, and the socket is made")
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("there is a socket that user %d of the workload may not use, of a sidecar perhaps: stop that, and remove the socket", s.user.uid)
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("see whether somebody listens there: %w", err)
	}
	return unix.Unlinkat(int(s.dir.Fd()), s.base, 0)
}

// permit lets in whom the mode does, and notes which file that bind made.
func (s *upstreamSocket) permit() error {
	fd, err := unix.Openat(int(s.dir.Fd()), s.base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &s.node); err != nil {
		return err
	}
	if s.node.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return errors.New("somebody has put something else in its place")
	}
	return unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), s.key.mode)
}

// there says whether the file is still the one that was made.
func (s *upstreamSocket) there() bool {
	var st unix.Stat_t
	err := unix.Fstatat(int(s.dir.Fd()), s.base, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Ino == s.node.Ino && st.Dev == s.node.Dev
}

// close stops listening and removes the file, if it is still ours.
func (s *upstreamSocket) close(m *Manager) {
	err := ignoreClosed(s.ln.Close())
	if s.there() {
		err = errors.Join(err, s.user.do(func() error { return unix.Unlinkat(int(s.dir.Fd()), s.base, 0) }))
	}
	if err = errors.Join(err, s.dir.Close()); err != nil {
		m.log.Error("the socket of an upstream may be left behind", "path", s.key.path, "cgroup", s.key.cgroup, "error", err)
	}
}

// socketOrigin says whose connection came in at s. Only a process of the workload has one: of others the file's mode may let
// in some.
func (m *Manager) socketOrigin(s *upstreamSocket, conn *net.UnixConn) (*Origin, error) {
	refuse := func(format string, args ...any) (*Origin, error) {
		return nil, &catalog.Refusal{Reason: catalog.ReasonUnknownOrigin, Err: fmt.Errorf("at "+s.key.path+": "+format, args...)}
	}
	pid, stillThere, done, err := peerProcess(conn)
	if err != nil {
		return refuse("find out who connects: %w", err)
	}
	defer done()
	cgroup, err := redirect.ProcessCgroup(pid)
	if err != nil {
		return refuse("%w", err)
	}
	var netns unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &netns); err != nil {
		return refuse("%w", err)
	}
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if !stillThere() {
		return refuse("process %d has ended", pid)
	}
	v := m.view.Load()
	var w *Workload
	for _, other := range v.byID {
		if within(cgroup, other.Cgroup) && (w == nil || len(other.Cgroup) > len(w.Cgroup)) {
			w = other
		}
	}
	if w == nil || w.Cgroup != s.key.cgroup {
		return refuse("process %d is in cgroup %s, and the socket is that of %s", pid, cgroup, s.key.cgroup)
	}
	for _, space := range v.spaces {
		if space.Inode == netns.Ino {
			return &Origin{
				Workload: w, Instances: v.callers[w.ID], Namespace: space.public, Client: space.anyAddress(), Socket: s.key.path,
				PID: uint32(pid), Comm: strings.TrimSpace(string(comm)),
			}, nil
		}
	}
	return nil, &catalog.Refusal{Reason: catalog.ReasonNotReady, Err: fmt.Errorf("at %s: there is no listener in network namespace %d of process %d yet", s.key.path, netns.Ino, pid)}
}

// anyAddress stands for the client's own address where it has none: so the destination sees it too.
func (s *space) anyAddress() netip.AddrPort {
	for _, ip := range s.addrs {
		if !ip.IsLoopback() && !ip.IsLinkLocalUnicast() {
			return netip.AddrPortFrom(ip, 0)
		}
	}
	return netip.AddrPort{}
}

// soPeerPIDFD is SO_PEERPIDFD, of Linux 6.5.
const soPeerPIDFD = 77

// peerProcess is the process that connected. What is read of it in /proc is its own if it is still there afterwards: its
// number could be another's by then. Before Linux 6.5 it could be another's from the start, if it ended at once.
func peerProcess(conn *net.UnixConn) (pid int, stillThere func() bool, done func(), err error) {
	if pid, err = peerPID(conn); err != nil {
		return 0, nil, nil, err
	}
	if pid == 0 {
		return 0, nil, nil, errors.New("it is in a pid namespace that is not seen from here")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, nil, nil, err
	}
	fd := -1
	if err := raw.Control(func(s uintptr) { fd, err = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, soPeerPIDFD) }); err != nil {
		return 0, nil, nil, err
	}
	if errors.Is(err, unix.ENOPROTOOPT) {
		fd, err = unix.PidfdOpen(pid, 0)
	}
	if err != nil {
		return 0, nil, nil, err
	}
	return pid, func() bool { return !errors.Is(unix.PidfdSendSignal(fd, 0, nil, 0), unix.ESRCH) }, func() { unix.Close(fd) }, nil
}

package workload

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

const user = 4711

// confine leaves the test's thread, which ends with the test, the capabilities that the unit does.
func confine(t *testing.T) {
	t.Helper()
	numbers := map[string]uint{
		"CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
		"CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE, "CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE,
		"CAP_SETUID": unix.CAP_SETUID, "CAP_SETGID": unix.CAP_SETGID,
	}
	text, err := os.ReadFile("../../deploy/nodeproxy.service")
	if err != nil {
		t.Fatal(err)
	}
	var held [2]unix.CapUserData
	for line := range strings.Lines(string(text)) {
		set, isSet := strings.CutPrefix(line, "CapabilityBoundingSet=")
		for name := range strings.FieldsSeq(set) {
			n, known := numbers[name]
			if !isSet {
				break
			}
			if !known {
				t.Fatalf("%s is not among the capabilities that are known here", name)
			}
			held[n/32].Permitted |= 1 << (n % 32)
			held[n/32].Effective |= 1 << (n % 32)
		}
	}
	runtime.LockOSThread()
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &held[0]); err != nil {
		t.Fatal(err)
	}
}

func TestASocketIsMadeWithItsUsersOwnRights(t *testing.T) {
	netlab.Require(t)
	top, err := os.MkdirTemp("/tmp", "nodeproxy-sockets-") // which the user can search, unlike the test's own
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(err)
	t.Cleanup(func() { _ = os.RemoveAll(top) })
	own, locked := filepath.Join(top, "own"), filepath.Join(top, "locked")
	must(errors.Join(os.Chmod(top, 0o755), os.Mkdir(own, 0o755), os.Mkdir(locked, 0o755), os.Chown(own, user, user), os.Symlink(locked, filepath.Join(own, "link"))))
	app := exec.Command("sleep", "infinity")
	app.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	must(app.Start())
	t.Cleanup(func() { _, _ = app.Process.Kill(), app.Wait() })
	t.Run("as the unit does", func(t *testing.T) { confinedSockets(t, own, locked, strconv.Itoa(app.Process.Pid)) })
}

func confinedSockets(t *testing.T, own, locked, pid string) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	confine(t)
	accepted := make(chan *net.UnixConn, 10)
	m := &Manager{sockets: sockets{open: make(map[socketKey]*upstreamSocket), serve: func(s *upstreamSocket) {
		go func() {
			defer close(accepted)
			for conn, err := s.ln.AcceptUnix(); err == nil; conn, err = s.ln.AcceptUnix() {
				accepted <- conn
			}
		}()
	}}}
	key := socketKey{"web", 1, filepath.Join(own, "a.sock"), 0o640}
	must(m.openSocket(key, pid))
	info, err := os.Stat(key.path)
	must(err)
	if stat := info.Sys().(*syscall.Stat_t); info.Mode() != fs.ModeSocket|0o640 || stat.Uid != user || stat.Gid != user {
		t.Errorf("it is %v of user %d", info.Mode(), stat.Uid)
	}

	must(m.openSocket(socketKey{"web", 2, key.path, key.mode}, pid)) // another mount namespace that shares the directory
	if err := m.openSocket(socketKey{"batch", 1, key.path, key.mode}, pid); err == nil {
		t.Error("the socket of one workload counts as another's")
	}
	dialer := exec.Command("/proc/self/exe", "-test.run", "^TestDialASocket$")
	dialer.Env = []string{dialEnv + "=" + key.path}
	dialer.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	must(dialer.Start())
	conn := <-accepted
	from, stillThere, done, err := peerProcess(conn)
	must(err)
	defer done()
	if from != dialer.Process.Pid || !stillThere() { // those before did not connect to it
		t.Errorf("the first connection is of process %d, still there: %v, want %d", from, stillThere(), dialer.Process.Pid)
	}
	conn.Close()
	must(dialer.Wait())
	if stillThere() {
		t.Error("who has connected and ended is still there")
	}

	if err := m.openSocket(socketKey{"web", 1, filepath.Join(own, "link", "b.sock"), 0o666}, pid); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a socket in a directory of root: %v", err)
	}
	if made, _ := os.ReadDir(locked); len(made) > 0 {
		t.Errorf("the workload got %v in a directory that it may not write", made)
	}
	m.sockets.open[key].close(m)
	if _, err := os.Lstat(key.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is left behind: %v", err)
	}
	for range accepted {
	}
	if got, err := fileUserOf("thread-self"); err != nil || got.uid != 0 || got.gid != 0 {
		t.Errorf("the daemon goes on as %+v: %v", got, err)
	}
}

// TestAProcessThatJustStartedHasNoSockets is for one in another mount namespace than the daemon's, which a container's first
// process is too while it still has the node's file system.
func TestAProcessThatJustStartedHasNoSockets(t *testing.T) {
	lab := netlab.ForTest(t)
	cgroup := filepath.Join(lab.Cgroup().Path(), "starting")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(cgroup, 0o755))
	t.Cleanup(func() { _ = os.Remove(cgroup) })
	dir, err := os.Open(cgroup)
	must(err)
	defer dir.Close()
	id, err := redirect.CgroupID(cgroup)
	must(err)
	e := &entry{Workload: Workload{Cgroup: cgroup}, subtree: map[uint64]bool{id: true}}
	app := exec.Command("sleep", "infinity")
	app.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	must(app.Start())
	t.Cleanup(func() { _, _ = app.Process.Kill(), app.Wait() })
	pid := strconv.Itoa(app.Process.Pid)
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		found := mountSpaces(e)
		switch old := age(pid); {
		case len(found) > 0 && old <= startTime:
			t.Fatalf("%v are found when the process is %s old", found, old)
		case len(found) == 1:
			return
		case time.Now().After(deadline):
			t.Fatalf("%v are found when the process is %s old", found, old)
		}
	}
}

const dialEnv = "NODEPROXY_TEST_SOCKET"

// TestDialASocket is no test, but a process that connects to a socket until that is closed.
func TestDialASocket(t *testing.T) {
	path := os.Getenv(dialEnv)
	if path == "" {
		return
	}
	conn, err := net.DialTimeout("unix", path, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Read(make([]byte, 1))
}

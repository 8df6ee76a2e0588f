package redirect

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CgroupMount finds where cgroup2 is mounted: /sys/fs/cgroup on unified systems, a directory below it on hybrid ones.
func CgroupMount() (string, error) {
	_, point, err := cgroupMount()
	return point, err
}

// cgroupMount returns also which cgroup is mounted there, as this process's cgroup namespace calls it.
func cgroupMount() (root, point string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		mount, typ, ok := strings.Cut(s.Text(), " - ")
		if fields := strings.Fields(mount); ok && strings.HasPrefix(typ, "cgroup2 ") && len(fields) > 4 {
			return fields[3], fields[4], nil
		}
	}
	return "", "", errors.New("find cgroup2: it is not mounted; run `mount -t cgroup2 none /sys/fs/cgroup/unified`, or boot with the unified hierarchy")
}

// JoinNodeCgroups makes sure that processes' cgroups have the same names for this process as in the tree that it sees mounted. A
// container that is shown the node's may have a cgroup namespace of its own: then the program is executed anew, with the same
// process id, in that of the node's first process, and this does not return. Call it before anything else is open.
func JoinNodeCgroups() error {
	root, point, err := cgroupMount()
	if err != nil || !strings.HasPrefix(root, "/..") {
		return nil // it is one tree, or missed later
	}
	failed := func(err error) error {
		return fmt.Errorf("see the cgroups at %s as the node does: %w: the pod needs hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE", point, err)
	}
	namespace, err := os.Open("/proc/1/ns/cgroup")
	if err != nil {
		return failed(err)
	}
	defer namespace.Close()
	runtime.LockOSThread() // it alone moves, and becomes the whole process
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		return failed(err)
	}
	if root, _, err = cgroupMount(); err != nil || strings.HasPrefix(root, "/..") {
		return failed(errors.New("the first process that is seen here is not the node's"))
	}
	return failed(unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// CgroupID returns the kernel's id of a cgroup2 directory, which is its inode number.
func CgroupID(dir string) (uint64, error) {
	var mount unix.Statfs_t
	if err := unix.Statfs(dir, &mount); err != nil {
		return 0, fmt.Errorf("look at cgroup %s: %w", dir, err)
	}
	if mount.Type != unix.CGROUP2_SUPER_MAGIC {
		at, err := CgroupMount()
		if err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("use cgroup %s: it is not on cgroup2, which is mounted at %s", dir, at)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("look at cgroup %s: %w", dir, err)
	}
	return st.Ino, nil
}

// OwnCgroup makes sure that this process has a cgroup of its own and returns its directory: the one it is in if it was there first,
// as in a container, where probes come after it, or if it is that of the daemon before, whose process is given, 0 for none; else a
// new one, <cgroup2>/nodeproxy-<node>, into which the process moves. Cleanup removes that.
func OwnCgroup(node string, before int) (string, error) {
	mount, err := CgroupMount()
	if err != nil {
		return "", err
	}
	current, err := processCgroup("self")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(mount, current)
	if current != "/" && (isFirst(dir) || isIn(current, before)) {
		return dir, nil
	}
	dir = filepath.Join(mount, daemonCgroup(node))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("create the daemon's cgroup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return "", fmt.Errorf("move into cgroup %s: %w", dir, err)
	}
	return dir, nil
}

func daemonCgroup(node string) string { return "nodeproxy-" + node }

// isIn reports whether a process, 0 for none, is in a cgroup.
func isIn(cgroup string, pid int) bool {
	if pid == 0 {
		return false
	}
	its, err := processCgroup(strconv.Itoa(pid))
	return err == nil && its == cgroup
}

// isFirst reports whether no process of the cgroup is older than this one, and no cgroup is below.
func isFirst(dir string) bool {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return false
	}
	own := strconv.Itoa(os.Getpid())
	since, err := started(own)
	if err != nil {
		return false
	}
	for _, pid := range strings.Fields(string(procs)) {
		if pid == own {
			continue
		}
		its, err := started(pid)
		if errors.Is(err, fs.ErrNotExist) && pid != "0" || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil || its <= since {
			return false
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, e := range entries {
		if e.IsDir() {
			return false
		}
	}
	return true
}

// started is when a process was, in ticks since boot.
func started(pid string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("read the start of process %s: %q", pid, text)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// processCgroup returns the path of a process's cgroup on the cgroup2 hierarchy, from its root.
func processCgroup(pid string) (string, error) {
	data, err := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
	if err != nil {
		return "", fmt.Errorf("find cgroup of process %s: %w", pid, err)
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("find cgroup of process %s: it is in no cgroup2 hierarchy", pid)
}

// ProcessCgroup returns the directory of a process's cgroup.
func ProcessCgroup(pid int) (string, error) {
	mount, err := CgroupMount()
	if err != nil {
		return "", err
	}
	path, err := processCgroup(strconv.Itoa(pid))
	if err != nil {
		return "", err
	}
	return filepath.Join(mount, path), nil
}

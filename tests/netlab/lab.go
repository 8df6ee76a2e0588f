// Package netlab builds isolated network topologies on one machine: network namespaces joined by veth pairs, cgroups of
// their own, processes inside both, a private bpffs, and a capture of what crosses a link. The demonstration and the
// end-to-end tests share it, so that what one shows is what the other asserts.
//
// A Lab owns everything made through it. Network namespaces are anonymous: they and their links live as long as a file
// descriptor or a process holds them, so nothing of them survives the Lab's process, however it ends. Every process dies
// with the Lab's. What can outlive a killed owner (empty cgroups, a mount, a directory) is named after its process id and
// is removed by the next New.
//
// The package needs root. It never touches the caller's network namespace.
package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const prefix = "np-"

// Lab owns namespaces, cgroups, processes and mounts. Its methods may be called concurrently.
type Lab struct {
	name    string
	dir     string
	cgroup  *Cgroup
	starter *starter

	mu      sync.Mutex
	closed  bool
	undo    []func() error // run last to first by Close
	cookies []uint64       // of every network namespace made here
	process []*Process
	bpffs   string
}

// New makes an empty Lab with a temporary directory and a cgroup of its own, and removes what killed owners left behind.
func New() (*Lab, error) {
	if missing := Missing(); len(missing) > 0 {
		return nil, fmt.Errorf("build a network lab: missing %s", strings.Join(missing, ", "))
	}
	root, err := Cgroup2()
	if err != nil {
		return nil, err
	}
	sweep(root)
	l := &Lab{}
	if l.dir, err = os.MkdirTemp("", prefix+strconv.Itoa(os.Getpid())+"-"); err != nil {
		return nil, fmt.Errorf("make the lab's directory: %w", err)
	}
	l.name = filepath.Base(l.dir)
	l.onClose(func() error { return os.RemoveAll(l.dir) })
	if l.cgroup, err = makeCgroup(filepath.Join(root, l.name)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	l.onClose(l.cgroup.Remove)
	l.starter = newStarter()
	l.onClose(l.starter.stop)
	return l, nil
}

// Name is unique to this Lab: the name of its cgroup and of its directory.
func (l *Lab) Name() string { return l.name }

// Dir is a directory for the lab's files, removed by Close.
func (l *Lab) Dir() string { return l.dir }

// Cgroup is the parent of all the lab's cgroups.
func (l *Lab) Cgroup() *Cgroup { return l.cgroup }

// Close kills every process of the lab, waits for them, and removes everything that was made, last first. It may be
// called again and after a partial failure. Its error joins all that could not be removed.
func (l *Lab) Close() error {
	l.mu.Lock()
	l.closed = true
	undo, processes := l.undo, l.process
	l.undo, l.process = nil, nil
	l.mu.Unlock()

	var errs []error
	for _, p := range slices.Backward(processes) {
		p.Kill()
	}
	for _, f := range slices.Backward(undo) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (l *Lab) onClose(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.undo = append(l.undo, f)
}

// BPFFS mounts a bpffs for this lab alone, once, and returns its directory. Close unmounts it, and with it goes whatever
// is pinned there.
func (l *Lab) BPFFS() (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bpffs != "" {
		return l.bpffs, nil
	}
	dir := filepath.Join(l.dir, "bpf")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a mount point: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return "", fmt.Errorf("mount a bpffs on %s: %w", dir, err)
	}
	l.bpffs = dir
	l.undo = append(l.undo, func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	})
	return dir, nil
}

// Leaks names what still exists of the lab: cgroups, mounts, its directory, and processes in one of its network
// namespaces. It is meant to be called after Close, and then returns nothing.
func (l *Lab) Leaks() []string {
	var leaks []string
	for _, path := range []string{l.dir, l.cgroup.Path()} {
		if _, err := os.Lstat(path); err == nil {
			leaks = append(leaks, path)
		}
	}
	for _, mount := range mounts() {
		if strings.HasPrefix(mount.point, l.dir+"/") {
			leaks = append(leaks, "mount on "+mount.point)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for thread, inode := range elsewhere() {
		if cookie, err := cookieOf(thread); err == nil && slices.Contains(l.cookies, cookie) {
			leaks = append(leaks, fmt.Sprintf("process %s in network namespace %d", thread, inode))
		}
	}
	return leaks
}

// elsewhere lists the threads that are in another network namespace than the caller, as PID/TID, with its inode.
func elsewhere() map[string]uint64 {
	found := make(map[string]uint64)
	var home, st unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &home) != nil { // the process's first thread may be the starter's, which is anywhere
		return found
	}
	links, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
	for _, link := range links {
		if unix.Stat(link, &st) == nil && st.Ino != home.Ino {
			found[strings.Split(link, "/")[2]+"/"+strings.Split(link, "/")[4]] = st.Ino
		}
	}
	return found
}

// cookieOf identifies the network namespace of a thread, given as PID/TID.
func cookieOf(thread string) (cookie uint64, err error) {
	pid, tid, _ := strings.Cut(thread, "/")
	file, err := os.Open(filepath.Join("/proc", pid, "task", tid, "ns/net"))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	err = (&Namespace{file: file}).Do(func() (err error) {
		cookie, err = currentCookie()
		return err
	})
	return cookie, err
}

// sweep removes the cgroups, mounts and directories of owners that do not live any more. Whatever is in use stays: rmdir
// refuses a cgroup that has processes.
func sweep(cgroupRoot string) {
	for _, m := range mounts() {
		if dir := filepath.Dir(m.point); m.fstype == "bpf" && filepath.Dir(dir) == filepath.Clean(os.TempDir()) && orphaned(dir) {
			_ = unix.Unmount(m.point, unix.MNT_DETACH) // what cannot go now goes with a later sweep
		}
	}
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"[0-9]*-*"))
	for _, dir := range dirs {
		if orphaned(dir) {
			_ = os.RemoveAll(dir)
		}
	}
	groups, _ := filepath.Glob(filepath.Join(cgroupRoot, prefix+"[0-9]*-*"))
	for _, dir := range groups {
		if orphaned(dir) {
			_ = removeTree(dir)
		}
	}
}

// orphaned says whether path is named after a process that does not exist.
func orphaned(path string) bool {
	rest, ours := strings.CutPrefix(filepath.Base(path), prefix)
	pid, _, _ := strings.Cut(rest, "-")
	n, err := strconv.Atoi(pid)
	return ours && err == nil && errors.Is(unix.Kill(n, 0), unix.ESRCH)
}

// serial numbers what needs a name of its own within a namespace.
type serial struct{ n atomic.Uint32 }

func (s *serial) next() uint32 { return s.n.Add(1) }

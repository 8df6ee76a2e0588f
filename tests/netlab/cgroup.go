package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// removeTimeout bounds the wait for the processes of a cgroup to be gone after they were killed.
const removeTimeout = 10 * time.Second

// Cgroup is a directory on cgroup2 that the Lab made.
type Cgroup struct{ path string }

// makeCgroup makes the directory path.
func makeCgroup(path string) (*Cgroup, error) {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return &Cgroup{path}, nil
}

// Path is the cgroup's absolute path.
func (c *Cgroup) Path() string { return c.path }

// Child makes a cgroup below c.
func (c *Cgroup) Child(name string) (*Cgroup, error) { return makeCgroup(filepath.Join(c.path, name)) }

// ID is the kernel's id of the cgroup: the inode of its directory.
func (c *Cgroup) ID() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(c.path, &st); err != nil {
		return 0, fmt.Errorf("stat cgroup %s: %w", c.path, err)
	}
	return st.Ino, nil
}

// PIDs lists the processes of the cgroup itself, without those below it.
func (c *Cgroup) PIDs() ([]int, error) {
	text, err := os.ReadFile(filepath.Join(c.path, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("list the processes of a cgroup: %w", err)
	}
	var pids []int
	for field := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Add moves a process into the cgroup.
func (c *Cgroup) Add(pid int) error {
	if err := os.WriteFile(filepath.Join(c.path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		return fmt.Errorf("move process %d to cgroup %s: %w", pid, c.path, err)
	}
	return nil
}

// Remove kills every process in the cgroup and below it, waits for them to be gone, and removes the directories, deepest
// first. A cgroup that is gone already is no error. All that lives in it was started through the Lab, or put there.
func (c *Cgroup) Remove() error {
	err := os.WriteFile(filepath.Join(c.path, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		if _, gone := os.Stat(c.path); errors.Is(gone, fs.ErrNotExist) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("kill the processes of a cgroup: %w", err)
	}
	if err := c.waitEmpty(); err != nil {
		return err
	}
	return removeTree(c.path)
}

// waitEmpty waits until the kernel reports the cgroup and all below it as unpopulated.
func (c *Cgroup) waitEmpty() error {
	f, err := os.Open(filepath.Join(c.path, "cgroup.events"))
	if err != nil {
		return fmt.Errorf("watch a cgroup: %w", err)
	}
	defer f.Close()
	deadline := time.Now().Add(removeTimeout)
	for {
		text := make([]byte, 256)
		n, err := f.ReadAt(text, 0)
		if n == 0 {
			return fmt.Errorf("read %s: %w", f.Name(), err)
		}
		if strings.Contains(string(text[:n]), "populated 0") {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("empty cgroup %s: processes remain %s after they were killed", c.path, removeTimeout)
		}
		// A change of cgroup.events is an exceptional condition of the file (cgroups.rst, "populated").
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch %s: %w", f.Name(), err)
		}
	}
}

// removeTree removes a cgroup and those below it, deepest first.
func removeTree(path string) error {
	var dirs []string
	err := filepath.WalkDir(path, func(dir string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, dir)
		}
		return nil // what vanishes while we look is what we want
	})
	for _, dir := range slices.Backward(dirs) {
		if rmErr := unix.Rmdir(dir); rmErr != nil && !errors.Is(rmErr, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove cgroup %s: %w", dir, rmErr))
		}
	}
	return err
}

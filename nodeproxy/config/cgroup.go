package config

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Cgroup2Mount finds where cgroup2 is mounted: /sys/fs/cgroup, or below it on a host that still has cgroup1 as well.
func Cgroup2Mount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer func() { _ = f.Close() }()
	return cgroup2Mount(f)
}

// cgroup2Mount reads mountinfo, see proc_pid_mountinfo(5).
func cgroup2Mount(mountinfo io.Reader) (string, error) {
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		before, after, found := strings.Cut(lines.Text(), " - ")
		mount, kind := strings.Fields(before), strings.Fields(after)
		if found && len(mount) > 4 && len(kind) > 0 && kind[0] == "cgroup2" {
			return strings.ReplaceAll(mount[4], `\040`, " "), nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	return "", errors.New("find cgroup2: it is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

// onCgroup2 says why path cannot be a workload's cgroup. What does not exist yet is judged by the nearest parent that does.
func onCgroup2(path string) error {
	existing := path
	var st unix.Statfs_t
	err := unix.Statfs(existing, &st)
	for errors.Is(err, fs.ErrNotExist) && existing != "/" {
		existing = filepath.Dir(existing)
		err = unix.Statfs(existing, &st)
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", existing, err)
	}
	mount, err := Cgroup2Mount()
	switch {
	case err != nil:
		return err
	case st.Type != unix.CGROUP2_SUPER_MAGIC:
		return fmt.Errorf("not on cgroup2, which is mounted at %s", mount)
	case path == mount:
		return errors.New("the root of cgroup2 cannot be a workload: name the cgroup of one")
	}
	return nil
}

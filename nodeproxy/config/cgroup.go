package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
)

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
	mount, err := redirect.CgroupMount()
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

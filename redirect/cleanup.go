package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Prune removes the enrolments that keep does not name and the guards of namespaces that are not open: what an earlier
// daemon left and this one has no use for. Call it once the workloads are known and their namespaces open.
func (r *Redirect) Prune(keep func(cgroup uint64) bool) error {
	var errs []error
	for _, e := range r.Enrolled() {
		if !keep(e.Cgroup) {
			errs = append(errs, r.Unenroll(e.Cgroup))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for cookie := range r.inherited {
		if err := r.obj.NsReady.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("close namespace %d for redirects: %w", cookie, err))
			continue
		}
		if err := r.obj.Closes.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("forget closed listeners of namespace %d: %w", cookie, err))
			continue
		}
		if err := os.RemoveAll(filepath.Join(r.dir, "namespaces", strconv.FormatUint(cookie, 10))); err != nil {
			errs = append(errs, fmt.Errorf("remove guard: %w", err))
			continue
		}
		errs = append(errs, r.forgetDNSSpace(cookie))
		delete(r.inherited, cookie)
	}
	return errors.Join(errs...)
}

// Cleanup removes all that is pinned below pins for node, or for every node when node is "", of any map ABI, and the
// cgroups that OwnCgroup made. It needs no daemon and no configuration, returns what it removed, and refuses while a daemon
// runs (ErrInUse). It can be called again after an error.
func Cleanup(pins, node string) (removed []string, err error) {
	nodes := []string{node}
	if node == "" {
		if nodes, err = subdirectories(pins, isNode(pins)); err != nil {
			return nil, err
		}
	}
	for _, n := range nodes {
		got, err := cleanupNode(filepath.Join(pins, n), n)
		removed = append(removed, got...)
		if err != nil {
			return removed, err
		}
	}
	_ = os.Remove(pins) // it may be a mount point, or hold what is not ours
	return removed, nil
}

func cleanupNode(dir, node string) (removed []string, err error) {
	versions, err := subdirectories(dir, isVersion)
	if err != nil {
		return nil, err
	}
	own := ownCgroups(dir, versions, node)
	for _, v := range versions {
		got, err := cleanupVersion(filepath.Join(dir, v))
		removed = append(removed, got...)
		if err != nil {
			return removed, err
		}
	}
	if err := os.Remove(dir); err != nil && len(versions) > 0 {
		return removed, fmt.Errorf("remove pin directory: %w", err)
	}
	for _, cgroup := range own {
		switch err := os.Remove(cgroup); {
		case err == nil:
			removed = append(removed, "cgroup "+cgroup)
		case !errors.Is(err, fs.ErrNotExist):
			return removed, fmt.Errorf("remove the daemon's cgroup: %w: a process is still in it", err)
		}
	}
	return removed, nil
}

// ownCgroups finds the cgroup that OwnCgroup made for the daemon whose links are pinned below dir. A cgroup of that name
// which is another daemon's is left alone.
func ownCgroups(dir string, versions []string, node string) []string {
	mount, err := CgroupMount()
	if err != nil {
		return nil
	}
	cgroup := filepath.Join(mount, daemonCgroup(node))
	id, err := CgroupID(cgroup)
	if err != nil {
		return nil
	}
	for _, v := range versions {
		l, err := link.LoadPinnedLink(filepath.Join(dir, v, daemonPin), nil)
		if err != nil {
			continue
		}
		linked := linkedCgroup(l)
		l.Close()
		if linked == id {
			return []string{cgroup}
		}
	}
	return nil
}

// cleanupVersion removes links first, so that at no moment a steering program runs without its maps.
func cleanupVersion(dir string) (removed []string, err error) {
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	var maps, links []string
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil || d.IsDir():
			return err
		case strings.HasPrefix(path, filepath.Join(dir, "maps")):
			maps = append(maps, path)
		case path != filepath.Join(dir, daemonPin):
			links = append(links, path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read pin directory: %w", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, daemonPin)); err == nil {
		links = append(links, filepath.Join(dir, daemonPin)) // the last: by it a cleanup that is repeated finds the cgroup
	}
	for _, path := range links {
		if err := removeLink(path); err != nil {
			return removed, err
		}
		removed = append(removed, "link "+path)
	}
	for _, path := range maps {
		if err := os.Remove(path); err != nil {
			return removed, fmt.Errorf("remove pinned map: %w", err)
		}
		removed = append(removed, "map "+path)
	}
	if err := os.RemoveAll(dir); err != nil {
		return removed, fmt.Errorf("remove pin directory: %w", err)
	}
	return removed, nil
}

// removeLink detaches a link, also where another process still holds it, and removes its pin.
func removeLink(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, err)
	}
	defer l.Close()
	if d, ok := l.(interface{ Detach() error }); ok {
		if err := d.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detach %s: %w", path, err)
		}
	}
	if err := l.Unpin(); err != nil {
		return fmt.Errorf("unpin %s: %w", path, err)
	}
	return nil
}

func subdirectories(dir string, ours func(name string) bool) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pin directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && ours(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// isVersion recognises the directory of a map ABI.
func isVersion(name string) bool {
	number, ok := strings.CutPrefix(name, "v")
	_, err := strconv.ParseUint(number, 10, 16)
	return ok && err == nil
}

// isNode recognises a node's directory below pins, which may be shared with other software.
func isNode(pins string) func(name string) bool {
	return func(name string) bool {
		versions, err := subdirectories(filepath.Join(pins, name), isVersion)
		if err != nil || len(versions) == 0 {
			return false
		}
		_, err = os.Stat(filepath.Join(pins, name, versions[0], "maps"))
		return err == nil
	}
}

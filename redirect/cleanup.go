package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Prune removes what is pinned for namespaces that are not open and enrolments that keep does not name: what an earlier
// daemon left and this one has no use for. Call it once the workloads are known.
func (r *Redirect) Prune(keep func(cgroup uint64) bool) error {
	var errs []error
	for _, e := range r.Enrolled() {
		if !keep(e.Cgroup) {
			errs = append(errs, r.Unenroll(e.Cgroup))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var stale []uint64
	var cookie uint64
	var ready outboundNsReady
	for it := r.obj.NsReady.Iterate(); it.Next(&cookie, &ready); {
		if _, open := r.namespaces[cookie]; !open {
			stale = append(stale, cookie)
		}
	}
	for _, cookie := range stale {
		errs = append(errs, r.obj.NsReady.Delete(cookie))
	}
	root := filepath.Join(r.dir, "namespaces")
	entries, err := os.ReadDir(root)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("read pinned guards: %w", err))...)
	}
	for _, entry := range entries {
		var cookie uint64
		if _, err := fmt.Sscanf(entry.Name(), "%d", &cookie); err == nil && r.namespaces[cookie] != nil {
			continue
		}
		errs = append(errs, os.RemoveAll(filepath.Join(root, entry.Name())))
	}
	return errors.Join(errs...)
}

// Cleanup removes all that is pinned below pins for node, or for every node when node is "", of any map ABI, and the
// cgroups that OwnCgroup made. It needs no daemon and no configuration, returns what it removed, and refuses while a daemon
// runs (ErrInUse). It can be called again after an error.
func Cleanup(pins, node string) (removed []string, err error) {
	nodes := []string{node}
	if node == "" {
		if nodes, err = subdirectories(pins); err != nil {
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
	if err := os.Remove(pins); err != nil && node == "" && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
		return removed, fmt.Errorf("remove pin directory: %w", err)
	}
	return removed, nil
}

func cleanupNode(dir, node string) (removed []string, err error) {
	versions, err := subdirectories(dir)
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
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
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
		default:
			links = append(links, path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read pin directory: %w", err)
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

func subdirectories(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pin directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

package workload

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// xattrPrefix is of a namespace that root alone can write (xattr(7)): the owner of a delegated cgroup can set "user."
	// attributes, which are never read.
	xattrPrefix = "trusted.nodeproxy."

	walkEvery    = time.Second           // where changes cannot be watched, and after some were lost
	changesPause = 20 * time.Millisecond // between two readings of changes: who makes many of them costs little
	maxLabel     = 4096                  // bytes of one attribute
)

// Xattr is the provider of cgroups that carry extended attributes "trusted.nodeproxy.<key>".
type Xattr struct {
	mount string
	log   *slog.Logger
	watch func(mount string) (*cgroupWatch, error)
	found map[string]Claim // by cgroup; Run's own
}

// NewXattr is a provider for the cgroups below mount, where cgroup2 is.
func NewXattr(mount string, log *slog.Logger) *Xattr {
	return &Xattr{mount: mount, log: log, watch: watchCgroups}
}

// Name implements Provider.
func (*Xattr) Name() string { return "xattr" }

// Run implements Provider.
func (x *Xattr) Run(ctx context.Context, claim func([]Claim)) error {
	watch, err := x.watch(x.mount)
	if err == nil {
		defer watch.close()
		defer context.AfterFunc(ctx, watch.stop)()
	}
	if walkErr := x.walk(); walkErr != nil {
		return walkErr
	}
	claim(x.claims())
	if err == nil {
		err = x.follow(ctx, watch, claim)
	}
	if ctx.Err() != nil {
		return nil
	}
	x.log.Warn("watch cgroups for labels: changes are seen by looking only", "every", walkEvery, "error", err)
	return x.look(ctx, claim)
}

// look walks again and again.
func (x *Xattr) look(ctx context.Context, claim func([]Claim)) error {
	tick := time.NewTicker(walkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		before := x.found
		if err := x.walk(); err != nil {
			return err
		}
		x.tell(before, claim)
	}
}

// follow reads again what changed, until ctx ends or that is not told any more.
func (x *Xattr) follow(ctx context.Context, watch *cgroupWatch, claim func([]Claim)) error {
	for {
		dirs, lost, err := watch.next()
		if err != nil {
			return err
		}
		before, pause := maps.Clone(x.found), changesPause
		for dir := range dirs {
			x.read(dir)
		}
		if lost {
			x.log.Warn("changes of cgroups came faster than they were read: looking at all of them")
			if err := x.walk(); err != nil {
				return err
			}
			pause = walkEvery
		}
		x.tell(before, claim)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

func (x *Xattr) tell(before map[string]Claim, claim func([]Claim)) {
	if !maps.EqualFunc(before, x.found, sameClaim) {
		claim(x.claims())
	}
}

func (x *Xattr) claims() []Claim {
	return slices.SortedFunc(maps.Values(x.found), func(a, b Claim) int { return strings.Compare(a.Cgroup, b.Cgroup) })
}

// walk reads the labels of every cgroup.
func (x *Xattr) walk() error {
	x.found = make(map[string]Claim)
	err := filepath.WalkDir(x.mount, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return skipGone(err)
		case d.IsDir():
			x.read(path)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look for labels of cgroups: %w", err)
	}
	return nil
}

// read brings x.found in line with one cgroup. One that is gone took those below it along.
func (x *Xattr) read(dir string) {
	if !within(dir, x.mount) {
		return // outside our view of cgroup2
	}
	labels, err := xattrs(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		maps.DeleteFunc(x.found, func(path string, _ Claim) bool { return within(path, dir) })
	case err != nil:
		x.found[dir] = Claim{Cgroup: dir, Provider: x.Name(), Invalid: err.Error()}
	case len(labels) == 0:
		delete(x.found, dir)
	default:
		x.found[dir] = labels.Claim(x.Name(), dir)
	}
}

// xattrs reads the labels of a directory. It takes CAP_SYS_ADMIN: without it there seem to be none.
func xattrs(dir string) (Labels, error) {
	names := make([]byte, 1<<16) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(dir, names)
	if err != nil {
		return nil, &os.PathError{Op: "list the labels of", Path: dir, Err: err}
	}
	var labels Labels
	value := make([]byte, maxLabel)
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		key, ours := strings.CutPrefix(name, xattrPrefix)
		if !ours {
			continue
		}
		n, err := unix.Lgetxattr(dir, name, value)
		switch {
		case errors.Is(err, unix.ENODATA):
			continue // removed meanwhile, which is reported
		case errors.Is(err, unix.ERANGE):
			return nil, fmt.Errorf("label %s is longer than %d bytes", key, maxLabel)
		case err != nil:
			return nil, &os.PathError{Op: "read label " + key + " of", Path: dir, Err: err}
		}
		if labels == nil {
			labels = make(Labels)
		}
		labels[key] = strings.TrimSuffix(string(value[:n]), "\x00") // setfattr writes none, some programs do
	}
	return labels, nil
}

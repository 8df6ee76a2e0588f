package workload

import (
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/fsnotify/fsnotify"
)

// watcher wakes the Manager when a claimed cgroup appears or gets its first process, so that what is made anew, as a
// restarted unit's cgroup is, is protected within milliseconds and not with the next look.
type watcher struct {
	notify  *fsnotify.Watcher // nil: the kernel gave none, and only looks remain
	watched map[string]bool
	done    sync.WaitGroup
}

func newWatcher(wake func(), log *slog.Logger) *watcher {
	w := &watcher{watched: make(map[string]bool)}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("watch cgroups: new ones are seen by looking only, raise fs.inotify.max_user_instances", "every", reconcileEvery, "error", err)
		return w
	}
	w.notify = notify
	w.done.Go(func() {
		for e := range notify.Events {
			if e.Has(fsnotify.Create) || e.Has(fsnotify.Write) {
				wake()
			}
		}
	})
	w.done.Go(func() {
		for err := range notify.Errors {
			log.Warn("watch cgroups", "error", err)
		}
	})
	return w
}

// follow watches, for each cgroup, its cgroup.events file and the nearest directory above it that exists, and nothing else.
func (w *watcher) follow(cgroups []string) {
	if w == nil || w.notify == nil {
		return
	}
	wanted := make(map[string]bool)
	for _, dir := range cgroups {
		wanted[filepath.Join(dir, "cgroup.events")] = true
		parent := filepath.Dir(dir)
		for parent != "/" {
			if _, err := os.Stat(parent); err == nil {
				break
			}
			parent = filepath.Dir(parent)
		}
		wanted[parent] = true
	}
	for path := range w.watched {
		if !wanted[path] {
			_ = w.notify.Remove(path) // it may be gone, and its watch with it
			delete(w.watched, path)
		}
	}
	for path := range wanted {
		w.watched[path] = w.notify.Add(path) == nil // again each time: a cgroup made anew has a new file
	}
}

func (w *watcher) close() error {
	if w.notify == nil {
		return nil
	}
	err := w.notify.Close()
	w.done.Wait()
	return err
}

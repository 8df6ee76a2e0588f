package file

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"nodeproxy.io/nodeproxy/catalog"
)

// run is one run of a Source. Its fields belong to the goroutine of loop.
type run struct {
	*Source
	deliver func(*catalog.Snapshot)
	checker *checker
	leaves  *leaves
	watcher *fsnotify.Watcher // nil: there is none, only rescans

	generation  uint64
	last        *catalog.Snapshot // that was delivered; nil when a newer one of the same world could not be
	world       *world            // the last good one, nil at first
	parts       parts             // of the directory when it was last read
	fingerprint string            // of the directory when it was last read; "" to read it again in any case
	readErr     error             // what is wrong with the directory
	caErr       error             // what is wrong with the CA, while an older one is in force
	leafErr     error             // what keeps leaves from being issued
}

// watch starts to watch for events. Without a watcher, which the kernel may refuse, only rescans remain.
func (r *run) watch() (events <-chan fsnotify.Event, stop func()) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		r.cfg.Log.Warn("watch mesh directory: changes are seen by looking at it only, raise fs.inotify.max_user_instances", "every", rescan, "error", err)
		return nil, func() {}
	}
	r.watcher = w
	errs := make(chan struct{})
	go func() { // an overflow of the queue is no more than an event lost: the next rescan finds the change
		defer close(errs)
		for err := range w.Errors {
			r.cfg.Log.Warn("watch mesh directory", "error", err)
		}
	}()
	return w.Events, func() {
		_ = w.Close()
		<-errs
	}
}

func (r *run) loop(ctx context.Context, events <-chan fsnotify.Event) {
	look := time.NewTicker(rescan)
	defer look.Stop()
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	renew := time.NewTimer(0)
	defer renew.Stop()
	var since time.Time           // of the first event that has not been acted on
	told := make(map[string]bool) // which files these events are of
	for {
		select {
		case <-ctx.Done():
			return
		case event, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if isTemporary(event.Name) {
				continue
			}
			if since.IsZero() {
				since = time.Now()
			}
			told[event.Name] = true
			quiet.Reset(min(settleTime, max(0, settleMax-time.Since(since))))
			continue
		case <-quiet.C:
			since, r.fingerprint = time.Time{}, ""
			if !r.intend(told) {
				r.watchAll()
				r.reread(ctx)
			}
			clear(told)
		case <-look.C:
			r.watchAll()
			r.look(ctx)
		case <-r.checker.changed:
			r.rebuild(true)
		case <-r.needed:
			r.rebuild(false)
		case <-renew.C:
			r.rebuild(false)
		}
		renew.Reset(r.leaves.untilRenewal())
	}
}

// isTemporary says whether path is a file of ours or of an editor that is renamed when it is whole, or the lock. What
// begins with two dots is how mounts in containers switch to new content.
func isTemporary(path string) bool {
	name := filepath.Base(path)
	return strings.HasPrefix(name, ".") && !strings.HasPrefix(name, "..")
}

// watchAll watches what directories there are now.
func (r *run) watchAll() {
	if r.watcher == nil {
		return
	}
	for _, dir := range directories(r.cfg.Dir) {
		_ = r.watcher.Add(dir) // one that is gone by now is seen by the next look
	}
}

// look reads the directory, unless it looks as it did when it was last looked at.
func (r *run) look(ctx context.Context) {
	seen := fingerprint(r.cfg.Dir)
	if seen == r.fingerprint {
		r.report()
		return
	}
	r.fingerprint = "" // what is wrong need not be in the files: look again
	if r.reread(ctx); r.readErr == nil && r.caErr == nil {
		r.fingerprint = seen
	}
}

// reread reads the directory and delivers what has changed.
func (r *run) reread(ctx context.Context) {
	r.readErr = r.renew(ctx)
	r.report()
}

func (r *run) renew(ctx context.Context) error {
	next, err := r.read(ctx)
	if err != nil {
		return err
	}
	if r.world != nil && next.equal(r.world) {
		return nil
	}
	if err := r.adopt(next); err != nil {
		return err
	}
	r.checker.set(ctx, next.local(r.cfg.Node))
	return nil
}

// read reads all of the directory.
func (r *run) read(ctx context.Context) (*world, error) {
	r.caErr = nil
	var m *mesh
	var err error
	m, r.parts, err = readMesh(r.cfg.Dir, r.cfg.Datacenter, r.parts)
	if err != nil {
		return nil, err
	}
	next := &world{mesh: m}
	var known *state
	if r.world != nil {
		known = r.world.state
		if err := r.vanished(); err != nil {
			return nil, err
		}
	}
	if next.authority, r.caErr = r.openAuthority(ctx); next.authority == nil {
		return nil, r.caErr
	}
	next.state, err = settle(ctx, r.cfg.Dir, demandOf(&r.cfg, m), known)
	return next, err
}

// openAuthority reads the CA. When that fails, the one in force is returned with the error: definitions are applied
// all the same, above all intentions that deny.
func (r *run) openAuthority(ctx context.Context) (*authority, error) {
	if r.world == nil {
		return openAuthority(ctx, r.cfg.Dir, r.now(), true)
	}
	old := r.world.authority
	a, err := openAuthority(ctx, r.cfg.Dir, r.now(), false)
	if err != nil {
		return old, err
	}
	if a.trustDomain != old.trustDomain {
		return old, fmt.Errorf("read CA: its trust domain is %s now and was %s: restore it, or restart every daemon to change meshes", a.trustDomain, old.trustDomain)
	}
	return a, nil
}

// vanished says what whole directory is gone. That is a mistake, or a copy in progress, and not a mesh with nothing in it.
func (r *run) vanished() error {
	for dir, had := range map[string]int{nodesDir: len(r.world.mesh.instances), configDir: len(r.world.mesh.entries.intentions)} {
		if _, err := os.Stat(filepath.Join(r.cfg.Dir, dir)); had > 0 && err != nil {
			return fmt.Errorf("read mesh directory: %w: restore it, or create it empty to say that nothing is left", err)
		}
	}
	return nil
}

// adopt delivers a snapshot of next and makes it the world, or leaves all as it was.
func (r *run) adopt(next *world) error {
	if r.world != nil && reflect.DeepEqual(next.mesh, r.world.mesh) {
		next.policy = r.world.policy
	} else {
		var err error
		if next.policy, err = compile(&r.cfg, next.mesh, next.authority.trustDomain, r.generation+1); err != nil {
			return err
		}
	}
	if r.last != nil && next.sameButIntentions(r.world) { // the way of what must be fast: that somebody is denied from now on
		r.world = next
		r.give(r.last.WithPolicy(next.policy, r.generation+1, r.now()))
		return nil
	}
	if _, err := r.snapshot(next); err != nil { // before leaves are issued for it
		return err
	}
	_, r.leafErr = r.leaves.ensure(next.authority, r.cfg.Datacenter, r.wanted())
	if err := r.send(next); err != nil {
		return err
	}
	r.world = next
	return nil
}

// rebuild delivers the world again if its leaves have changed, or in any case when always is set.
func (r *run) rebuild(always bool) {
	if r.world == nil {
		return
	}
	changed, err := r.leaves.ensure(r.world.authority, r.cfg.Datacenter, r.wanted())
	r.leafErr = err
	switch current := r.leaves.current(); {
	case changed && !always && r.last != nil && areServices(r.last, current) && areServices(r.last, r.last.Leaves):
		r.give(r.last.WithLeaves(current, r.generation+1, r.now()))
	case changed || always:
		if err := r.send(r.world); err != nil {
			r.readErr = err
		}
	}
	r.report()
}

// areServices says whether all leaves are of services of snap: of others there is a problem in it.
func areServices(snap *catalog.Snapshot, leaves map[string]*tls.Certificate) bool {
	for name := range leaves {
		if snap.Services[name] == nil {
			return false
		}
	}
	return true
}

func (r *run) snapshot(w *world) (*catalog.Snapshot, error) {
	return build(&r.cfg, w, r.leaves.current(), r.checker.healthy, r.generation+1, r.now())
}

func (r *run) send(w *world) error {
	r.last = nil
	snap, err := r.snapshot(w)
	if err != nil {
		return err
	}
	r.give(snap)
	return nil
}

func (r *run) give(snap *catalog.Snapshot) {
	r.generation++
	r.last = snap
	r.deliver(snap)
}

func (r *run) wanted() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.need)
}

// report brings Health up to date and logs an error when it is a new one.
func (r *run) report() {
	err := r.readErr
	if !errors.Is(err, r.caErr) {
		err = errors.Join(err, r.caErr)
	}
	err = errors.Join(err, r.leafErr)
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.health.Err
	if r.readErr == nil {
		r.health.Updated = r.now()
	}
	r.health.Err = err
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		r.cfg.Log.Error("mesh directory is not applied, the last good state stays in force", "directory", r.cfg.Dir, "error", err)
	case err == nil && before != nil:
		r.cfg.Log.Info("mesh directory is applied", "directory", r.cfg.Dir, "generation", r.generation)
	}
}

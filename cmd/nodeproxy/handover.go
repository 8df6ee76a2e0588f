package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/handover"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/redirect"
)

// The sockets that are handed over beside the manager's, by what they are and where.
const (
	adminFile   = "admin/"
	metricsFile = "metrics/"
)

// handoverSocket is beside the admin socket.
func handoverSocket(cfg *config.Config) string {
	return filepath.Join(filepath.Dir(cfg.Admin.Socket), "handover.sock")
}

func self(cfg *config.Config) handover.Self {
	return handover.Self{Version: version, MapABI: redirect.MapABI, Node: cfg.Node.Name, Pins: filepath.Clean(cfg.State.Pins)}
}

// inherit is a file of the daemon before, nil for none.
func (d *node) inherit(name string) *os.File {
	if d.estate == nil {
		return nil
	}
	d.taking.Lock() // namespaces are opened several at a time
	defer d.taking.Unlock()
	return d.estate.Files.Take(name)
}

func (d *node) kernelBefore() *workload.Before {
	if d.estate == nil {
		return nil
	}
	b := &workload.Before{State: d.estate.State, Take: d.inherit}
	if d.before != nil {
		b.Runs, b.PID = true, d.before.From.PID
	}
	return b
}

// settled closes what nobody has taken of a daemon that is dead.
func (d *node) settled() {
	if d.before == nil && d.estate != nil {
		d.taking.Lock()
		defer d.taking.Unlock()
		d.estate.Files.Close()
	}
}

// keeper is who holds what the next daemon needs, or nothing for a nil state.
func (d *node) keeper() func(state []byte, files map[string]syscall.Conn) error {
	if d.store == nil {
		return nil
	}
	return func(state []byte, files map[string]syscall.Conn) error {
		if state == nil {
			return d.store.Drop()
		}
		return d.store.Keep(d.self, state, files)
	}
}

// busTimeout is how long systemd has to say why it ends the daemon: less than a heartbeat lasts.
const busTimeout = 3 * time.Second

// restarts says why the service manager ends this process: true if it starts the next one at once. Where it cannot be asked it is
// taken for a stop.
func (d *node) restarts() bool {
	if d.store == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), busTimeout)
	defer cancel()
	stops, err := stopped(ctx)
	if err != nil {
		d.log.Warn("whether this is a restart is not known: it is taken for a stop, and what connects meanwhile is refused", "error", err)
		return false
	}
	if y, ok := d.source.(catalog.Yielder); ok && !stops {
		y.Yield() // it goes on in a moment
	}
	return !stops
}

// stopped says whether the unit of this process has a job to stop. A restart is another job, and what is only ended by a signal has
// none and is started again.
func stopped(ctx context.Context) (bool, error) {
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return false, fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	unit, err := conn.GetUnitNameByPID(ctx, uint32(os.Getpid()))
	if err != nil {
		return false, fmt.Errorf("ask systemd for the unit of this process: %w", err)
	}
	jobs, err := conn.ListJobsContext(ctx)
	if err != nil {
		return false, fmt.Errorf("ask systemd for its jobs: %w", err)
	}
	return slices.ContainsFunc(jobs, func(j systemd.JobStatus) bool { return j.Unit == unit && j.JobType == "stop" }), nil
}

// knowledge is the snapshot of the daemon before; nil for none.
type knowledge struct{ *catalog.Remembered }

func (d *node) knownBefore() knowledge {
	if d.estate == nil || len(d.estate.Snapshot) == 0 {
		return knowledge{}
	}
	defer clear(d.estate.Snapshot) // keys
	r, err := catalog.Decode(d.estate.Snapshot)
	if err != nil {
		d.log.Warn("the snapshot of the daemon before is not used: the source's first one is awaited", "error", err)
		return knowledge{}
	}
	return knowledge{r}
}

func (k knowledge) generation() uint64 {
	if k.Remembered == nil {
		return 0
	}
	return k.Snapshot.Generation
}

// resume is source, beginning with what the daemon before had in force until this moment.
func (k knowledge) resume(source catalog.Source, log *slog.Logger) catalog.Source {
	if k.Remembered == nil {
		return source
	}
	now := source.Health()
	if k.Kind != now.Kind || k.Location != now.Location {
		log.Warn("the snapshot of the daemon before is not used: it is of another source", "its", k.Kind+" "+k.Location, "ours", now.Kind+" "+now.Location)
		return source
	}
	if r, ok := source.(catalog.Restorer); ok {
		if err := r.Restore(k.Snapshot, k.Updated); err != nil {
			log.Warn("the snapshot of the daemon before is not used", "error", err)
			return source
		}
	}
	source.Need(slices.Sorted(maps.Keys(k.Snapshot.Leaves)))
	return &resumed{source, k.Snapshot}
}

// resumed is a source that delivers an older snapshot first.
type resumed struct {
	catalog.Source
	first *catalog.Snapshot
}

// Run implements catalog.Source.
func (s *resumed) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	deliver(s.first)
	return s.Source.Run(ctx, func(snap *catalog.Snapshot) {
		if snap.Generation > s.first.Generation { // a source that fell back delivers the first again
			deliver(snap)
		}
	})
}

// succeed makes this daemon the node's, once it serves. Until then the daemon before goes on.
func (d *node) succeed(ctx context.Context) error {
	if d.before == nil {
		return nil
	}
	lost := d.before.Lost()
	for {
		select {
		case <-d.manager.Ready():
			if err := d.before.Commit(); err != nil {
				return err
			}
			if err := d.store.Succeed(d.before.Estate); err != nil {
				d.log.Warn("what the service manager keeps for the daemon before is kept beside what it will for this one", "error", err)
			}
			d.manager.TakeOffice()
			d.before.Estate.Files.Close() // those that nobody needs
			d.tookOver.Store(&admin.Handover{From: d.before.From.Version, PID: d.before.From.PID, At: time.Now()})
			d.log.Info("took over from the daemon before", "version", d.before.From.Version, "pid", d.before.From.PID)
			d.tell("took over from version " + d.before.From.Version)
			return nil
		case <-lost:
			if err := d.before.Err(); err != nil {
				return err
			}
			d.log.Warn("the daemon before has died while it handed over: this one goes on with what it has left")
			lost = nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// handoverStatus is nil where no daemon handed over to this one.
func (d *node) handoverStatus() *admin.Handover {
	took := d.tookOver.Load()
	if took == nil {
		return nil
	}
	now := *took
	select {
	case <-d.before.Drained():
	default:
		now.Draining = true
	}
	return &now
}

// lost is why run ended when the daemon before did not wait for this one.
func (d *node) lost(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// tell shows in traces that the daemon has changed.
func (d *node) tell(what string) {
	d.recorder.Hub.Observe(admin.Connection{Event: admin.EventHandover, Time: time.Now(), Detail: what})
}

// handOver serves the next daemon.
func (d *node) handOver(ctx context.Context) error {
	s, err := handover.Listen(d.handover, d.self, d, d.log)
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}

// Bequeath implements handover.Owner.
func (d *node) Bequeath(ctx context.Context, to handover.Self) (*handover.Estate, error) {
	d.log.Info("another daemon is taking over", "version", to.Version, "pid", to.PID)
	d.manual.Freeze(true)
	state, files, err := d.manager.Freeze(ctx)
	if err != nil {
		d.manual.Freeze(false)
		return nil, err
	}
	e := &handover.Estate{State: state, Files: files}
	d.store.Bequeath(e.Files)
	e.Files[adminFile+d.server.Path()] = d.server.File()
	if d.metrics != nil {
		e.Files[metricsFile+d.metrics.Address()] = d.metrics.File()
	}
	snap := d.Snapshot()
	if snap == nil {
		return e, nil
	}
	health := d.source.Health()
	e.Snapshot, err = (&catalog.Remembered{Snapshot: snap, Kind: health.Kind, Location: health.Location, Updated: health.Updated}).Encode()
	if err != nil {
		return nil, errors.Join(err, d.takeBack())
	}
	return e, nil
}

// takeBack undoes Bequeath.
func (d *node) takeBack() error {
	d.manual.Freeze(false)
	return d.manager.Thaw()
}

// Resume implements handover.Owner.
func (d *node) Resume(to handover.Self, why error) {
	d.log.Error("the daemon that was taking over is gone: this one goes on", "version", to.Version, "pid", to.PID, "error", why)
	if err := d.takeBack(); err != nil {
		d.log.Error("take back what it has changed in the kernel: the audit goes on repairing", "error", err)
	}
}

// Release implements handover.Owner.
func (d *node) Release(to handover.Self) {
	d.tell("version " + to.Version + " took over")
	if y, ok := d.source.(catalog.Yielder); ok {
		y.Yield()
	}
	d.server.Yield() // before the process may end, because nothing is left to drain
	d.manager.Yield()
	d.stopPublic()
	d.public.Wait()
	d.store.Yield()
	d.released.Store(true)
	if to.PID > 0 {
		notify(d.log, fmt.Sprintf("MAINPID=%d", to.PID))
	}
	d.log.Info("another daemon has taken over: live connections may end by themselves", "version", to.Version, "pid", to.PID)
}

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
	"strconv"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

const (
	systemdName    = "org.freedesktop.systemd1"
	systemdManager = systemdName + ".Manager"

	busTimeout = 10 * time.Second // of one question to systemd
	busRetry   = time.Second      // between two attempts to connect
)

// Systemd is the provider of services whose unit file or drop-in has a section [X-NodeProxy]. systemd does not tell what is
// in such sections: it tells which files it read, and those are read again here, when it reads them.
type Systemd struct {
	mount string
	log   *slog.Logger
	dial  func(context.Context) (*dbus.Conn, error)
	units map[string]*labelledUnit // by name, all that were looked at; Run's own
	// While systemd reads its files again it says of every unit that it was removed, and then that it is new. Run's own.
	reloading bool

	mu      sync.Mutex
	problem error
}

// labelledUnit is a service unit that systemd has loaded.
type labelledUnit struct {
	labels  Labels // nil: it has no section
	invalid string // why they could not be read
	cgroup  string
	sockets []string // cgroups of the socket units that start it
	ending  bool     // it is being stopped
}

// NewSystemd is a provider for the units of this machine's service manager. mount is where cgroup2 is.
func NewSystemd(mount string, log *slog.Logger) *Systemd {
	return &Systemd{mount: mount, log: log, dial: dialSystemBus, units: make(map[string]*labelledUnit)}
}

func dialSystemBus(ctx context.Context) (*dbus.Conn, error) {
	return dbus.ConnectSystemBus(dbus.WithContext(ctx), dbus.WithAuth(dbus.AuthExternal(strconv.Itoa(os.Geteuid()))),
		dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
}

// Name implements Provider.
func (*Systemd) Name() string { return "systemd" }

// Problem implements Reporter.
func (s *Systemd) Problem() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// Run implements Provider. While systemd cannot be asked, the claims stay what they were.
func (s *Systemd) Run(ctx context.Context, claim func([]Claim)) error {
	for {
		err := s.session(ctx, claim)
		if ctx.Err() != nil {
			return nil
		}
		err = fmt.Errorf("follow systemd over D-Bus: %w: see `systemctl status dbus.socket`, or set workloads.systemd.enabled to false where there is no systemd; it is tried again every %s", err, busRetry)
		if s.report(err) {
			s.log.Warn("workload provider has a problem; its workloads stay as they are", "provider", s.Name(), "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(busRetry):
		}
	}
}

// report says whether err is news.
func (s *Systemd) report(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	news := fmt.Sprint(s.problem) != fmt.Sprint(err)
	s.problem = err
	return news
}

// UnitClaims lists what the units that are loaded now claim. It asks systemd itself: there need not be a bus yet.
func UnitClaims(ctx context.Context, mount string) ([]Claim, error) {
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	s := &Systemd{mount: mount, units: make(map[string]*labelledUnit)}
	if err := s.readAll(ctx, bus{conn: conn}); err != nil {
		return nil, err
	}
	return s.claims(), nil
}

// session follows systemd until the connection ends.
func (s *Systemd) session(ctx context.Context, claim func([]Claim)) error {
	var signalling *dbus.Conn
	conn, err := systemd.NewConnection(func() (_ *dbus.Conn, err error) {
		signalling, err = s.dial(ctx) // called twice: the second is the one on which signals come
		return signalling, err
	})
	if err != nil {
		return fmt.Errorf("connect to the system bus: %w", err)
	}
	defer conn.Close()
	signals := make(chan *dbus.Signal, 256)
	signalling.Signal(signals)
	b := bus{conn: conn}
	if b.owner, err = subscribe(ctx, signalling); err != nil {
		return err
	}
	s.reloading = false
	if err := s.readAll(ctx, b); err != nil {
		return err
	}
	s.report(nil)
	told := s.claims()
	claim(told)
	for {
		changed, err := s.await(ctx, b, signals)
		if err != nil {
			return err
		}
		if !changed {
			continue
		}
		if now := s.claims(); !slices.EqualFunc(told, now, sameClaim) {
			told = now
			claim(told)
		}
	}
}

func sameClaim(a, b Claim) bool {
	return a.Cgroup == b.Cgroup && a.Invalid == b.Invalid && a.Ending == b.Ending && a.agrees(b)
}

// subscribe makes systemd's signals come, and returns who sends them.
func subscribe(ctx context.Context, conn *dbus.Conn) (owner string, err error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	err = conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, systemdName))
	if err == nil {
		err = conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(systemdName), dbus.WithMatchInterface(systemdManager))
	}
	if err == nil {
		err = conn.Object(systemdName, "/org/freedesktop/systemd1").CallWithContext(ctx, systemdManager+".Subscribe", 0).Err
	}
	if err != nil {
		return "", fmt.Errorf("subscribe to systemd's signals: %w", err)
	}
	if err := conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, systemdName).Store(&owner); err != nil {
		return "", fmt.Errorf("find systemd on the bus: %w", err)
	}
	return owner, nil
}

// await waits for signals and does what those that came together ask for. A unit is looked at when it has a job: one that
// somebody merely asked about is loaded and forgotten again, and to ask about it would go on for ever.
func (s *Systemd) await(ctx context.Context, b bus, signals <-chan *dbus.Signal) (changed bool, err error) {
	look := make(map[string]bool)
	reloaded := false
	take := func(sig *dbus.Signal) error {
		if sig.Sender != b.owner && sig.Sender != "org.freedesktop.DBus" {
			return nil // any user can send us a signal
		}
		switch strings.TrimPrefix(sig.Name, systemdManager+".") {
		case "org.freedesktop.DBus.NameOwnerChanged":
			return errors.New("systemd's place on the bus changed hands")
		case "JobNew", "JobRemoved":
			if unit, ok := argument[string](sig, 2); ok && (isService(unit) || isSocket(unit)) {
				look[unit] = true
			}
		case "UnitRemoved":
			if unit, ok := argument[string](sig, 0); ok && !s.reloading {
				_, known := s.units[unit]
				delete(s.units, unit)
				delete(look, unit)
				changed = changed || known
			}
		case "Reloading":
			if begins, ok := argument[bool](sig, 0); ok {
				s.reloading, reloaded = begins, reloaded || !begins
			}
		}
		return nil
	}
	for wait := (<-chan time.Time)(nil); ; {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case sig, open := <-signals:
			if !open {
				return false, errors.New("the connection to the bus is lost")
			}
			if err := take(sig); err != nil {
				return false, err
			}
			if wait == nil {
				wait = time.After(changesPause)
			}
			continue
		case <-wait:
		}
		break
	}
	if reloaded && !s.reloading {
		return true, s.readAll(ctx, b)
	}
	if len(look) == 0 {
		return changed, nil
	}
	return true, s.readSome(ctx, b, slices.Sorted(maps.Keys(look)))
}

func argument[T any](sig *dbus.Signal, i int) (v T, ok bool) {
	if len(sig.Body) > i {
		v, ok = sig.Body[i].(T)
	}
	return v, ok
}

func isService(unit string) bool { return strings.HasSuffix(unit, ".service") }
func isSocket(unit string) bool  { return strings.HasSuffix(unit, ".socket") }

// readAll looks at every service that is loaded, and at its files again.
func (s *Systemd) readAll(ctx context.Context, b bus) error {
	names, err := b.loaded(ctx, "*.service")
	if err != nil {
		return err
	}
	before := s.units
	s.units = make(map[string]*labelledUnit)
	for _, name := range names {
		if err := s.readFiles(ctx, b, name, before[name]); err != nil {
			s.units = before
			return err
		}
	}
	return s.readJobs(ctx, b, names)
}

// readJobs notes which units are being stopped, or are about to be.
func (s *Systemd) readJobs(ctx context.Context, b bus, names []string) error {
	stopping, err := b.stopping(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if u := s.units[name]; u != nil {
			u.ending = stopping[name]
		}
	}
	return nil
}

// readSome looks at services that have or had a job, or whose sockets had one. The files of known ones are not read again: systemd
// does that when it is told to reload.
func (s *Systemd) readSome(ctx context.Context, b bus, names []string) error {
	var services []string
	for _, name := range names {
		if !isSocket(name) {
			services = append(services, name)
			continue
		}
		started, err := property[[]string](ctx, b.conn.GetUnitPropertyContext, name, "Triggers")
		if err != nil && !errors.Is(err, errGone) {
			return err
		}
		services = append(services, started...)
	}
	if len(services) == 0 {
		return nil
	}
	loaded, err := b.loaded(ctx, services...)
	if err != nil {
		return err
	}
	for _, name := range loaded {
		known := s.units[name]
		switch {
		case known == nil:
			err = s.readFiles(ctx, b, name, nil)
		case known.labels != nil || known.invalid != "":
			err = s.readCgroup(ctx, b, name, known)
		}
		if err != nil {
			return err
		}
	}
	return s.readJobs(ctx, b, loaded)
}

// readFiles reads the labels of a unit. before is what it was, or nil.
func (s *Systemd) readFiles(ctx context.Context, b bus, name string, before *labelledUnit) error {
	files, err := b.files(ctx, name)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	u := &labelledUnit{}
	u.labels, err = unitLabels(files)
	switch {
	case errors.Is(err, fs.ErrNotExist) && before != nil:
		*u = *before // a file was removed, and systemd has not been told to reload
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		u.invalid = err.Error()
	}
	s.units[name] = u
	if u.labels == nil && u.invalid == "" {
		return nil
	}
	return s.readCgroup(ctx, b, name, u)
}

// readCgroup finds the cgroup of a unit: where it is, or while the unit does not run where it will be.
func (s *Systemd) readCgroup(ctx context.Context, b bus, name string, u *labelledUnit) error {
	cgroup, err := b.cgroup(ctx, name)
	if errors.Is(err, errGone) {
		delete(s.units, name)
		return nil
	}
	if err != nil {
		return err
	}
	u.cgroup = filepath.Join(s.mount, cgroup)
	u.sockets = nil
	starters, err := property[[]string](ctx, b.conn.GetUnitPropertyContext, name, "TriggeredBy")
	if err != nil && !errors.Is(err, errGone) {
		return err
	}
	for _, starter := range starters {
		if !isSocket(starter) {
			continue
		}
		cgroup, err := b.cgroup(ctx, starter)
		if err != nil && !errors.Is(err, errGone) {
			return err
		}
		u.sockets = append(u.sockets, filepath.Join(s.mount, cgroup))
	}
	return nil
}

func (s *Systemd) claims() []Claim {
	var all []Claim
	for _, u := range s.units {
		if u.labels == nil && u.invalid == "" {
			continue
		}
		c := u.labels.Claim(s.Name(), u.cgroup)
		c.Ending = u.ending
		if u.invalid != "" {
			c.Invalid = u.invalid
		}
		all = append(all, c)
		for _, cgroup := range u.sockets {
			c.Cgroup, c.Sockets, c.Ending = cgroup, true, false
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b Claim) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	return all
}

// bus asks systemd.
type bus struct {
	conn  *systemd.Conn
	owner string // systemd's unique name
}

// errGone says that a unit was forgotten meanwhile.
var errGone = errors.New("systemd has forgotten the unit")

// loaded lists the units that systemd has loaded and whose names match, without loading any.
func (b bus) loaded(ctx context.Context, patterns ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	units, err := b.conn.ListUnitsByPatternsContext(ctx, nil, patterns)
	if err != nil {
		return nil, fmt.Errorf("list systemd's units: %w", err)
	}
	var names []string
	for _, u := range units {
		if u.LoadState == "loaded" && isService(u.Name) {
			names = append(names, u.Name)
		}
	}
	return names, nil
}

// stopping lists the units that have a job to stop, or to stop and start.
func (b bus) stopping(ctx context.Context) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	jobs, err := b.conn.ListJobsContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("list systemd's jobs: %w", err)
	}
	all := make(map[string]bool)
	for _, j := range jobs {
		all[j.Unit] = j.JobType == "stop" || j.JobType == "restart"
	}
	return all, nil
}

// files lists what a unit was read from, in the order in which settings hold.
func (b bus) files(ctx context.Context, unit string) ([]string, error) {
	fragment, err := property[string](ctx, b.conn.GetUnitPropertyContext, unit, "FragmentPath")
	if err != nil {
		return nil, err
	}
	files, err := property[[]string](ctx, b.conn.GetUnitPropertyContext, unit, "DropInPaths")
	if err != nil {
		return nil, err
	}
	if fragment != "" {
		files = slices.Insert(files, 0, fragment)
	}
	return files, nil
}

// cgroup is the path of a service's or a socket's cgroup below the root of the hierarchy.
func (b bus) cgroup(ctx context.Context, unit string) (string, error) {
	get := b.conn.GetServicePropertyContext
	if isSocket(unit) {
		get = func(ctx context.Context, unit, name string) (*systemd.Property, error) {
			return b.conn.GetUnitTypePropertyContext(ctx, unit, "Socket", name)
		}
	}
	path, err := property[string](ctx, get, unit, "ControlGroup")
	if err != nil || path != "" {
		return path, err
	}
	slice, err := property[string](ctx, get, unit, "Slice")
	return filepath.Join(SlicePath(slice), unit), err
}

// SlicePath is where a slice's cgroup is: one directory for each dash (systemd.slice(5)).
func SlicePath(slice string) string {
	path := "/"
	for i, r := range slice {
		if r == '-' && i > 0 {
			path = filepath.Join(path, slice[:i]+".slice")
		}
	}
	if slice == "" || slice == "-.slice" {
		return path
	}
	return filepath.Join(path, slice)
}

func property[T any](ctx context.Context, get func(context.Context, string, string) (*systemd.Property, error), unit, name string) (v T, err error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	p, err := get(ctx, unit, name)
	if e, ok := errors.AsType[dbus.Error](err); ok && (e.Name == systemdName+".NoSuchUnit" || e.Name == "org.freedesktop.DBus.Error.UnknownObject") {
		return v, errGone
	}
	if err != nil {
		return v, fmt.Errorf("ask systemd for %s of %s: %w", name, unit, err)
	}
	v, ok := p.Value.Value().(T)
	if !ok {
		return v, fmt.Errorf("ask systemd for %s of %s: it is a %s", name, unit, p.Value.Signature())
	}
	return v, nil
}

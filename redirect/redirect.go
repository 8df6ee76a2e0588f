// Package redirect owns all kernel state of one node: it loads, attaches, pins, syncs and removes the BPF programs and
// maps, listens and dials inside network namespaces, and reads origins, verdicts and socket owners.
//
// # Lifetime
//
// Everything is pinned below <pins>/<node>/v<ABI>. Close lets go of the pinned state and leaves it in force: with no
// daemon, redirected connections and guarded ports are refused by the kernel. A later Open takes over what it finds and
// swaps the programs in place. Only Unenroll, Prune and Cleanup remove anything.
//
// The package decides nothing: who may be a workload and who may connect is its caller's business.
package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// MapABI is the version of the maps' layout and meaning. It names the pin directory.
const MapABI = int(outboundConstantMAP_ABI)

// StaleSeconds is the heartbeat's bound: a daemon not seen alive for that long is gone, for the kernel.
const StaleSeconds = int(outboundConstantSTALE_SECONDS)

// daemonPin is the link on the daemon's own cgroup, in the pin directory.
const daemonPin = "daemon"

// Config says where a Redirect lives.
type Config struct {
	Pins     string // a directory on bpffs; state of this node goes to <Pins>/<Node>/v<MapABI>
	Node     string
	Cgroup   string // the daemon's own cgroup2 directory, from OwnCgroup
	FailOpen bool   // on_failure = "open"
	DNS      bool   // name queries of workloads may be steered: OpenDNS, SteerDNS

	// Inherited takes, by name, a file that the daemon before has from Files; nil for one that it has not. A nil function: it has
	// left nothing.
	Inherited func(name string) *os.File
	Runs      bool // the daemon before, and keeps its grants in line with the policy
}

// Redirect is the kernel state of one node. Its methods may be called concurrently.
type Redirect struct {
	dir    string
	lock   *os.File
	home   *os.File // the daemon's own network namespace
	obj    outboundObjects
	guard  *ebpf.Program // what the programs of namespaces call
	dns    *dnsSide      // nil: noDNS says why
	noDNS  error
	cgroup string    // the daemon's own
	own    link.Link // proxy_sockops on it
	events *ringbuf.Reader

	inherit func(name string) *os.File
	reading sync.Mutex // held by who reads events: the ring has one reader, in whatever process

	mu           sync.Mutex
	enrolled     map[uint64]*enrolment                               // by cgroup id
	namespaces   map[uint64]*Namespace                               // by cookie
	programs     map[*ebpf.Program]ebpf.ProgramID                    // the numbers of those that were asked for
	inherited    map[uint64]bool                                     // cookies of the namespaces that an earlier daemon guards and this one has not opened
	unclaimed    map[uint32]bool                                     // workloads that an earlier daemon enrolled and this one has not, yet
	dests        shadow[outboundDestinationKey, outboundDestination] // those for all workloads
	single       shadow[outboundDestinationKey, outboundDestination] // those for one
	ranges       shadow[outboundRangeKey, uint32]                    // of virtual IPs
	outside      shadow[outboundRangeKey, uint32]                    // the others
	plaintext    shadow[outboundRangeKey, uint32]
	rules        shadow[outboundRuleKey, outboundRule]
	exclusions   shadow[outboundExclusionKey, uint32]
	treated      map[uint32]uint32 // member flags by workload, from Treat
	probes       shadow[outboundProbeKey, outboundProbe]
	mappedProbes shadow[outboundProbeKey, outboundProbeKey]
	grants       shadow[outboundGrantKey, outboundGrant]
	probers      map[uint64]link.Link // by cgroup id
	former       map[uint64]link.Link // proxy_sockops on the cgroups of earlier daemons that have handed over, by id
}

// Open loads the programs, creates the maps or takes over the pinned ones, and attaches to the daemon's own cgroup. The
// workloads that an earlier daemon left enrolled stay so, now with this daemon's programs. On error nothing has changed.
//
// Only one process at a time may have a node open, and the one to which it hands over.
func Open(cfg Config) (_ *Redirect, err error) {
	r := &Redirect{
		cgroup:     cfg.Cgroup,
		dir:        filepath.Join(cfg.Pins, cfg.Node, fmt.Sprintf("v%d", MapABI)),
		enrolled:   make(map[uint64]*enrolment),
		namespaces: make(map[uint64]*Namespace),
		programs:   make(map[*ebpf.Program]ebpf.ProgramID),
		inherited:  make(map[uint64]bool),
		unclaimed:  make(map[uint32]bool),
		treated:    make(map[uint32]uint32),
		probers:    make(map[uint64]link.Link),
		former:     make(map[uint64]link.Link),
		inherit:    cfg.Inherited,
	}
	handed := r.inherit != nil
	if !handed {
		r.inherit = func(string) *os.File { return nil }
	}
	if err := checkPins(cfg, r.dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	for _, sub := range []string{"maps", "cgroups", "namespaces", probersDir, formerDir} {
		if err := os.MkdirAll(filepath.Join(r.dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("create pin directory: %w", err)
		}
	}
	if r.lock, err = r.takeLock(); err != nil {
		return nil, err
	}
	// Not /proc/self: the process's first thread may be inside another namespace at this moment.
	if r.home, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("remember own network namespace: %w", err)
	}
	if err := r.load(); err != nil {
		return nil, err
	}
	if err := r.loadShadows(); err != nil {
		return nil, err
	}
	// The grants of a daemon that is dead must not come into force again with our first Beat.
	if !cfg.Runs {
		if err := r.SetGrants(nil); err != nil {
			return nil, err
		}
	}
	if r.noDNS = ErrNoDNS; cfg.DNS {
		r.dns, r.noDNS = r.loadDNS()
	}
	if err := r.setFailure(cfg.FailOpen); err != nil {
		return nil, err
	}
	if r.events, err = ringbuf.NewReader(r.obj.Events); err != nil {
		return nil, fmt.Errorf("read kernel events: %w", err)
	}
	if err := r.keepFormer(handed); err != nil {
		return nil, err
	}
	if r.own, err = r.attachPinned(cfg.Cgroup, filepath.Join(r.dir, daemonPin), ebpf.AttachCGroupSockOps, r.obj.ProxySockops); err != nil {
		return nil, fmt.Errorf("attach to the daemon's cgroup %s: %w", cfg.Cgroup, err)
	}
	if err := r.loadGuard(); err != nil {
		return nil, err
	}
	if err := r.adopt(); err != nil {
		return nil, err
	}
	if err := r.adoptProbers(); err != nil {
		return nil, err
	}
	if !cfg.DNS {
		if err := r.unpinDNS(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Dir is the pin directory.
func (r *Redirect) Dir() string { return r.dir }

// Close lets go of the kernel state and closes the listeners of namespaces still open. What is pinned stays in force.
func (r *Redirect) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, ns := range r.namespaces {
		errs = append(errs, ns.closeSockets())
	}
	for _, e := range r.enrolled {
		errs = append(errs, e.close())
	}
	for _, l := range r.probers {
		errs = append(errs, l.Close())
	}
	for _, l := range r.former {
		errs = append(errs, l.Close())
	}
	if r.own != nil {
		errs = append(errs, r.own.Close())
	}
	if r.events != nil {
		errs = append(errs, r.events.Close())
	}
	if r.guard != nil {
		errs = append(errs, r.guard.Close())
	}
	errs = append(errs, r.dns.close(), r.obj.Close())
	for _, f := range []*os.File{r.home, r.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Beat tells the kernel that the daemon is alive, and what time it is. Call it every second.
func (r *Redirect) Beat() error {
	return r.updateHeartbeat(func(h *outboundHeartbeat) error {
		c, err := readClock()
		h.Beat, h.Wall = uint64(c.monotonic), c.real-c.boot
		return err
	})
}

// clock is the kernel's clocks at one moment, in ns.
type clock struct{ monotonic, boot, real int64 }

func readClock() (c clock, err error) {
	for id, to := range map[int32]*int64{unix.CLOCK_MONOTONIC: &c.monotonic, unix.CLOCK_BOOTTIME: &c.boot, unix.CLOCK_REALTIME: &c.real} {
		var now unix.Timespec
		if err := unix.ClockGettime(id, &now); err != nil {
			return clock{}, fmt.Errorf("read clock: %w", err)
		}
		*to = now.Nano()
	}
	return c, nil
}

// wall is when the monotonic clock showed then; zero for 0.
func (c clock) wall(then uint64) time.Time {
	if then == 0 {
		return time.Time{}
	}
	return time.Unix(0, c.real+int64(then)-c.monotonic)
}

// Rest tells the kernel that the daemon is stopping: from now on every new connection that needs it is refused, or let
// pass where on_failure is "open".
func (r *Redirect) Rest() error {
	return r.updateHeartbeat(func(h *outboundHeartbeat) error {
		h.Beat = 0
		return nil
	})
}

func (r *Redirect) setFailure(open bool) error {
	return r.updateHeartbeat(func(h *outboundHeartbeat) error {
		h.Open = 0
		if open {
			h.Open = 1
		}
		return nil
	})
}

func (r *Redirect) updateHeartbeat(change func(*outboundHeartbeat) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var h outboundHeartbeat
	if err := r.obj.Heartbeat.Lookup(uint32(0), &h); err != nil {
		return fmt.Errorf("read heartbeat: %w", err)
	}
	if err := change(&h); err != nil {
		return err
	}
	if err := r.obj.Heartbeat.Put(uint32(0), h); err != nil {
		return fmt.Errorf("write heartbeat: %w", err)
	}
	return nil
}

// load creates the maps or takes over the pinned ones, and loads the cgroup programs.
func (r *Redirect) load() error {
	spec, err := loadOutbound()
	if err != nil {
		return fmt.Errorf("read built-in BPF object: %w", err)
	}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") {
			m.Pinning = ebpf.PinByName
		}
	}
	err = spec.LoadAndAssign(&r.obj, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: filepath.Join(r.dir, "maps")}})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("take over the maps in %s: %w: they were not made by this version; run `nodeproxy cleanup` first", r.dir, err)
	}
	if err != nil {
		return fmt.Errorf("load cgroup programs: %w (run `nodeproxy check`)", err)
	}
	return nil
}

// attachPinned attaches prog to a cgroup by a link pinned at pin, or puts prog into the link already there.
func (r *Redirect) attachPinned(cgroup, pin string, at ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	if l, err := r.takeOver(cgroup, pin, prog); err != nil || l != nil {
		return l, err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: prog})
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", filepath.Base(pin), err)
	}
	if err := l.Pin(pin); err != nil {
		return nil, errors.Join(fmt.Errorf("pin %s: %w", pin, err), l.Close())
	}
	return l, nil
}

// takeOver puts prog into the link pinned at pin when it is attached to cgroup. A link to anything else, such as a
// removed cgroup of the same name, is unpinned. It returns nil when nothing usable is pinned.
func (r *Redirect) takeOver(cgroup, pin string, prog *ebpf.Program) (link.Link, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	id, err := CgroupID(cgroup)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if linkedCgroup(l) == id {
		if err := l.Update(prog); err != nil {
			return nil, errors.Join(fmt.Errorf("update %s: %w", pin, err), l.Close())
		}
		return l, nil
	}
	return nil, errors.Join(l.Unpin(), l.Close())
}

// linkedCgroup returns the id of the cgroup that l is attached to, 0 when it is gone.
func linkedCgroup(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil || info.Cgroup() == nil {
		return 0
	}
	return info.Cgroup().CgroupId
}

// checkPins makes sure that the pin directory can be used: on bpffs, and of no other map ABI.
func checkPins(cfg Config, dir string) error {
	if cfg.Node == "" || strings.ContainsAny(cfg.Node, "/.") {
		return fmt.Errorf("use pins of node %q: a node name is one path element without dots", cfg.Node)
	}
	parent := cfg.Pins
	for {
		var fs unix.Statfs_t
		err := unix.Statfs(parent, &fs)
		if errors.Is(err, unix.ENOENT) && parent != "/" {
			parent = filepath.Dir(parent)
			continue
		}
		if err != nil {
			return fmt.Errorf("look at pin directory %s: %w", parent, err)
		}
		if fs.Type != unix.BPF_FS_MAGIC {
			return fmt.Errorf("use pin directory %s: %s is not on bpffs; run `mount -t bpf bpf /sys/fs/bpf`, or set state.pins to a directory on a mounted bpffs", cfg.Pins, parent)
		}
		break
	}
	versions, err := os.ReadDir(filepath.Dir(dir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read pin directory: %w", err)
	}
	for _, v := range versions {
		if v.Name() != filepath.Base(dir) {
			return fmt.Errorf("take over pins of node %s: %s holds map ABI %s, this is %s: run the version that made it, or `nodeproxy cleanup` first",
				cfg.Node, filepath.Dir(dir), v.Name(), filepath.Base(dir))
		}
	}
	return nil
}

// lockDir takes the lock that makes one process the owner of dir, until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pin directory: %w", err)
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

func flock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrInUse
	}
	return err
}

// ErrInUse says that a running daemon has the node's state.
var ErrInUse = errors.New("another nodeproxy daemon uses it: stop that one first")

// comm turns a task's name as the kernel has it into a string.
func comm(raw [16]int8) string {
	b := make([]byte, 0, len(raw))
	for _, c := range raw {
		b = append(b, byte(c))
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

// Pulse says when the last Beat was and how many links are in force.
func (r *Redirect) Pulse() (beat time.Time, links int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var h outboundHeartbeat
	var now unix.Timespec
	if r.obj.Heartbeat.Lookup(uint32(0), &h) == nil && h.Beat != 0 && unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) == nil {
		beat = time.Now().Add(time.Duration(int64(h.Beat) - now.Nano()))
	}
	links = 1 + len(r.namespaces) + len(r.probers)
	for _, e := range r.enrolled {
		links += len(e.links) + len(e.dns)
	}
	return beat, links
}

package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/dns"
	"nodeproxy.io/redirect"
)

const (
	beatEvery      = time.Second
	hesitation     = 5 * time.Second  // how long a hand-over waits for a provider that has a problem
	waiting        = 10 * time.Second // how long, after a restart, connections wait for the mesh and the certificates to be known, before they are refused
	reapEvery      = 30 * time.Second
	reconcileEvery = time.Second           // how long a process in a namespace of its own may stay unseen
	reconcilePause = 20 * time.Millisecond // between two reconciliations, however often one is asked for
	grace          = 3 * time.Second       // how long a namespace of no workload keeps its listeners, and what is served no more is carried on
	maxNamespaces  = 16                    // of one workload
)

// Config is what a Manager needs.
type Config struct {
	Node      string
	Pins      string // directory on bpffs
	FailOpen  bool
	Mode      Mode           // inbound.mode
	Plaintext []netip.Prefix // inbound.plaintext_from
	Probers   Probers
	Providers []Provider  // in order of precedence where their claims conflict
	DNS       *dns.Server // answers the workloads' name queries; nil: dns.enabled is false

	NotDirect   string // why connections within the node pass the proxy; "": they need not
	PreferLocal bool   // a virtual IP leads to this node's instances even if there are others

	Ending func(served map[string]bool) // is told which instances workloads serve, and whether all of those are being stopped; nil: nobody is

	Before  *Before // the daemon that hands over; nil: none does
	Settled func()  // is called when all is taken of what Before has left; nil: nobody is

	// Keep holds files, and what goes with them, for the Before of the next daemon if this one is dead; nil: there is nobody who can.
	Keep func(state []byte, files map[string]syscall.Conn) error
	// Restarts says, at the end, whether the next daemon is about to start and gets what Keep holds; nil: it does not.
	Restarts func() bool

	Existing *time.Duration // how long a workload keeps the connections it has when it is enrolled; nil: until they end
	Log      *slog.Logger
}

func (c Config) validate() error {
	if c.Node == "" || c.Pins == "" || c.Log == nil {
		return errors.New("workload manager needs a node name, a pin directory and a logger")
	}
	return nil
}

// Manager keeps the kernel in line with claims and snapshots. One goroutine, in Run, changes anything; the data path reads
// an immutable view.
type Manager struct {
	cfg      Config
	log      *slog.Logger
	redirect *redirect.Redirect
	cgroup   string // the daemon's own
	mount    string // of cgroup2

	kick  chan struct{}
	ready chan struct{} // closed once the workloads are known and protected
	once  sync.Once     // closes ready
	view  atomic.Pointer[view]

	pen      pen
	ending   sync.Mutex    // guards frozen and stopped
	frozen   bool          // another daemon is taking over, or has
	stopped  bool          // Run is about to end
	inOffice atomic.Bool   // the daemon before, if there was one, has let go
	yielding chan struct{} // closed by Yield
	yielded  chan struct{} // closed once that is done

	repairs atomic.Uint64
	looked  atomic.Pointer[time.Time] // when the last reconciliation ended
	direct  *direct

	mu       sync.Mutex           // guards claims, ended, snap, starting and over
	starting map[uint64]*starting // by inode
	over     map[uint64]bool      // inodes of namespaces that are about to go, and were not looked at since
	claims   map[string][]Claim
	ended    map[string]error // providers that gave up
	snap     *catalog.Snapshot
	passed   error // why addresses of snap are not redirected

	// What reconcile, the only user, knows.
	began      time.Time // Run
	serve      func(*redirect.Namespace, *Namespace)
	inherited  *inheritance               // nil: nothing, or it is settled
	workloads  map[string]*entry          // by cgroup path
	needs      []string                   // the services that were last said to be needed
	namespaces map[uint64]*space          // by inode
	going      map[uint64]bool            // inodes of those that are about to go
	found      map[uint64]*foundNamespace // by inode; not open
	host       []netip.Addr               // the node's addresses
	refused    []RefusedClaim
	pruned     bool
	warned     map[warning]bool
	groups     map[string]uint32 // the kernel's numbers of workloads with the same services
	serving    sync.WaitGroup    // of name queries, one for each namespace
	unheard    map[string]bool   // providers that had said nothing when this reconciliation began
	unguarded  error             // why inbound rules are missing
	reached    *ownReach         // what the kernel was told of what single workloads reach; nil: again
	unreached  error             // why upstreams, or what must not be called, are missing
	missed     bool              // a namespace could not be opened in this reconciliation
	drifted    drifts
	former     former
	leaving    []*entry // released, and not detached yet
	watcher    *watcher
	probers    probers
	sockets    sockets
	older      map[uint64]*older // by cgroup id
	adopted    map[uint64]bool   // ids of cgroups that an earlier daemon enrolled and this one has not yet
	served     map[string]bool   // the instances that workloads serve, by ID: whether all of those are being stopped
	ends       []string          // IDs of those of which they are
	unkept     string            // why not all is kept for the next daemon
}

// entry is a granted claim.
type entry struct {
	Workload
	claim       Claim
	cgroup      uint64 // id; 0: the directory is not there
	enrolled    bool
	processes   int
	inodes      []uint64        // of the network namespaces its processes are in
	subtree     map[uint64]bool // ids of its cgroup and those below
	problem     error
	foreign     foreignRules
	access      Access
	left        bool     // was released before the last reconciliation
	steered     uint64   // the cgroup whose name queries are
	noDNS       error    // why they are not
	uncertified []string // its services without a certificate
	misplaced   []string // instances of its services whose address is in none of its namespaces
	contested   []string // its ports that another service's workload has in the same namespace
	instances   []string // of its services, that it serves
	callers     []string // of the service that its connections are of: their upstreams are its own
}

// space is an open namespace. The data path sees it through a view: what it reads is not changed, but replaced.
type space struct {
	*redirect.Namespace
	public *Namespace
	addrs  []netip.Addr
	heard  *listening
	dns    dnsSocket
	used   time.Time // when a workload was last seen in it; reconcile's own
}

// warning is what was logged of a cgroup, so that it is logged once.
type warning struct{ cgroup, text string }

// NewManager moves the process into a cgroup of its own and opens the node's kernel state, taking over what an earlier
// daemon left in force. Close it after Run.
func NewManager(cfg Config) (*Manager, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	mount, err := redirect.CgroupMount()
	if err != nil {
		return nil, err
	}
	var before Before
	if cfg.Before != nil {
		before = *cfg.Before
	}
	own, err := redirect.OwnCgroup(cfg.Node, before.PID)
	if err != nil {
		return nil, err
	}
	r, err := redirect.Open(redirect.Config{
		Pins: cfg.Pins, Node: cfg.Node, Cgroup: own, FailOpen: cfg.FailOpen, DNS: cfg.DNS != nil, Inherited: before.Take, Runs: before.Runs,
	})
	if err != nil {
		return nil, err
	}
	if err := r.SetPlaintextFrom(cfg.Plaintext); err != nil {
		return nil, errors.Join(fmt.Errorf("apply inbound.plaintext_from: %w", err), r.Close())
	}
	m := &Manager{
		cfg: cfg, log: cfg.Log, redirect: r, cgroup: own, mount: mount, direct: newDirect(cfg, r),
		pen:      newPen(),
		yielding: make(chan struct{}), yielded: make(chan struct{}),
		kick:       make(chan struct{}, 1),
		ready:      make(chan struct{}),
		claims:     make(map[string][]Claim),
		ended:      make(map[string]error),
		starting:   make(map[uint64]*starting),
		over:       make(map[uint64]bool),
		workloads:  make(map[string]*entry),
		namespaces: make(map[uint64]*space),
		found:      make(map[uint64]*foundNamespace),
		warned:     make(map[warning]bool),
		groups:     make(map[string]uint32),
		older:      make(map[uint64]*older),
		adopted:    make(map[uint64]bool),
		former:     former{workloads: make(map[uint32]formerWorkload), served: make(map[servedKey]formerServed)},
	}
	for _, e := range r.Enrolled() {
		m.adopted[e.Cgroup] = true
	}
	if cfg.Before != nil {
		if err := m.inherit(cfg.Before); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	m.probers.listening = cfg.Probers.listening()
	m.view.Store(&view{})
	return m, nil
}

// Close waits for the last answers to name queries and lets go of the kernel state, which stays in force. Run must have returned.
func (m *Manager) Close() error {
	m.serving.Wait()
	return m.redirect.Close()
}

// Ready is closed once the workloads are known, and served.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Store is the node's memory in the kernel. It may be used until Close.
func (m *Manager) Store() *redirect.Store { return m.redirect.Store() }

// Run implements the proxy's Kernel. It also ends with Yield.
func (m *Manager) Run(ctx context.Context, h Handler) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	m.began = time.Now()
	var wg, calling sync.WaitGroup
	wg.Go(func() {
		select {
		case <-m.yielding:
			stop()
		case <-ctx.Done():
		}
	})
	m.serve = func(ns *redirect.Namespace, public *Namespace) {
		for _, ln := range ns.Outbound {
			calling.Go(func() { h.ServeOutbound(public, ln) })
		}
		for _, ln := range ns.Inbound {
			wg.Go(func() { h.ServeInbound(public, ln) })
		}
	}
	m.sockets = sockets{open: make(map[socketKey]*upstreamSocket), serve: func(s *upstreamSocket) {
		calling.Go(func() {
			h.ServeUpstream(s.ln, func(conn *net.UnixConn) (*Origin, error) { return m.socketOrigin(s, conn) })
		})
	}}
	for _, p := range m.cfg.Providers {
		wg.Go(func() { m.provide(ctx, p) })
	}
	var beating sync.WaitGroup
	beating.Go(func() { m.beat(ctx, h) })
	for range pathTesters {
		beating.Go(func() { m.testPaths(ctx) })
	}
	m.watcher = newWatcher(m.wake, m.log)
	wg.Go(func() {
		err := m.redirect.Events(func(e redirect.Event) { m.event(e, h) }, func(e redirect.GrantEvent) { m.directEvent(e, h) })
		if err != nil {
			m.log.Error("kernel verdicts are not reported any more", "error", err)
		}
	})
	m.loop(ctx, h)
	beating.Wait() // a last beat must not come after Rest
	if m.leaves() {
		err := errors.Join(m.leaveToNext(), m.watcher.close())
		wait(&calling, &wg)
		close(m.yielded)
		return err
	}
	for _, e := range m.leaving {
		e.left = true // nothing is redirected for it any more, and there is no later
	}
	m.leave()
	var err error
	if m.cfg.Restarts != nil && m.cfg.Restarts() {
		err = m.leaveToRestart(h, &calling)
	} else {
		err = m.stop()
	}
	err = errors.Join(err, m.watcher.close())
	wait(&calling, &wg)
	return err
}

// provide runs a provider and keeps its last claims in force whatever happens to it.
func (m *Manager) provide(ctx context.Context, p Provider) {
	err := p.Run(ctx, func(claims []Claim) {
		m.mu.Lock()
		m.claims[p.Name()] = slices.Clone(claims)
		m.mu.Unlock()
		m.wake()
	})
	if err != nil && ctx.Err() == nil {
		m.mu.Lock()
		m.ended[p.Name()] = err
		m.mu.Unlock()
		m.wake()
		m.log.Error("workload provider stopped; its workloads stay enrolled", "provider", p.Name(), "error", err)
	}
}

// problems lists what providers say is wrong.
func (m *Manager) problems() []ProviderProblem {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []ProviderProblem
	for _, p := range m.cfg.Providers {
		err := m.ended[p.Name()]
		if err != nil {
			err = fmt.Errorf("%w: restart the daemon once that is corrected; its workloads stay enrolled", err)
		}
		if r, ok := p.(Reporter); ok {
			err = errors.Join(err, r.Problem())
		}
		if err != nil {
			all = append(all, ProviderProblem{p.Name(), err})
		}
	}
	return all
}

func (m *Manager) beat(ctx context.Context, h Handler) {
	tick, reap := time.NewTicker(beatEvery), time.NewTicker(reapEvery)
	defer tick.Stop()
	defer reap.Stop()
	for {
		if err := m.redirect.Beat(); err != nil {
			m.log.Error("kernel heartbeat failed", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-reap.C:
			if err := m.pen.write(func() error { return errors.Join(m.redirect.Reap(), m.reapDirect(h)) }); err != nil && !errors.Is(err, ErrHandingOver) {
				m.log.Error("entries of the kernel's maps could not be reaped", "error", err)
			}
		}
	}
}

func (m *Manager) loop(ctx context.Context, h Handler) {
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	var told map[string]bool
	for {
		m.tellNeeds(h)
		if m.pen.Acquire(ctx, 1) != nil {
			return
		}
		m.reconcile(h)
		m.keep()
		m.pen.Release(1)
		if !maps.Equal(m.served, told) {
			told = m.served
			h.Ending(m.ends)
			if m.cfg.Ending != nil {
				m.cfg.Ending(told)
			}
		}
		now := time.Now()
		m.looked.Store(&now)
		select {
		case <-ctx.Done():
			return
		case <-time.After(reconcilePause):
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-m.kick:
		}
	}
}

func (m *Manager) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// Apply implements the proxy's Kernel. Steering follows the snapshot at once; what depends on the workloads' processes
// follows in the running loop, which Apply wakes.
func (m *Manager) Apply(_ context.Context, snap *catalog.Snapshot) error {
	m.mu.Lock()
	last, failed := m.snap, m.passed
	m.snap = snap
	m.mu.Unlock()
	if failed == nil && snap.SameCatalog(last) {
		m.wake()
		return nil
	}
	err := m.pen.write(func() error { return m.redirect.SetDestinations(destinations(snap), snap.VirtualRanges) })
	m.mu.Lock()
	m.passed = err
	m.mu.Unlock()
	if m.cfg.DNS != nil && err == nil {
		m.cfg.DNS.Apply(snap)
	}
	m.wake()
	if err != nil {
		return fmt.Errorf("redirect the snapshot's addresses: %w", err)
	}
	return nil
}

// tellNeeds tells which services are needed, if others are than were.
func (m *Manager) tellNeeds(h Handler) {
	if need := m.needed(); !slices.Equal(need, m.needs) {
		m.needs = need
		h.Need(need)
	}
}

// needed lists the services that granted claims and enrolled workloads run as.
func (m *Manager) needed() []string {
	granted, _ := m.grants()
	var names []string
	add := func(services []string, mesh Mesh) {
		if mesh == Enabled {
			names = append(names, services...)
		}
	}
	for _, c := range granted {
		add(c.services(), c.Mesh)
	}
	for _, e := range m.workloads {
		add(e.Services(), e.Mesh)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// noteEndings finds out which instances workloads serve, and of which all of those are being stopped.
func (m *Manager) noteEndings() {
	m.served, m.ends = make(map[string]bool), nil
	for _, e := range m.workloads {
		for _, id := range e.instances {
			others, served := m.served[id]
			m.served[id] = e.claim.Ending && (others || !served)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.served)) {
		if m.served[id] {
			m.ends = append(m.ends, id)
		}
	}
}

// event reports a verdict of the kernel, and hurries when a namespace turns out to have no listener yet.
func (m *Manager) event(e redirect.Event, h Handler) {
	if e.Verdict == redirect.NotReady || e.Verdict == redirect.NoListener {
		m.wake()
	}
	h.Verdict(KernelVerdict{
		Inbound: e.Inbound, Allowed: e.Allowed, Observed: e.Observed, Reason: reasons[e.Verdict], Workload: m.view.Load().byID[e.Workload],
		Source: e.Source, Destination: e.Destination, PID: e.PID, Comm: e.Comm,
	})
}

var reasons = map[redirect.Verdict]catalog.Reason{
	redirect.UnknownService:  catalog.ReasonUnknownService,
	redirect.BoundDevice:     catalog.ReasonBoundDevice,
	redirect.Stale:           catalog.ReasonStale,
	redirect.NotReady:        catalog.ReasonNotReady,
	redirect.UnknownWorkload: catalog.ReasonUnknownWorkload,
	redirect.Capacity:        catalog.ReasonCapacity,
	redirect.Storage:         catalog.ReasonStorage,
	redirect.Plaintext:       catalog.ReasonPlaintext,
	redirect.NoListener:      catalog.ReasonNotReady,
	redirect.OutsideMesh:     catalog.ReasonOutsideMesh,
	redirect.ConsulAccess:    catalog.ReasonConsulAccess,
}

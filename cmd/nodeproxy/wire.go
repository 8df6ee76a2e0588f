package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy"
	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/nodeproxy/cni"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/nodeproxy/dns"
	"nodeproxy.io/nodeproxy/file"
	"nodeproxy.io/nodeproxy/handover"
	"nodeproxy.io/nodeproxy/keep"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/nodeproxy/workload/kubernetes"
	"nodeproxy.io/nodeproxy/workload/registered"
	"nodeproxy.io/redirect"
)

// node is everything that runs on a node. It is the backend of the admin API.
type node struct {
	*nodeproxy.Proxy
	manager  *workload.Manager
	manual   *workload.Manual
	recorder *admin.Recorder
	server   *admin.Server
	metrics  *admin.MetricsServer // nil for none
	blocked  string               // where metrics are to be once the daemon before, which is in the way, has let go
	kept     *keep.Source         // nil: the source needs no store
	source   catalog.Source       // what delivers in the end
	pods     *kubernetes.Cluster  // nil: pods are no workloads
	plugin   *cni.Installer       // nil: the start of pods is not held
	finder   *registered.Finder   // nil: what is registered is no workload
	log      *slog.Logger

	self       handover.Self
	handover   string                         // the path of its socket
	before     *handover.Succession           // nil: no daemon ran
	estate     *handover.Estate               // of it, or of one that is dead; nil: there is none
	taking     sync.Mutex                     // guards its files
	store      *handover.Store                // nil: there is no service manager
	restarting func() bool                    // restarts, asked once
	tookOver   atomic.Pointer[admin.Handover] // nil: from nobody
	inOffice   chan struct{}                  // closed once this is the node's daemon
	released   atomic.Bool                    // it is no more: another one has taken over
	stopPublic context.CancelFunc             // ends admin API and metrics
	public     sync.WaitGroup                 // these
}

// newNode builds all parts, what can be refused first and the kernel's state last, from what the daemon before has left, if there
// is one. On error nothing is left open.
func newNode(cfg *config.Config, log, access *slog.Logger, store *handover.Store, before *handover.Succession, left *handover.Estate) (_ *node, err error) {
	d := &node{log: log, self: self(cfg), handover: handoverSocket(cfg), store: store, before: before, estate: left, inOffice: make(chan struct{})}
	d.restarting = sync.OnceValue(d.restarts)
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	if d.manual, err = workload.NewManual(filepath.Join(cfg.State.Dir, "enrolled.json")); err != nil {
		return nil, err
	}
	accessLog, err := admin.NewAccessLog(access, admin.AccessLevel(cfg.Log.Access))
	if err != nil {
		return nil, err
	}
	metrics := admin.NewMetrics(func() admin.Status { return d.Status() }, func() []admin.Connection { return d.Connections() })
	d.recorder = &admin.Recorder{Hub: admin.NewHub(), Access: accessLog, Metrics: metrics}
	if err := d.listen(cfg.Admin); err != nil {
		return nil, err
	}
	if d.pods, err = newCluster(cfg, log); err != nil {
		return nil, err
	}
	if d.plugin, err = newInstaller(cfg, d); err != nil {
		return nil, err
	}
	known := d.knownBefore()
	source, err := newSource(cfg, log, d.pods, known.generation(), func(ctx context.Context, instance, network, address string) (net.Conn, error) {
		return d.manager.DialCheck(ctx, instance, network, address)
	})
	if err != nil {
		return nil, err
	}
	if d.finder, err = newFinder(cfg, log); err != nil {
		return nil, err
	}
	if d.manager, err = newManager(cfg, log, d, ending(source)); err != nil {
		return nil, err
	}
	caller, _ := source.(catalog.Caller)
	if d.pods != nil {
		source = d.pods.Destinations(source)
	}
	if source, ok := source.(keep.Restorable); ok {
		d.kept = keep.New(source, d.manager.Store(), log)
	}
	apply := []func(*catalog.Snapshot){metrics.Apply}
	if d.finder != nil {
		apply = append(apply, d.finder.Apply)
	}
	var observer nodeproxy.Observer = d.recorder
	if caller != nil {
		observer = callers{d.recorder, caller}
	}
	if fit := check.FittingConnections(cfg.Limits.Connections); fit < cfg.Limits.Connections {
		log.Warn("limits.connections is lowered to what the limit of open files allows: raise LimitNOFILE", "from", cfg.Limits.Connections, "to", fit)
		cfg.Limits.Connections = fit
	}
	d.source = d.keeping(source)
	d.Proxy, err = nodeproxy.New(nodeproxy.Config{
		Node: cfg.Node.Name, Source: &toldSource{known.resume(d.source, log), apply}, Kernel: d.manager, Observer: observer, Log: log,
		Limits: nodeproxy.Limits{
			Connections: cfg.Limits.Connections, PerWorkload: cfg.Limits.PerWorkload,
			Handshake: cfg.Limits.Handshake, Connect: cfg.Limits.Connect, Idle: cfg.Limits.Idle, Drain: cfg.Limits.Drain,
		},
		PreferLocal: cfg.PreferLocal, Tunnels: cfg.Tunnels, Version: version, MapABI: redirect.MapABI, Restarts: d.restarting,
	})
	return d, err
}

// keeping is source, with its snapshots kept if it needs that.
func (d *node) keeping(source catalog.Source) catalog.Source {
	if d.kept == nil {
		return source
	}
	return d.kept
}

// Status implements admin.Backend.
func (d *node) Status() admin.Status {
	s := d.Proxy.Status()
	s.Handover = d.handoverStatus()
	if d.plugin != nil {
		if err := d.plugin.Problem(); err != nil {
			s.Problems = append(s.Problems, admin.Problem{Kind: "cni", Text: err.Error()})
		}
	}
	if d.kept == nil {
		s.Store = admin.Store{Kind: "none", Detail: "not needed: the source reads its directory and its CA itself"}
		return s
	}
	kept := d.kept.State()
	s.Store = admin.Store{Kind: "kernel memory (BPF map)", Generation: kept.Generation, Bytes: kept.Bytes, Written: kept.Written}
	if kept.Err != nil {
		s.Store.Detail = kept.Err.Error()
	}
	return s
}

// Health implements admin.Backend.
func (d *node) Health() (h admin.Health) {
	if d.Snapshot() == nil {
		h.NotReady = "no snapshot yet"
		if err := d.source.Health().Err; err != nil {
			h.NotReady += ": " + err.Error()
		}
	}
	if err := d.alive(); err != nil {
		h.Hung = err.Error()
	}
	return h
}

func (d *node) alive() error { return alive(time.Now(), d.manager.Health()) }

func (d *node) listen(cfg config.Admin) (err error) {
	d.server, err = admin.Listen(admin.ServerConfig{Socket: cfg.Socket, Backend: d, Hub: d.recorder.Hub, Log: d.log, Inherited: d.inherit(adminFile + cfg.Socket)})
	if err != nil || cfg.Metrics == "" {
		return err
	}
	err = d.listenMetrics(cfg.Metrics)
	if errors.Is(err, unix.EADDRINUSE) && d.before != nil {
		d.blocked = cfg.Metrics
		return nil
	}
	return err
}

func (d *node) listenMetrics(address string) (err error) {
	d.metrics, err = admin.ListenMetrics(address, d.inherit(metricsFile+address), d.recorder.Metrics, d.alive, d.log)
	return err
}

func newManager(cfg *config.Config, log *slog.Logger, d *node, ending func(map[string]bool)) (*workload.Manager, error) {
	configured := configuredClaims(cfg)
	probers := workload.Probers{Cgroups: cfg.Inbound.Probers}
	if cfg.Consul != nil {
		probers.Agent = cfg.Consul.Address
	}
	if cfg.Pods != nil {
		probers.Kubelet = netip.AddrPortFrom(cfg.Node.Address, kubernetes.KubeletPort).String()
	}
	var names *dns.Server
	if cfg.DNS {
		names = dns.NewServer(log)
	}
	labelled, err := labelProviders(cfg, log, d.pods, d.finder)
	if err != nil {
		return nil, err
	}
	return workload.NewManager(workload.Config{
		Node: cfg.Node.Name, Pins: cfg.State.Pins, FailOpen: cfg.FailOpen, Mode: *modeOf(cfg.Inbound.Mode), Existing: cfg.Existing, Plaintext: cfg.Inbound.PlaintextFrom, Probers: probers,
		Providers: append([]workload.Provider{configured, d.manual}, labelled...), NotDirect: notDirect(cfg), PreferLocal: cfg.PreferLocal, DNS: names, Ending: ending, Log: log,
		Before: d.kernelBefore(), Settled: d.settled, Keep: d.keeper(), Restarts: d.restarting,
	})
}

// ending is how a source is told what is being stopped, nil where it tells nobody.
func ending(source catalog.Source) func(map[string]bool) {
	if s, ok := source.(catalog.Ender); ok {
		return s.Ending
	}
	return nil
}

func configuredClaims(cfg *config.Config) (all workload.Configured) {
	for _, c := range cfg.Cgroups {
		all = append(all, workload.Claim{Cgroup: c.Path, Service: c.Service, Also: c.Also, Provider: all.Name(), Mode: modeOf(c.Mode), Access: workload.Access(c.Consul)})
	}
	return all
}

// notDirect says why the configuration keeps connections within the node on the proxy, or "".
func notDirect(cfg *config.Config) string {
	switch {
	case !cfg.Direct:
		return `same_node = "mtls" is configured`
	case cfg.Limits.Idle > 0:
		return "limits.idle is configured, and is for the proxy to enforce"
	}
	return ""
}

// modeOf is nil for "".
func modeOf[M ~string](m M) *workload.Mode {
	var mode workload.Mode
	switch config.Mode(m) {
	case "":
		return nil
	case config.Permissive:
		mode = workload.Permissive
	case config.Strict:
		mode = workload.Strict
	}
	return &mode
}

// dialFunc dials for a check of an instance.
type dialFunc = func(ctx context.Context, instance, network, address string) (net.Conn, error)

// newSource makes the configured source, whose snapshots follow one of generation after. With a nil dial it only reads, and of no pods.
func newSource(cfg *config.Config, log *slog.Logger, pods *kubernetes.Cluster, after uint64, dial dialFunc) (catalog.Source, error) {
	if cfg.Consul != nil {
		c := consulConfig(cfg)
		c.Log = log
		if len(c.Servers) > 0 {
			c.Definitions = []consul.Definitions{file.NewLocal(cfg.Consul.ServicesDir, dial, log)}
			if pods != nil {
				c.Definitions = append(c.Definitions, pods.Definitions())
			}
		}
		if dial != nil { // the daemon's: it registers what it serves
			c.StateFile = filepath.Join(cfg.State.Dir, "state.json")
		}
		return consul.New(c)
	}
	return file.New(file.Config{
		Dir: cfg.Source.Path, Node: cfg.Node.Name, NodeAddress: cfg.Node.Address,
		VirtualRange: cfg.Source.VirtualIPs, Ports: file.Ports{First: cfg.Inbound.FirstPort, Last: cfg.Inbound.LastPort},
		After: after, Permissive: cfg.Inbound.Mode == config.Permissive, DialContext: dial, Log: log,
	})
}

func consulConfig(cfg *config.Config) consul.Config {
	c := cfg.Consul
	return consul.Config{
		Address: c.Address, Servers: c.Servers, TokenFile: c.TokenFile, TokenDir: c.TokenDir, Datacenter: c.Datacenter,
		AuthMethod: c.AuthMethod, BearerTokenFile: c.BearerToken,
		CAFile: c.CAFile, CertFile: c.CertFile, KeyFile: c.KeyFile,
		Node: cfg.Node.Name, NodeAddress: cfg.Node.Address, VirtualRanges: []netip.Prefix{c.VirtualIPs}, VirtualCIDRs: cfg.VirtualCIDRs,
		Ports: consul.Ports{First: cfg.Inbound.FirstPort, Last: cfg.Inbound.LastPort}, Version: version,
		Permissive: cfg.Inbound.Mode == config.Permissive,
	}
}

// callers tells a source that wants to know which services are called, and everything else to the recorder.
type callers struct {
	*admin.Recorder
	source catalog.Caller
}

// Observe implements nodeproxy.Observer.
func (c callers) Observe(e admin.Connection) {
	if e.Direction == admin.Outbound {
		c.source.Called(e.Destination.Service)
	}
	c.Recorder.Observe(e)
}

// toldSource tells others of its snapshots first: the metrics, and who looks for what is registered.
type toldSource struct {
	catalog.Source
	apply []func(*catalog.Snapshot)
}

func (s *toldSource) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	return s.Source.Run(ctx, func(snap *catalog.Snapshot) {
		for _, apply := range s.apply {
			apply(snap)
		}
		deliver(snap)
	})
}

// run serves until ctx ends, or another daemon has taken over, and live connections have drained. The admin API answers
// meanwhile, unless it is the other daemon's; that it fails is logged, and stops nothing.
func (d *node) run(ctx context.Context, cfg *config.Config) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	public, stopPublic := context.WithCancel(background)
	d.stopPublic = stopPublic
	defer stopPublic()
	var servers sync.WaitGroup
	serve := func(ctx context.Context, in *sync.WaitGroup, name string, serve func(context.Context) error) {
		in.Go(func() {
			if err := serve(ctx); err != nil {
				d.log.Error("serve "+name, "error", err)
			}
		})
	}
	servers.Go(func() { d.recorder.Access.Run(background) })
	servers.Go(func() {
		if err := d.succeed(ctx); err != nil {
			fail(err)
			return
		}
		serve(public, &d.public, "the admin API", d.server.Serve)
		if d.blocked != "" {
			if err := d.listenMetrics(d.blocked); err != nil {
				d.log.Error("serve metrics", "error", err)
			}
		}
		if d.metrics != nil {
			serve(public, &d.public, "metrics", d.metrics.Serve)
		}
		if d.pods != nil {
			d.public.Go(func() { d.pods.KeepGates(public, d.manager.Workloads) })
		}
		serve(public, &d.public, "the CNI plugin", func(ctx context.Context) error { return d.keepPlugin(ctx, cfg) })
		serve(background, &servers, "the next daemon", d.handOver)
		close(d.inOffice)
	})
	err := d.Run(ctx)
	stop()
	servers.Wait()
	d.public.Wait()
	if d.before != nil {
		_ = d.before.Close()
	}
	return errors.Join(err, d.lost(ctx), d.manager.Close())
}

// close gives up what newNode opened.
func (d *node) close() {
	if d.server != nil {
		_ = d.server.Close()
	}
	if d.metrics != nil {
		_ = d.metrics.Close()
	}
	if d.manager != nil {
		_ = d.manager.Close()
	}
	if d.before != nil {
		_ = d.before.Close()
	}
}

// Enroll implements admin.Backend.
func (d *node) Enroll(_ context.Context, req admin.EnrollRequest) error {
	for _, name := range append([]string{req.Service}, req.Also...) {
		if !catalog.IsServiceName(name) {
			return admin.Classify(fmt.Errorf("enroll %s: %q is no name of a service", req.Cgroup, name), admin.ErrRefused)
		}
	}
	c := workload.Claim{Cgroup: req.Cgroup, Service: req.Service, Also: req.Also, Provider: d.manual.Name(), Mode: modeOf(req.Mode)}
	if err := errors.Join(d.manager.Check(c), claimedElsewhere(d.manager.Workloads(), c)); err != nil {
		return admin.Classify(err, admin.ErrRefused)
	}
	return refusedByHandover(d.manual.Enroll(c))
}

func refusedByHandover(err error) error {
	if errors.Is(err, workload.ErrHandingOver) {
		return admin.Classify(err, admin.ErrRefused)
	}
	return err
}

// claimedElsewhere says which other provider has c's cgroup: two claims of one cgroup are never both granted.
func claimedElsewhere(workloads []workload.WorkloadState, c workload.Claim) error {
	for _, w := range workloads {
		if w.Workload.Cgroup == c.Cgroup && w.Workload.Provider != c.Provider {
			return fmt.Errorf("enroll %s: provider %q has it as service %q already: change it there", c.Cgroup, w.Workload.Provider, w.Workload.Service)
		}
	}
	return nil
}

// Unenroll implements admin.Backend.
func (d *node) Unenroll(_ context.Context, req admin.EnrollRequest) error {
	err := d.manual.Unenroll(req.Cgroup)
	if errors.Is(err, workload.ErrNotEnrolled) {
		return admin.Classify(err, admin.ErrNotFound)
	}
	return refusedByHandover(err)
}

const (
	readTimeout  = 10 * time.Second
	readInterval = 20 * time.Millisecond
)

// readSource returns the source's first snapshot, or what keeps it from making one.
func readSource(ctx context.Context, cfg *config.Config) (*catalog.Snapshot, error) {
	source, err := newSource(cfg, nil, nil, 0, nil)
	if err != nil {
		return nil, err
	}
	unread := source.Health().Err
	first := make(chan *catalog.Snapshot, 1)
	done := make(chan struct{})
	var runErr error
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	go func() {
		defer close(done)
		runErr = source.Run(ctx, func(snap *catalog.Snapshot) {
			select {
			case first <- snap:
			default: // one is enough
			}
		})
	}()
	defer func() { cancel(); <-done }()
	tick := time.NewTicker(readInterval)
	defer tick.Stop()
	for {
		select {
		case snap := <-first:
			return snap, nil
		case <-tick.C:
			if err := source.Health().Err; err != nil && !errors.Is(err, unread) {
				return nil, err
			}
		case <-done: // by itself, or because ctx has ended
			return nil, fmt.Errorf("read the source: there is no snapshot: %w", errors.Join(runErr, ctx.Err(), source.Health().Err))
		}
	}
}

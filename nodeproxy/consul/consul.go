// Package consul makes snapshots of what a Consul agent knows: catalog, certificates, intentions and config entries.
//
// Everything is kept current by blocking queries, and where Consul has none, by looking every ten seconds. A snapshot is
// built whole from the last good answer to each question, or, where intentions alone have changed, of the one before and a policy: while the agent, its servers or the token fail, what was last
// known stays in force, and Health says since when. Nothing is ever dropped because a question could not be answered.
//
// The number of connections to the agent does not grow with the services of the node or of the mesh: one for the roots,
// one for this node's registrations, one for the names of all services, one for the node proxies, at most maxLists for the intentions
// of all services and one for those of this node's (more beyond a hundred thousand names), one for service resolvers, at most
// maxRequests for everything that does not wait, and one for each service or target of its chain that workloads of this node
// call, at most maxCalled. Consul allows 200 per client address.
//
// The services of the whole datacenter are in the snapshot, so that any of them can be called by its virtual IP. The
// instances of one that is being called are watched; those of the others are read when the catalog changes, at a rate that is
// bounded, and again when they are first called.
//
// With a StateFile it registers a sidecar for each instance that workloads of this node serve and that has none, and the
// service "node-proxy" for itself; see keepRegistered and Withdraw. It changes nothing else in Consul.
//
// What is asked of the token is in docs/consul.md.
package consul

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// Config says which agent a Source asks, as whom, and for which node.
type Config struct {
	// Address of the agent's HTTP API: host:port, http://host:port, https://host:port or unix:///path.
	Address string

	// Servers are addresses of the HTTP API of Consul's servers, for a node without an agent: Address is not used then. The
	// next is asked where one does not answer. The node's services are what all Definitions say, once each has; they are
	// registered in the catalog on a node of our own, Node with "-nodeproxy", and nothing else is touched.
	Servers     []string
	Definitions []Definitions

	// TokenFile holds the token for everything but the certificates of services that have one of their own: a file of the
	// service's name in TokenDir. Both may be "". Files are read again when they change.
	TokenFile, TokenDir string

	// AuthMethod gives a token in TokenFile's place, for the bearer token in BearerTokenFile: again when it expires or is not
	// known any more. It is given back at the end. "" is none.
	AuthMethod, BearerTokenFile string

	Datacenter string // what the agent's must be; "" is whichever it is in

	// CAFile verifies an https agent; "" is the system's roots. CertFile and KeyFile are shown to it. All are read again
	// when they change.
	CAFile, CertFile, KeyFile string

	Node        string     // the name of this node in status; in Consul it is the agent's
	NodeAddress netip.Addr // where other nodes reach instances that are registered at no address, or at loopback

	// VirtualRanges are those that the servers give virtual IPs out of. A virtual IP outside is not believed.
	VirtualRanges []netip.Prefix

	// VirtualCIDRs are where addresses tagged "virtual", and virtual IPs that were assigned by hand, are believed too.
	VirtualCIDRs []netip.Prefix

	// StateFile keeps which of Ports each instance without a sidecar was given. "" registers nothing.
	StateFile string
	Ports     Ports
	Version   string // of this daemon, for other nodeproxies

	Permissive bool // plaintext is let in where Consul's MutualTLSMode says nothing

	Log *slog.Logger // nil discards
}

func (c *Config) validate() error {
	var errs []error
	if c.Node == "" {
		errs = append(errs, errors.New("no node name: set node { name }"))
	}
	if !c.NodeAddress.IsValid() || c.NodeAddress.IsUnspecified() {
		errs = append(errs, errors.New("no node address: set node { address }"))
	}
	for _, r := range c.VirtualCIDRs {
		special := []netip.Addr{netip.IPv6Unspecified(), netip.IPv6Loopback(), netip.AddrFrom4([4]byte{}), netip.AddrFrom4([4]byte{127, 0, 0, 1}), c.NodeAddress.Unmap()}
		if i := slices.IndexFunc(special, r.Contains); i >= 0 {
			errs = append(errs, fmt.Errorf("virtual_cidrs %s holds %s: list only the networks from which virtual addresses are given out", r, special[i]))
		}
	}
	for _, r := range c.VirtualRanges {
		if !r.IsValid() || r.Contains(c.NodeAddress) {
			errs = append(errs, fmt.Errorf("virtual_ips %s is no range, or holds the node's own address %s", r, c.NodeAddress))
		}
	}
	if c.StateFile != "" && (c.Ports.First == 0 || c.Ports.Last < c.Ports.First) {
		errs = append(errs, fmt.Errorf("inbound.ports %d-%d is no range", c.Ports.First, c.Ports.Last))
	}
	if (c.AuthMethod == "") != (c.BearerTokenFile == "") {
		errs = append(errs, errors.New("auth_method and bearer_token_file go together: set both or none"))
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, errors.New("cert_file and key_file go together: set both or none"))
	}
	return errors.Join(errs...)
}

// Source makes snapshots of what an agent knows. It implements catalog.Source and catalog.Caller. A Source runs once.
type Source struct {
	cfg    Config
	client *client
	world  *world
	leaves *leaves
	called *called

	restored atomic.Pointer[earlier] // nil: nothing

	named chan struct{} // gets a value, without blocking, when the names of services may have changed
	known chan struct{} // the same for the services that are in the mesh, or on this node

	yielded atomic.Bool // another daemon registers this node's sidecars

	ports   *ports // nil: nothing is registered
	wanted  chan *wanted
	lookNow chan struct{} // gets a value, without blocking, when this node's registrations may have changed
	altered chan struct{} // the same when only those of ours have
}

var (
	_ catalog.Source  = (*Source)(nil)
	_ catalog.Caller  = (*Source)(nil)
	_ catalog.Yielder = (*Source)(nil)
	_ catalog.Ender   = (*Source)(nil)
)

// New checks cfg and reads its certificates. It does not ask the agent.
func New(cfg Config) (*Source, error) {
	fail := func(err error) (*Source, error) { return nil, fmt.Errorf("set up consul source: %w", err) }
	if err := cfg.validate(); err != nil {
		return fail(err)
	}
	cfg.NodeAddress = cfg.NodeAddress.Unmap()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	client, err := newClient(&cfg)
	if err != nil {
		return fail(err)
	}
	var given *ports
	if cfg.StateFile != "" {
		if given, err = openPorts(cfg.StateFile, cfg.Ports); err != nil {
			return fail(err)
		}
	}
	w := newWorld(cfg.Log, cfg.asked())
	l := newLeaves(client, w)
	if cfg.agentless() {
		l.issue = l.sign
	}
	return &Source{
		cfg: cfg, client: client, world: w, leaves: l, called: newCalled(),
		named: make(chan struct{}, 1), known: make(chan struct{}, 1),
		ports: given, wanted: make(chan *wanted, 1), lookNow: make(chan struct{}, 1), altered: make(chan struct{}, 1),
	}, nil
}

// Need implements catalog.Source.
func (s *Source) Need(services []string) {
	s.leaves.need(slices.Clone(services))
	wake(s.known)
}

// Yield implements catalog.Yielder: nothing is registered any more, and what is stays when Run ends.
func (s *Source) Yield() { s.yielded.Store(true) }

// Ending implements catalog.Ender: the sidecars that are registered here are critical until they end no more.
func (s *Source) Ending(served map[string]bool) {
	s.world.update(func(d *data) bool {
		before := d.served
		d.served = served
		return d.wereEnding() || !maps.Equal(ending(before), ending(served))
	})
}

// Called implements catalog.Caller.
func (s *Source) Called(service string) { s.called.add(service) }

// Health implements catalog.Source. Updated is when every part of the data was last known to be current.
func (s *Source) Health() catalog.Health {
	updated, err := s.world.health()
	if leaves := s.leaves.err(); leaves != nil {
		err = errors.Join(err, leaves)
	}
	h := catalog.Health{Kind: "consul", Location: s.cfg.location(), Updated: updated, Err: err}
	if e := s.restored.Load(); e != nil && e.inForce.Load() {
		h.Updated, h.Restored = e.updated, true
	}
	return h
}

// Run implements catalog.Source. That the agent does not answer is only temporary, hence Run ends with ctx only, and all
// its queries with it.
func (s *Source) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	var tasks sync.WaitGroup
	defer s.client.close()
	defer tasks.Wait()
	defer cancel()
	r := &run{Source: s, deliver: deliver, ask: asker{s.client, s.world}, began: time.Now(), earlier: s.restored.Load()}
	if r.earlier != nil {
		r.generation = r.earlier.snap.Generation
	}
	settled := time.AfterFunc(unclaimed, func() {
		s.world.update(func(d *data) bool {
			changed := d.wereEnding()
			d.settled = true
			return changed
		})
	})
	defer settled.Stop()
	tasks.Go(func() { s.leaves.run(ctx) })
	tasks.Go(func() { r.askAll(ctx) })
	r.loop(ctx)
	return nil
}

// Package file makes snapshots of a directory of Consul's own definitions, with a built-in CA: a mesh without Consul.
//
//	mesh.d/nodes/<node>/*   service definitions, .hcl or .json, of the instances on that node; service { … } or services
//	mesh.d/config/*         config entries, one in each file, as `consul config write` takes them
//	mesh.d/ca/root.pem      the roots, the signing one first, and the intermediates of rotations
//	mesh.d/ca/key.pem       the key of the signing root, mode 0600
//	mesh.d/state.json       virtual IPs, mesh ports and node addresses, assigned once; safe to delete
//
// Every node has the directory, shared or copied by whatever means; state.json and ca/ are written by the daemons, under
// the directory's lock, so a directory that is copied must be copied with them. Whoever has the directory has the CA's
// key: every node can mint any identity, and is trusted to mint its own services' alone. Where that is too much, use Consul.
//
// The directory is watched and applied whole or not at all: while anything in it is wrong, the last good state stays in
// force and Health names file and line. Replace files by rename; of a file that is written in place, a part that happens
// to be complete could be applied for a moment.
//
// Every service that is defined is in the mesh, with a virtual IP; one without port and socket only calls others. An
// instance without an address has its node's, as that node's daemon wrote it to state.json. A native service speaks
// Connect mTLS on its own port; applications reach it by its virtual IP only, for its own address must never be dialled in plaintext.
// Each node runs the TCP and HTTP checks of its own instances; an instance with checks is unhealthy until they pass.
//
// Where no intention matches, the connection is denied, unless Config.DefaultAllow is set.
//
// Nothing that Consul would act upon is dropped in silence: what is not honoured is among the snapshot's Problems, and
// what could not be ignored safely is an error.
package file

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// Ports is a range of TCP ports, both ends included.
type Ports struct{ First, Last uint16 }

func (p Ports) contains(port uint16) bool { return port >= p.First && port <= p.Last }

// Config says what a Source reads and for which node.
type Config struct {
	Dir         string     // the mesh directory
	Node        string     // the name of this node: the directory below nodes/
	NodeAddress netip.Addr // where other nodes reach this one
	Datacenter  string     // of the SPIFFE IDs; "" is "dc1"

	VirtualRange netip.Prefix // virtual IPs are given out of it; the same on every node
	Ports        Ports        // mesh ports of this node's instances are given out of it

	After uint64 // generations of its snapshots are higher

	Permissive   bool // plaintext is let in where Consul's MutualTLSMode says nothing
	DefaultAllow bool // connections that no intention matches are allowed

	// DialContext dials for a check, from where the workload of the instance is; nil dials from the daemon's own namespace.
	DialContext func(ctx context.Context, instanceID, network, address string) (net.Conn, error)

	Log *slog.Logger // nil discards
}

func (c *Config) validate() error {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("no directory: set source \"file\" { path }"))
	}
	if err := checkName(c.Node); err != nil {
		errs = append(errs, fmt.Errorf("node name %w", err))
	}
	if err := checkAddress(c.NodeAddress); err != nil {
		errs = append(errs, fmt.Errorf("node address %w", err))
	}
	if !c.VirtualRange.IsValid() || c.VirtualRange.Contains(c.NodeAddress) {
		errs = append(errs, fmt.Errorf("virtual_ips %s is no range, or holds the node's own address %s", c.VirtualRange, c.NodeAddress))
	}
	if c.Ports.First == 0 || c.Ports.Last < c.Ports.First {
		errs = append(errs, fmt.Errorf("inbound.ports %d-%d is no range", c.Ports.First, c.Ports.Last))
	}
	return errors.Join(errs...)
}

const (
	// settleTime is how long the directory must be quiet before it is read, and settleMax how long that is waited for.
	settleTime = 5 * time.Millisecond
	settleMax  = 50 * time.Millisecond

	// rescan is how often the directory is looked at without an event: watches end with the directory they are on, and
	// network file systems do not report what other nodes write.
	rescan = 2 * time.Second
)

// Source makes snapshots of a mesh directory. It implements catalog.Source. A Source runs once.
type Source struct {
	cfg Config
	now func() time.Time

	needed chan struct{} // gets a value, without blocking, when need has changed

	mu     sync.Mutex // guards need and health
	need   []string
	health catalog.Health
}

var _ catalog.Source = (*Source)(nil)

// New checks cfg. It touches no file.
func New(cfg Config) (*Source, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("set up file source: %w", err)
	}
	cfg.Datacenter = cmp.Or(cfg.Datacenter, "dc1")
	cfg.VirtualRange = cfg.VirtualRange.Masked()
	cfg.NodeAddress = cfg.NodeAddress.Unmap()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Source{
		cfg: cfg, now: time.Now, needed: make(chan struct{}, 1),
		health: catalog.Health{Kind: "file", Location: cfg.Dir, Err: errors.New("the mesh directory has not been read yet")},
	}, nil
}

// Need implements catalog.Source.
func (s *Source) Need(services []string) {
	s.mu.Lock()
	s.need = slices.Clone(services)
	s.mu.Unlock()
	wake(s.needed)
}

// Health implements catalog.Source.
func (s *Source) Health() catalog.Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.health
}

// Run implements catalog.Source. Whatever is wrong with the directory is only temporarily so, hence Run ends with ctx
// only, and its checks with it.
func (s *Source) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	r := &run{
		Source: s, deliver: deliver, leaves: newLeaves(s.now), generation: s.cfg.After,
		checker: newChecker(s.cfg.DialContext, s.cfg.Log),
	}
	defer r.checker.wait()
	defer cancel()
	events, stop := r.watch()
	defer stop()
	r.loop(ctx, events)
	return nil
}

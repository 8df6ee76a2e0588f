package consul

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// data is the last good answer to every question. What it points to is replaced, and never changed.
type data struct {
	changes    uint64 // counted, but for those of intentions and certificates
	intended   uint64 // changes of intentions
	certified  uint64 // changes of certificates
	agent      *agent
	roots      *roots
	defaultACL string // "allow" where the agent says nothing: ACLs are off
	filtered   bool   // ACLs hide services
	local      map[string]*api.AgentService
	defined    *catalog.Definitions   // what local was made of, where there is no agent
	served     map[string]bool        // of local, by ID, that have workloads: whether all of those are being stopped
	settled    bool                   // what is not in served has none
	names      []string               // of all services of the datacenter, sorted
	looks      map[string]string      // their tags, and whether they have sidecars; nil before the first answer
	services   map[string]*service    // those that were looked at
	targets    map[endpoints]*service // what chains need beyond that; their read is zero before the first answer
	chains     map[chainKey]*chain
	queries    map[queryKey]*executed
	peers      []peering
	gateways   map[string][]string // the services that are mesh gateways, by datacenter; "" is this one
	checks     map[string]probes   // of local, by ID; nil before the first answer
	marked     map[string]string   // the checks of ours of the operator's sidecars: by ID, that of the sidecar
	nodes      []netip.Addr        // the addresses of all agents, nil before the first answer
	entries    *entries
	proxies    map[string][]Ports // that nodeproxies serve, by node; nil before the first answer
	intentions map[string][]rule  // by destination; a name that is not there was not asked for yet
	asked      []list             // the destinations that are asked for
	apart      map[string]bool    // those of them in lists of this node's own
}

// agent is what the agent says of itself.
type agent struct {
	node, datacenter, address string
	version                   string
	defaultIntention          string // default_intention_policy; "" leaves it to the ACLs
	virtual                   []netip.Prefix
	dns                       []netip.AddrPort // where it answers DNS, other than on loopback
	acls                      bool             // they are on
	ports                     []uint16         // on which it answers HTTP and gRPC, with TLS or without
	own                       []netip.AddrPort // where it listens itself, but on all addresses
	grpc, grpcTLS             uint16
}

// roots are what certificates are verified with.
type roots struct {
	trustDomain string
	active      *x509.Certificate
	all         []*x509.Certificate // the active one first
}

// tolerated is how many times in a row a question may be answered "forbidden" before that is an error: one may only mean
// that a server has not heard of the token yet.
const tolerated = 2

// fault is a question that is not answered now.
type fault struct {
	since time.Time // when its data was last known to be current
	count int
	err   error
}

// world is the data in force and what keeps newer data out. It is safe for concurrent use.
type world struct {
	log     *slog.Logger
	asked   string        // "the agent", or whoever it is
	changed chan struct{} // gets a value, without blocking, when the data has changed

	mu     sync.Mutex
	data   data
	lent   bool              // maps of data are in copies of it
	faults map[string]*fault // by what is asked
	shook  time.Time         // when a question was last not answered, or the start
	lost   uint64            // how many questions got no answer at all
	looked time.Time         // when all that is polled was last answered
	logged string            // the error that was logged
}

func newWorld(log *slog.Logger, asked string) *world {
	return &world{
		log: log, asked: asked, shook: time.Now(), changed: make(chan struct{}, 1), faults: make(map[string]*fault),
		data: data{
			services: make(map[string]*service), intentions: make(map[string][]rule),
			targets: make(map[endpoints]*service), chains: make(map[chainKey]*chain),
		},
	}
}

// update changes the data. change says whether it makes a difference to snapshots.
func (w *world) update(change func(*data) bool) {
	w.intend(func(d *data) (policy, more bool) { return false, change(d) })
}

// intend changes the intentions, and says whether that makes a difference to policy, or to more.
func (w *world) intend(change func(*data) (policy, more bool)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lent {
		w.data.services, w.data.intentions, w.lent = maps.Clone(w.data.services), maps.Clone(w.data.intentions), false
	}
	policy, more := change(&w.data)
	if policy {
		w.data.intended++
	}
	if more {
		w.data.changes++
	}
	if policy || more {
		wake(w.changed)
	}
}

// touch says that something else that snapshots are made of has changed.
func (w *world) touch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.data.changes++
	wake(w.changed)
}

// certify says that certificates have changed.
func (w *world) certify() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.data.certified++
	wake(w.changed)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// current is a copy of the data, to read at leisure.
func (w *world) current() data {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lent = true
	return w.data
}

// failed notes that what was asked at that time was not answered.
func (w *world) failed(what string, asked time.Time, err error) (count int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.faults[what]
	if f == nil {
		f = &fault{since: asked}
		if w.looked.After(asked) {
			f.since = w.looked // a query that waits is current as long as the agent is there
		}
		w.faults[what] = f
	}
	f.count++
	f.err = err
	w.shook = time.Now()
	if _, answered := errors.AsType[*statusError](err); !answered {
		w.lost++
	}
	w.report()
	wake(w.changed) // the first snapshot waits for answers, and not for ever
	return f.count
}

// calm is how long all questions must have been answered for the servers to be believed without more ado.
const calm = 30 * time.Second

// shaken says whether the servers may be younger than what they told us.
func (w *world) shaken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Since(w.shook) < calm
}

// losses is how many questions got no answer at all.
func (w *world) losses() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost
}

// answered notes that what was asked was answered.
func (w *world) answered(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.faults[what] != nil {
		delete(w.faults, what)
		w.report()
	}
}

// forget drops the faults whose names begin with kind, but for those that asked lists: nobody asks again, so none would be answered.
func (w *world) forget(kind string, asked func() map[string]bool) {
	isStale := func(what string) bool { return strings.HasPrefix(what, kind) }
	w.mu.Lock()
	any := slices.ContainsFunc(slices.Collect(maps.Keys(w.faults)), isStale)
	w.mu.Unlock()
	if !any {
		return
	}
	still := asked()
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.faults, func(what string, _ *fault) bool { return isStale(what) && !still[what] })
	w.report()
}

// hopeless says whether what was asked was not answered more than this many times in a row.
func (w *world) hopeless(what string, times int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.faults[what]
	return f != nil && f.count > times
}

// health says when the data was last known to be current, and what keeps newer data out.
func (w *world) health() (time.Time, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	updated := w.looked
	for _, f := range w.faults {
		if f.since.Before(updated) {
			updated = f.since
		}
	}
	return updated, w.problem()
}

// problem joins the faults, those with one cause into one. The caller holds w.mu.
func (w *world) problem() error {
	what := make(map[string][]string)
	for name, f := range w.faults {
		if f.count > tolerated || !hasStatus(f.err, http.StatusForbidden) {
			what[f.err.Error()] = append(what[f.err.Error()], name)
		}
	}
	var texts []string
	for cause, names := range what {
		slices.Sort(names)
		if more := len(names) - 5; more > 0 {
			names = append(names[:5], fmt.Sprintf("%d more", more))
		}
		texts = append(texts, fmt.Sprintf("ask %s for %s: %s", w.asked, strings.Join(names, ", "), cause))
	}
	slices.Sort(texts)
	switch {
	case len(texts) > 0:
		return fmt.Errorf("%s", strings.Join(texts, "; "))
	case w.looked.IsZero():
		return errUnread
	}
	return nil
}

// report logs when things turn bad or good. The caller holds w.mu.
func (w *world) report() {
	text := ""
	if err := w.problem(); err != nil && !errors.Is(err, errUnread) {
		text = err.Error()
	}
	switch {
	case text != "" && w.logged == "":
		w.log.Error("consul does not answer, what was last known stays in force", "error", text)
	case text == "" && w.logged != "":
		w.log.Info("consul answers again")
	}
	w.logged = text
}

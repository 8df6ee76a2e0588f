// Package kubernetes finds workloads among the pods of this node, by label, and tells of them: to the Manager as a provider, to
// Consul as this node's instances, and what their ClusterIPs stand for.
//
// A label asks, and the configuration grants: a pod may be only what its service account is called, in a namespace for which that
// service is configured. Nothing is asked of the container runtime: a pod's cgroup is found by its UID.
//
// The API server is read, and written to for KeepAccess and KeepGates alone. While it does not answer, what was last known stays in force, and Problem says so.
package kubernetes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"nodeproxy.io/nodeproxy/workload"
)

const (
	lookEvery   = time.Second           // while something is awaited that nobody tells of
	changesLast = 20 * time.Millisecond // what changes together is looked at together
	hung        = 5 * time.Second       // an API server that has not told of everything by then is taken for one that does not answer
)

// KubeletPort is where a kubelet listens, unless it is told otherwise.
const KubeletPort = 10250

// Config is what a Cluster needs.
type Config struct {
	Node       string              // in the cluster
	Kubeconfig string              // "": what Kubernetes gives to a pod
	Namespaces map[string][]string // the services that pods of each may be
	Mount      string              // of cgroup2
	DaemonSet  DaemonSet           // of which this process is a pod; none: it is not
	StateFile  string              // keeps what is claimed, for a daemon that starts while the API server is away
	Log        *slog.Logger
}

// Cluster is what this node sees of its Kubernetes cluster. It implements workload.Provider; all else waits for its Run.
type Cluster struct {
	cfg                                Config
	kinds                              []*objects
	pods, namespaces, services, slices *objects
	server                             *rest.Config
	coreAPI                            *rest.RESTClient
	own                                *ownDaemonSet // nil: this process is no pod
	cgroups                            cgroups       // Run's own
	workloads                          []pod         // that are claimed, or refused; Run's own

	mu        sync.Mutex
	began     time.Time
	synced    bool
	spoke     bool                   // Run has claimed what there is, or what is remembered
	faults    map[string]error       // by resource
	misplaced error                  // pods without a cgroup
	gates     error                  // conditions that are not set
	changed   []chan struct{}        // get a value, without blocking, when anything has changed
	starting  map[types.UID]bool     // whose network namespace has been made
	placed    map[types.UID][]string // where the cgroups of workloads are or will be
}

// New is of the cluster to which the kubeconfig leads. It connects to nothing yet.
func New(cfg Config) (*Cluster, error) {
	c := &Cluster{cfg: cfg, cgroups: cgroups{mount: cfg.Mount}, faults: make(map[string]error), starting: make(map[types.UID]bool)}
	access, err := rest.InClusterConfig()
	if cfg.Kubeconfig != "" {
		access, err = clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("find the Kubernetes API server: %w: run nodeproxy as a pod, or set workloads.kubernetes.kubeconfig", err)
	}
	core, err := newClient(access, "/api", corev1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	c.server, c.coreAPI = access, core
	discovery, err := newClient(access, "/apis", discoveryv1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	c.pods = c.follow(core, "pods", new(corev1.Pod), fields.OneTermEqualSelector("spec.nodeName", cfg.Node))
	c.namespaces = c.follow(core, "namespaces", new(corev1.Namespace), fields.Everything())
	c.services = c.follow(core, "services", new(corev1.Service), fields.Everything())
	c.slices = c.follow(discovery, "endpointslices", new(discoveryv1.EndpointSlice), fields.Everything())
	return c, c.followDaemonSet(access)
}

// note remembers whether the API server answered, and returns err.
func (c *Cluster) note(ctx context.Context, resource string, err error) error {
	if ctx.Err() != nil {
		return err
	}
	c.mu.Lock()
	before := c.faults[resource]
	c.faults[resource] = err
	c.mu.Unlock()
	if (before == nil) != (err == nil) {
		c.tell()
	}
	if before == nil && err != nil {
		c.cfg.Log.Warn("the Kubernetes API server does not answer; what was last known stays in force", "resource", resource, "error", err)
	}
	return err
}

// Name implements workload.Provider.
func (*Cluster) Name() string { return providerName }

const providerName = "kubernetes"

// Problem implements workload.Reporter. It has none before Run has claimed what can be: who hears of one does not wait for claims.
func (c *Cluster) Problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.spoke {
		return nil
	}
	return cmp.Or(c.unheard(), c.misplaced, c.unfollowed(), c.gates)
}

func (c *Cluster) isAway() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unheard() != nil
}

func (c *Cluster) speak() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spoke = true
}

// Check asks the API server once for all that is needed.
func (c *Cluster) Check(ctx context.Context) error {
	for _, o := range c.kinds {
		if _, err := o.lister.ListWithContext(ctx, metav1.ListOptions{Limit: 1}); err != nil {
			return fmt.Errorf("list %s of the Kubernetes API server: %w: see that the server runs, and that nodeproxy may list and watch pods, namespaces, services and endpointslices", o.name, err)
		}
	}
	return nil
}

// unheard is why what is known may be old.
func (c *Cluster) unheard() error {
	for _, name := range slices.Sorted(maps.Keys(c.faults)) {
		if err := c.faults[name]; err != nil && name != daemonSets { // on which no workload depends
			return fmt.Errorf("follow %s of the Kubernetes API server: %w: enrolled pods stay enrolled, new ones are not seen; see that the server runs and that nodeproxy may list and watch them: it is tried again by itself", name, err)
		}
	}
	if !c.synced && !c.began.IsZero() && time.Since(c.began) > hung {
		return errors.New("the Kubernetes API server has not told of all pods yet: see that it runs and is reached from this node; it is waited for")
	}
	return nil
}

// subscribe returns a channel that gets a value when anything may have changed.
func (c *Cluster) subscribe() <-chan struct{} {
	changed := make(chan struct{}, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = append(c.changed, changed)
	return changed
}

func (c *Cluster) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changedNow()
}

// changedNow is tell for who holds mu.
func (c *Cluster) changedNow() {
	for _, changed := range c.changed {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}

// Run implements workload.Provider.
func (c *Cluster) Run(ctx context.Context, claim func([]workload.Claim)) error {
	var running sync.WaitGroup
	defer running.Wait()
	changed := c.subscribe()
	c.mu.Lock()
	c.began = time.Now()
	c.mu.Unlock()
	for _, o := range c.kinds {
		running.Go(func() { o.follow(ctx) })
	}
	tick := time.NewTicker(changesLast) // until all is read
	defer tick.Stop()
	var told []workload.Claim
	first, remembered := true, false
	for {
		switch {
		case c.hasSynced():
			if now := c.look(); first || !reflect.DeepEqual(now, told) {
				told, first = now, false
				claim(now)
				c.speak()
				c.remember()
			}
			tick.Reset(lookEvery)
		case c.isAway() && !remembered:
			remembered = true
			c.recall()
			c.mu.Lock()
			c.locate()
			c.mu.Unlock()
			if len(c.workloads) > 0 {
				claim(c.claims())
			}
			c.speak()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(changesLast):
		}
	}
}

// hasSynced says whether all has been read once.
func (c *Cluster) hasSynced() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.synced {
		c.synced = !slices.ContainsFunc(c.kinds, func(o *objects) bool { return !o.read.Load() })
	}
	return c.synced
}

// look claims the pods as they are now.
func (c *Cluster) look() []workload.Claim {
	before := make(map[types.UID]pod)
	for _, p := range c.workloads {
		before[p.UID] = p
	}
	var all []pod
	var unplaced []string
	for _, p := range list[corev1.Pod](c.pods) {
		found, ok := c.judge(p)
		if !ok {
			delete(before, p.UID)
			continue
		}
		if found.finished() {
			continue // as if it were gone
		}
		paths := c.cgroups.of(p)
		if len(paths) == 0 {
			unplaced = append(unplaced, found.String())
		}
		c.await(found, paths)
		found.place(paths)
		all = append(all, found)
		delete(before, p.UID)
	}
	for _, p := range before { // until its last process is gone it must not be open to strangers
		if p.granted() && c.cgroups.populated(p.paths()) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b pod) int { return cmp.Compare(a.String(), b.String()) })
	c.workloads = all
	c.mu.Lock()
	defer c.mu.Unlock()
	c.locate()
	c.misplaced = nil
	if len(unplaced) > 0 {
		c.misplaced = fmt.Errorf("there is no cgroup for %s, and %d pods in all: no directory kubepods or kubepods.slice is below %s; see that the kubelet runs with cgroupsPerQOS, and that nodeproxy sees the node's cgroups", unplaced[0], len(unplaced), c.cfg.Mount)
	}
	return c.claims()
}

func (c *Cluster) claims() (all []workload.Claim) {
	for _, p := range c.workloads {
		all = append(all, p.claims...)
	}
	return all
}

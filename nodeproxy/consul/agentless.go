package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// Definitions tells of the services of a node that has no agent: whenever they or the results of their checks change, until
// ctx ends.
type Definitions interface {
	Run(ctx context.Context, deliver func(catalog.Definitions))
}

const (
	// nodeSuffix makes this node's name that of the node in the catalog that is ours.
	nodeSuffix = "-nodeproxy"

	nodeCheck = "nodeproxy" // its check: critical when the daemon has stopped

	leaveTimeout = 2 * time.Second
)

func (c *Config) agentless() bool { return len(c.Servers) > 0 }

func (c *Config) catalogNode() string { return c.Node + nodeSuffix }

func (c *Config) asked() string {
	if c.agentless() {
		return "the servers"
	}
	return "the agent"
}

func (c *Config) registrar() string {
	if c.agentless() {
		return "in services_dir"
	}
	return "with this node's agent"
}

func (c *Config) location() string {
	if c.agentless() {
		return strings.Join(c.Servers, ", ")
	}
	return c.Address
}

// define takes over what the node's operator has defined. It is called by one goroutine at a time, also when checks alone change.
func (r *run) define(defs catalog.Definitions) {
	text := ""
	if defs.Err != nil {
		text = defs.Err.Error()
	}
	switch {
	case text == r.undefined:
	case text != "":
		r.cfg.Log.Error("this node's services are not applied, the last good ones stay in force", "error", text)
	default:
		r.cfg.Log.Info("this node's services are applied again")
	}
	r.undefined = text
	local := make(map[string]*api.AgentService)
	for i := range defs.All {
		for _, s := range servicesOf(&defs.All[i]) {
			local[s.ID] = s
		}
	}
	r.world.update(func(d *data) bool {
		d.defined, d.local, d.checks = &defs, local, make(map[string]probes)
		return true
	})
	wake(r.known)
	r.chainsChanged()
}

// servicesOf is a definition as an agent would show it: the application, and its sidecar where it has a port of its own.
func servicesOf(def *catalog.Definition) []*api.AgentService {
	text := func(ip netip.Addr) string {
		if !ip.IsValid() {
			return ""
		}
		return ip.String()
	}
	app := &api.AgentService{
		ID: def.ID, Service: def.Service, Address: text(def.Address), Port: int(def.Port), SocketPath: def.Socket,
		Tags: def.Tags, Meta: def.Meta, Weights: api.AgentWeights{Passing: 1, Warning: 1},
	}
	if def.Native {
		app.Connect = &api.AgentServiceConnect{Native: true}
	}
	if def.Mesh.Port() == 0 {
		return []*api.AgentService{app}
	}
	proxy := &api.AgentServiceConnectProxyConfig{DestinationServiceName: def.Service, DestinationServiceID: def.ID, LocalServiceSocketPath: def.Socket}
	if def.Delivery.IsValid() {
		proxy.LocalServiceAddress, proxy.LocalServicePort = def.Delivery.Addr().String(), int(def.Delivery.Port())
	}
	return []*api.AgentService{app, {
		Kind: api.ServiceKindConnectProxy, ID: def.ID + sidecarSuffix, Service: def.Service + sidecarSuffix,
		Address: cmp.Or(text(def.Mesh.Addr()), app.Address), Port: int(def.Mesh.Port()), Tags: def.Tags, Meta: def.Meta, Weights: app.Weights, Proxy: proxy,
	}}
}

// definition is what the operator wrote of the instance with that ID, or that of its sidecar; nil where an agent knows it.
func (d *data) definition(id string) *catalog.Definition {
	if d.defined == nil {
		return nil
	}
	for i := range d.defined.All {
		if def := &d.defined.All[i]; def.ID == id || def.ID+sidecarSuffix == id {
			return def
		}
	}
	return nil
}

// reportDefinitions says what is wrong with what the operator wrote.
func (b *builder) reportDefinitions() {
	if b.data.defined == nil {
		return
	}
	b.problems = append(b.problems, b.data.defined.Problems...)
	if err := b.data.defined.Err; err != nil {
		b.problem("", "refused", "services_dir is not applied: %v", err)
	}
}

// entriesOf are the entries of our node in the catalog: the node with its check, what is defined here, the sidecars that
// have a certificate, and the daemon.
func entriesOf(cfg *Config, d *data, w *wanted, snap *catalog.Snapshot) []*api.CatalogRegistration {
	entry := func(s *api.AgentService, checks ...*api.HealthCheck) *api.CatalogRegistration {
		e := &api.CatalogRegistration{
			Node: cfg.catalogNode(), Address: cfg.NodeAddress.String(), NodeMeta: map[string]string{managedBy: ours}, Service: s,
		}
		for _, c := range checks {
			c.Node = e.Node
			if s != nil {
				c.ServiceID, c.ServiceName = s.ID, s.Service
			}
			e.Checks = append(e.Checks, c)
		}
		return e
	}
	all := []*api.CatalogRegistration{
		entry(nil, &api.HealthCheck{CheckID: nodeCheck, Name: "node proxy", Status: api.HealthPassing}),
		entry(&api.AgentService{ID: w.self.ID, Service: w.self.Name, Address: w.self.Address, Meta: w.self.Meta, Weights: api.AgentWeights{Passing: 1, Warning: 1}}),
	}
	for i := range d.defined.All {
		def := &d.defined.All[i]
		var checks []*api.HealthCheck
		for n, c := range def.Checks {
			checks = append(checks, healthCheck(fmt.Sprintf("%s:%d", def.ID, n), c))
		}
		of := func(s *api.AgentService) *api.AgentService {
			s = new(*s)
			s.Meta = maps.Clone(s.Meta)
			if s.Meta == nil {
				s.Meta = make(map[string]string)
			}
			s.Meta[managedBy] = ours
			return s
		}
		all = append(all, entry(of(d.local[def.ID]), checks...))
		side := d.local[def.ID+sidecarSuffix] // the operator's
		if want := w.sidecars[def.ID+sidecarSuffix]; want.app != nil {
			reg := want.registration()
			side = &api.AgentService{
				Kind: reg.Kind, ID: reg.ID, Service: reg.Name, Address: reg.Address, Port: reg.Port, Tags: reg.Tags, Meta: reg.Meta,
				Weights: api.AgentWeights{Passing: 1, Warning: 1}, Proxy: reg.Proxy,
			}
		}
		if side != nil && snap.Leaves[def.Service] != nil && slices.Contains(w.needed, def.Service) {
			all = append(all, entry(of(side), healthCheck(side.ID+"-app", applicationCheck(def, d.ends(def.ID, side.ID)))))
		}
	}
	return all
}

// applicationCheck is the checks of an instance in one.
func applicationCheck(def *catalog.Definition, ending bool) catalog.CheckResult {
	if ending {
		return catalog.CheckResult{Name: "application", Output: endingText}
	}
	sum := catalog.CheckResult{Name: "application", Passing: true}
	for _, c := range def.Checks {
		if !c.Passing {
			sum.Passing = false
			sum.Output = c.Name + ": " + c.Output
		}
	}
	return sum
}

func healthCheck(id string, c catalog.CheckResult) *api.HealthCheck {
	h := &api.HealthCheck{CheckID: id, Name: c.Name, Status: api.HealthPassing, Output: c.Output}
	if !c.Passing {
		h.Status = api.HealthCritical
	}
	return h
}

// catalogNode is what the catalog has of our node.
type catalogNode struct {
	meta     map[string]string // nil: there is no such node
	services map[string]*api.AgentService
	checks   map[string]*api.HealthCheck
}

func (c *client) readNode(ctx context.Context, name string) (*catalogNode, error) {
	n := &catalogNode{services: make(map[string]*api.AgentService), checks: make(map[string]*api.HealthCheck)}
	var found *api.CatalogNodeServiceList
	var checks []*api.HealthCheck
	for path, into := range map[string]any{"/v1/catalog/node-services/": &found, "/v1/health/node/": &checks} {
		a, err := c.request(ctx, question{path: path + escape(name), consistent: true})
		if err == nil {
			err = decode(a, into)
		}
		if err != nil {
			return nil, err
		}
	}
	if found != nil && found.Node != nil {
		n.meta = found.Node.Meta
		for _, s := range found.Services {
			n.services[s.ID] = s
		}
		if n.meta[managedBy] != ours {
			return nil, fmt.Errorf("node %q is in the catalog, and was not registered by nodeproxy: remove it, or give this node another name", name)
		}
	}
	for _, check := range checks {
		n.checks[check.CheckID] = check
	}
	return n, nil
}

// ending lists the checks by which sidecars are critical because their workloads are being stopped, as endingChecksOf does.
func (n *catalogNode) ending() map[string]string {
	found := make(map[string]string)
	for id, c := range n.checks {
		if saysEnding(c) {
			found[id] = c.ServiceID
		}
	}
	return found
}

// has says whether the catalog has e as it should be.
func (n *catalogNode) has(e *api.CatalogRegistration) bool {
	if n.meta == nil {
		return false
	}
	for _, c := range e.Checks {
		if was := n.checks[c.CheckID]; was == nil || was.Status != c.Status || was.Output != c.Output || was.Name != c.Name || was.ServiceID != c.ServiceID {
			return false
		}
	}
	if e.Service == nil {
		return true
	}
	s, want := n.services[e.Service.ID], e.Service
	return s != nil && s.Kind == want.Kind && s.Service == want.Service && s.Address == want.Address && s.Port == want.Port && s.SocketPath == want.SocketPath &&
		slices.Equal(s.Tags, want.Tags) && maps.Equal(s.Meta, want.Meta) && isNative(s) == isNative(want) && sameProxy(s.Proxy, want.Proxy)
}

func isNative(s *api.AgentService) bool { return s.Connect != nil && s.Connect.Native }

func sameProxy(x, y *api.AgentServiceConnectProxyConfig) bool {
	if x == nil || y == nil {
		return y == nil
	}
	return x.DestinationServiceName == y.DestinationServiceName && x.DestinationServiceID == y.DestinationServiceID &&
		x.LocalServiceAddress == y.LocalServiceAddress && x.LocalServicePort == y.LocalServicePort && x.LocalServiceSocketPath == y.LocalServiceSocketPath
}

// enlister keeps our node in the catalog as it should be.
type enlister struct {
	*run
	last []*api.CatalogRegistration // what the catalog has, as far as we know; nil: look
}

// register writes what is missing or different, and removes what of ours is not wanted. settled is as for run.register.
func (l *enlister) register(ctx context.Context, w *wanted, alive bool, settled func(service string) bool) error {
	if !alive && reflect.DeepEqual(l.last, w.entries) {
		return nil
	}
	l.last = nil
	node, err := l.client.readNode(ctx, l.cfg.catalogNode())
	if err != nil {
		return err
	}
	if l.world.current().marked == nil {
		marked := node.ending()
		l.world.update(func(d *data) bool {
			d.marked = marked
			return len(marked) > 0
		})
		if len(marked) > 0 {
			return nil // by that something else is wanted
		}
	}
	var errs []error
	wanted := make(map[string]bool)
	checked := make(map[string]bool)
	for _, e := range w.entries {
		for _, c := range e.Checks {
			checked[c.CheckID] = true
		}
		if e.Service != nil {
			wanted[e.Service.ID] = true
			if was := node.services[e.Service.ID]; was != nil && was.Meta[managedBy] != ours {
				errs = append(errs, fmt.Errorf("service %q is in the catalog on node %q, and was not registered by nodeproxy: remove it there, or give yours another id", e.Service.ID, e.Node))
				continue
			}
		}
		if !node.has(e) {
			errs = append(errs, l.client.put(ctx, "/v1/catalog/register", tokenOf(e.Service), e))
		}
	}
	if w.defined {
		errs = append(errs, l.remove(ctx, w, node, wanted, checked, settled)...)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	l.last = w.entries
	return nil
}

// remove removes the services and checks of ours that are not wanted.
func (l *enlister) remove(ctx context.Context, w *wanted, node *catalogNode, wanted, checked map[string]bool, settled func(string) bool) (errs []error) {
	for _, id := range slices.Sorted(maps.Keys(node.services)) {
		s := node.services[id]
		if wanted[id] || s.Meta[managedBy] != ours || s.Proxy != nil && !l.forsaken(w, s, settled) {
			continue
		}
		errs = append(errs, l.client.deregister(ctx, l.cfg.catalogNode(), s))
	}
	for _, id := range slices.Sorted(maps.Keys(node.checks)) {
		c := node.checks[id]
		if s := node.services[c.ServiceID]; s != nil && wanted[s.ID] && s.Meta[managedBy] == ours && !checked[id] {
			errs = append(errs, l.client.put(ctx, "/v1/catalog/deregister", tokenOf(s), &api.CatalogDeregistration{Node: l.cfg.catalogNode(), CheckID: id}))
		}
	}
	return errs
}

// leave says that the daemon has stopped: nobody else would.
func (l *enlister) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	err := l.client.put(ctx, "/v1/catalog/register", "", &api.CatalogRegistration{
		Node: l.cfg.catalogNode(), Address: l.cfg.NodeAddress.String(), NodeMeta: map[string]string{managedBy: ours},
		Checks: api.HealthChecks{{Node: l.cfg.catalogNode(), CheckID: nodeCheck, Name: "node proxy", Status: api.HealthCritical, Output: "the daemon has stopped"}},
	})
	if err != nil {
		l.cfg.Log.Warn("the catalog still says that this node serves", "error", err)
	}
}

// tokenOf is the service whose token registers s.
func tokenOf(s *api.AgentService) string {
	switch {
	case s == nil || s.Service == proxyService:
		return ""
	case s.Proxy != nil:
		return s.Proxy.DestinationServiceName
	}
	return s.Service
}

func (c *client) deregister(ctx context.Context, node string, s *api.AgentService) error {
	return c.put(ctx, "/v1/catalog/deregister", tokenOf(s), &api.CatalogDeregistration{Node: node, ServiceID: s.ID})
}

// withdrawNode removes our node from the catalog, or what of it is ours where others have registered services on it.
func withdrawNode(ctx context.Context, c *client, name string) (removed []string, err error) {
	node, err := c.readNode(ctx, name)
	if err != nil || node.meta == nil {
		return nil, err
	}
	var errs []error
	foreign := false
	for _, id := range slices.Sorted(maps.Keys(node.services)) {
		s := node.services[id]
		if s.Meta[managedBy] != ours {
			foreign = true
			continue
		}
		if err := c.deregister(ctx, name, s); err != nil {
			errs = append(errs, fmt.Errorf("withdraw registration %q: %w", id, err))
			continue
		}
		removed = append(removed, "registration "+id)
	}
	gone := &api.CatalogDeregistration{Node: name}
	if foreign {
		gone.CheckID = nodeCheck
	}
	if len(errs) > 0 {
		return removed, errors.Join(errs...)
	}
	if err := c.put(ctx, "/v1/catalog/deregister", "", gone); err != nil {
		return removed, fmt.Errorf("withdraw node %q: %w", name, err)
	}
	if !foreign {
		removed = append(removed, "node "+name+" of the catalog")
	}
	return removed, nil
}

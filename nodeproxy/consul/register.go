package consul

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	// proxyService is the service that this daemon registers for itself. Other nodeproxies find in its meta what it
	// serves, and every sidecar that it registers is critical when it is.
	proxyService = "node-proxy"

	managedBy   = "managed-by"
	ours        = "nodeproxy"
	versionMeta = "nodeproxy-version"
	portsMeta   = "nodeproxy-ports" // "", "-2", "-3", …: what a value can hold is limited
	maxMeta     = 500               // bytes of one value; Consul takes 512

	sidecarSuffix = "-sidecar-proxy"

	// heartbeat is how often the agent is told that this daemon lives, lifetime how long it believes it.
	heartbeat = 10 * time.Second
	lifetime  = 45 * time.Second

	// registrars is how many registrations are changed at once.
	registrars = 4

	// certifying is how long registrations wait at most for certificates that are being asked for: it is those that protect a
	// workload, and one agent makes both.
	certifying = time.Second

	// unclaimed is how long after the start a registration of ours is left alone whose service no workload has been
	// enrolled as: workloads are claimed one after the other.
	unclaimed = time.Minute
)

func isOurs(s *api.AgentService) bool { return s.Meta[managedBy] == ours }

// application finds the instance behind a sidecar: the one it names, or the only one of that service.
func (d *data) application(sidecar *api.AgentService) *api.AgentService {
	if id := sidecar.Proxy.DestinationServiceID; id != "" {
		return d.local[id]
	}
	var found []*api.AgentService
	for _, s := range d.local {
		if s.Kind == api.ServiceKindTypical && s.Service == sidecar.Proxy.DestinationServiceName {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		return nil
	}
	return found[0]
}

// unserved lists the instances of this node that need a sidecar of ours: of services that workloads run as, not native,
// and without a sidecar of the operator's.
func unserved(d *data, needed []string) []*api.AgentService {
	served := make(map[string]bool)
	for _, s := range d.local {
		if s.Kind != api.ServiceKindConnectProxy || s.Proxy == nil || isOurs(s) {
			continue
		}
		if app := d.application(s); app != nil {
			served[app.ID] = true
		}
	}
	var all []*api.AgentService
	for _, id := range slices.Sorted(maps.Keys(d.local)) {
		s := d.local[id]
		native := s.Connect != nil && s.Connect.Native
		if s.Kind == api.ServiceKindTypical && !native && !served[id] && slices.Contains(needed, s.Service) && (s.Port != 0 || s.SocketPath != "") && id != proxyService {
			all = append(all, s)
		}
	}
	return all
}

// namesake is what the operator has registered by the ID that a sidecar of ours for app would have, nil if nothing: it is not replaced.
func (d *data) namesake(app *api.AgentService) *api.AgentService {
	if s := d.local[app.ID+sidecarSuffix]; s != nil && !isOurs(s) {
		return s
	}
	return nil
}

// givePorts assigns mesh ports to the instances that need a sidecar of ours.
func (r *run) givePorts(d *data, needed []string) map[string]uint16 {
	if r.ports == nil {
		return nil
	}
	var ids []string
	for _, s := range unserved(d, needed) {
		ids = append(ids, s.ID)
	}
	registered, taken := make(map[string]uint16), make(map[uint16]bool)
	for _, s := range d.local {
		port := uint16(s.Port)
		if s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && isOurs(s) {
			registered[s.Proxy.DestinationServiceID] = port
			continue
		}
		taken[port] = true
	}
	given, err := r.ports.assign(ids, registered, taken, time.Now())
	if err != nil {
		r.cfg.Log.Error("mesh ports may change with a restart", "error", err)
	}
	return given
}

// sidecar is the registration of ours for an instance.
func sidecar(app *api.AgentService, port uint16, ending bool) *api.AgentServiceRegistration {
	meta := map[string]string{managedBy: ours}
	for k, v := range app.Meta {
		if k != managedBy && k != endingMeta {
			meta[k] = v
		}
	}
	id := app.ID + sidecarSuffix
	reg := &api.AgentServiceRegistration{
		Kind: api.ServiceKindConnectProxy, ID: id, Name: app.Service + sidecarSuffix, // any other name needs more rights
		Address: app.Address, Port: int(port), Tags: app.Tags, Meta: meta, Locality: app.Locality,
		Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: app.Service, DestinationServiceID: app.ID},
		Checks: api.AgentServiceChecks{
			{CheckID: id + "-app", Name: "application", AliasService: app.ID},
			{CheckID: id + "-np", Name: "node proxy", AliasService: proxyService, Status: api.HealthPassing}, // who registers it runs
		},
	}
	if ending {
		meta[endingMeta] = "true"
		reg.Checks = append(reg.Checks, &api.AgentServiceCheck{CheckID: id + "-end", Name: endingText, TTL: lifetime.String(), Status: api.HealthCritical})
	}
	if app.Weights != (api.AgentWeights{}) {
		reg.Weights = &app.Weights
	}
	if ip, err := netip.ParseAddr(app.Address); err == nil && (ip.IsLoopback() || ip.IsUnspecified()) {
		reg.Address = "" // the node's
	}
	if app.SocketPath != "" {
		reg.Proxy.LocalServiceSocketPath = app.SocketPath
	} else {
		reg.Proxy.LocalServiceAddress, reg.Proxy.LocalServicePort = "127.0.0.1", app.Port
	}
	return reg
}

// same says whether what is registered is reg, as far as the agent shows it.
func same(s *api.AgentService, reg *api.AgentServiceRegistration) bool {
	if s == nil || s.Service != reg.Name || s.Address != reg.Address || s.Port != reg.Port || !slices.Equal(s.Tags, reg.Tags) || !maps.Equal(s.Meta, reg.Meta) {
		return false
	}
	if reg.Weights != nil && s.Weights != *reg.Weights {
		return false
	}
	if reg.Proxy == nil {
		return true
	}
	return s.Proxy != nil && s.Proxy.DestinationServiceName == reg.Proxy.DestinationServiceName &&
		s.Proxy.DestinationServiceID == reg.Proxy.DestinationServiceID && s.Proxy.LocalServiceAddress == reg.Proxy.LocalServiceAddress &&
		s.Proxy.LocalServicePort == reg.Proxy.LocalServicePort && s.Proxy.LocalServiceSocketPath == reg.Proxy.LocalServiceSocketPath &&
		reflect.DeepEqual(s.Locality, reg.Locality)
}

// wanted is what this daemon wants to be registered, as of one snapshot.
type wanted struct {
	self     *api.AgentServiceRegistration
	sidecars map[string]wantedSidecar     // by ID
	ending   map[string]*api.AgentService // by ID of a check: of which sidecars of the operator's it is
	needed   []string

	entries []*api.CatalogRegistration // all of it as the catalog has it, where there is no agent
	defined bool                       // what is not among them is not defined any more
}

// wantedSidecar is a sidecar for an instance. Its registration is made when it is compared: it takes some kilobytes.
type wantedSidecar struct {
	app    *api.AgentService
	port   uint16
	ending bool
}

func (s wantedSidecar) registration() *api.AgentServiceRegistration {
	return sidecar(s.app, s.port, s.ending)
}

// wantedOf is what to register for snap. A sidecar is wanted once its service has a certificate: before, nobody answers at
// its port.
func wantedOf(cfg *Config, d *data, snap *catalog.Snapshot, needed []string, given map[string]uint16) *wanted {
	w := &wanted{sidecars: make(map[string]wantedSidecar), ending: d.endingChecks(), needed: needed}
	for _, app := range unserved(d, needed) {
		id := app.ID + sidecarSuffix
		if given[app.ID] != 0 && snap.Leaves[app.Service] != nil && d.namesake(app) == nil {
			w.sidecars[id] = wantedSidecar{app, given[app.ID], d.ends(app.ID, id)}
		}
	}
	var served []uint16
	for _, inst := range snap.LocalInstances() {
		if inst.Mesh.IsValid() && !inst.Native && slices.Contains(needed, inst.Service) {
			served = append(served, inst.Mesh.Port())
		}
	}
	meta := map[string]string{managedBy: ours, versionMeta: cfg.Version}
	for i, text := range portTexts(served) {
		meta[portsKey(i)] = text
	}
	w.self = &api.AgentServiceRegistration{
		ID: proxyService, Name: proxyService, Address: cfg.NodeAddress.String(), Meta: meta,
		Check: &api.AgentServiceCheck{CheckID: proxyService, Name: "node proxy", TTL: lifetime.String(), Status: api.HealthPassing},
	}
	if cfg.agentless() {
		w.entries, w.defined = entriesOf(cfg, d, w, snap), d.defined.Err == nil
	}
	return w
}

func portsKey(i int) string {
	if i == 0 {
		return portsMeta
	}
	return portsMeta + "-" + strconv.Itoa(i+1)
}

// portTexts writes ports as "21500-21509,21700", in texts that fit into a value each.
func portTexts(all []uint16) []string {
	slices.Sort(all)
	all = slices.Compact(all)
	var texts []string
	for i := 0; i < len(all); {
		last := i
		for last+1 < len(all) && all[last+1] == all[last]+1 {
			last++
		}
		text := strconv.Itoa(int(all[i]))
		if last > i {
			text += "-" + strconv.Itoa(int(all[last]))
		}
		if n := len(texts); n > 0 && len(texts[n-1])+1+len(text) <= maxMeta {
			texts[n-1] += "," + text
		} else {
			texts = append(texts, text)
		}
		i = last + 1
	}
	return texts
}

// servedPorts reads what portTexts wrote, from the meta of a node proxy.
func servedPorts(meta map[string]string) (all []Ports) {
	for i := 0; meta[portsKey(i)] != ""; i++ {
		for text := range strings.SplitSeq(meta[portsKey(i)], ",") {
			low, high, isRange := strings.Cut(text, "-")
			if !isRange {
				high = low
			}
			first, err1 := strconv.ParseUint(low, 10, 16)
			last, err2 := strconv.ParseUint(high, 10, 16)
			if err1 == nil && err2 == nil && first > 0 {
				all = append(all, Ports{uint16(first), uint16(last)})
			}
		}
	}
	return all
}

// keepRegistered brings the agent's registrations in line with what the last snapshot wants, until ctx ends. What is
// registered then stays: it becomes critical by itself when no daemon comes back.
func (r *run) keepRegistered(ctx context.Context) {
	started := time.Now()
	claimed := make(map[string]bool) // services that workloads have run as
	var w *wanted
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	failures := 0
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	register := r.register
	if r.cfg.agentless() {
		l := &enlister{run: r}
		register = l.register
		defer func() {
			if w != nil && !r.yielded.Load() {
				l.leave(ctx)
			}
		}()
	}
	for {
		alive := false
		select {
		case <-ctx.Done():
			return
		case w = <-r.wanted:
			w = r.gather(ctx, w)
		case <-r.altered:
		case <-beat.C:
			alive = true
		case <-retry.C:
		}
		if w == nil || r.yielded.Load() {
			continue
		}
		for _, name := range w.needed {
			claimed[name] = true
		}
		asked := time.Now()
		err := register(ctx, w, alive, func(service string) bool { return claimed[service] || time.Since(started) > unclaimed })
		if err != nil && ctx.Err() == nil {
			failures++
			r.world.failed("its registrations", asked, explain(err))
			retry.Reset(backoff(failures))
			continue
		}
		failures = 0
		retry.Stop()
		r.world.answered("its registrations")
	}
}

// gather returns the last of what is wanted while there are certificates to come, w if nothing else is.
func (r *run) gather(ctx context.Context, w *wanted) *wanted {
	enough := time.NewTimer(certifying)
	defer enough.Stop()
	for r.leaves.awaits() {
		select {
		case <-ctx.Done():
			return w
		case <-enough.C:
			return w
		case w = <-r.wanted:
		}
	}
	return w
}

// register registers what is missing or different, and withdraws what is not wanted. settled says of a service that is not
// needed whether that is known for sure.
func (r *run) register(ctx context.Context, w *wanted, alive bool, settled func(service string) bool) error {
	local := r.world.current().local
	var mu sync.Mutex // of errs and changed
	var errs []error
	changed := false
	note := func(differs bool, err error) {
		mu.Lock()
		defer mu.Unlock()
		changed = changed || differs
		if err != nil {
			errs = append(errs, err)
		}
	}
	put := func(service, path string, body any) { note(true, r.client.put(ctx, path, service, body)) }
	const replace = "/v1/agent/service/register?replace-existing-checks=true"
	if !same(local[proxyService], w.self) {
		put("", replace, w.self)
	} else if alive {
		if err := r.client.put(ctx, "/v1/agent/check/pass/"+proxyService, "", nil); hasStatus(err, http.StatusNotFound) {
			put("", replace, w.self)
		} else {
			note(false, err)
		}
	}
	// change replaces what is registered by reg, which may be nil, if that is needed by now: the last look may be old.
	var changes sync.WaitGroup
	turns := make(chan struct{}, registrars)
	change := func(service, id string, reg *api.AgentServiceRegistration) {
		turns <- struct{}{}
		changes.Go(func() {
			defer func() { <-turns }()
			now, err := r.registered(ctx, service, id)
			switch {
			case err != nil:
				note(false, err)
			case now != nil && !isOurs(now), reg == nil && now == nil, reg != nil && same(now, reg):
				note(true, nil) // since it was looked
			case reg == nil:
				note(true, r.client.withdraw(ctx, service, id))
			default:
				put(service, replace, reg)
			}
		})
	}
	for _, id := range slices.Sorted(maps.Keys(w.sidecars)) {
		if local[id] != nil && !isOurs(local[id]) {
			continue // the operator's, maybe since w was made
		}
		want := w.sidecars[id]
		if reg := want.registration(); !same(local[id], reg) {
			change(want.app.Service, id, reg)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(local)) {
		s := local[id]
		if s.Kind != api.ServiceKindConnectProxy || s.Proxy == nil || !isOurs(s) || w.sidecars[id].app != nil {
			continue
		}
		if r.forsaken(w, s, settled) {
			change(s.Proxy.DestinationServiceName, id, nil)
		}
	}
	changes.Wait()
	note(r.mark(ctx, w))
	if changed {
		wake(r.lookNow)
	}
	return errors.Join(errs...)
}

// withdraw removes a registration from the agent, with the token of service. One that is gone already is no error.
func (c *client) withdraw(ctx context.Context, service, id string) error {
	return ignoreGone(c.put(ctx, "/v1/agent/service/deregister/"+escape(id), service, nil))
}

// registered asks the agent what is registered by that ID, nil if nothing is. What an operator registers between the answer
// and a change of ours is lost: agents compare nothing.
func (r *run) registered(ctx context.Context, service, id string) (*api.AgentService, error) {
	got, err := r.client.request(ctx, question{path: "/v1/agent/service/" + escape(id), service: service})
	if hasStatus(err, http.StatusNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s api.AgentService
	return &s, decode(got, &s)
}

// forsaken says whether a sidecar of ours that is not wanted is to go.
func (r *run) forsaken(w *wanted, s *api.AgentService, settled func(service string) bool) bool {
	app := r.world.current().local[s.Proxy.DestinationServiceID]
	if app == nil || app.Connect != nil && app.Connect.Native {
		return true
	}
	if name := s.Proxy.DestinationServiceName; !slices.Contains(w.needed, name) {
		return settled(name)
	}
	return !r.waiting(w, s.ID)
}

// waiting says whether a sidecar of ours is not wanted only because its service has no certificate yet, as after a restart.
func (r *run) waiting(w *wanted, id string) bool {
	d := r.world.current()
	for _, app := range unserved(&d, w.needed) {
		if app.ID+sidecarSuffix == id {
			return true
		}
	}
	return false
}

// nodeProxiesTopic says which ports of which nodes nodeproxies serve.
func (r *run) nodeProxiesTopic() topic {
	return topic{what: "other node proxies", every: 100 * time.Millisecond, ask: fixed("/v1/catalog/service/" + proxyService), apply: func(a *answer) error {
		var list []*api.CatalogService
		if err := decode(a, &list); err != nil {
			return err
		}
		proxies := make(map[string][]Ports)
		for _, s := range list {
			if s.ServiceMeta[managedBy] == ours {
				proxies[s.Node] = append(proxies[s.Node], servedPorts(s.ServiceMeta)...)
			}
		}
		r.world.update(func(d *data) bool {
			d.proxies = proxies
			return true
		})
		return nil
	}}
}

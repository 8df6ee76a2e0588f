package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// The filters that leave mesh gateways, of services' instances and of services.
const (
	isMeshGateway   = `Service.Kind == "mesh-gateway"`
	areMeshGateways = `ServiceKind == "mesh-gateway"`
)

// gatewaysTo are the questions for the mesh gateways on the way to another datacenter or cluster: this one's, and its own,
// which those of a peer are without asking.
func (d *data) gatewaysTo(e endpoints) []endpoints {
	if e.datacenter == "" && e.peer == "" {
		return nil
	}
	var all []endpoints
	for _, of := range slices.Compact([]string{"", e.datacenter}) {
		for _, name := range d.gateways[of] {
			all = append(all, endpoints{service: name, datacenter: of, gateways: true})
		}
	}
	return all
}

// throughGateways says whether anything on this node, or of what it calls, is to go through mesh gateways.
func (d *data) throughGateways() bool {
	is := func(mode api.MeshGatewayMode) bool { return catalog.GatewayMode(mode).Through() }
	for _, s := range d.local {
		if s.Proxy != nil && (is(s.Proxy.MeshGateway.Mode) || slices.ContainsFunc(s.Proxy.Upstreams, func(u api.Upstream) bool { return is(u.MeshGateway.Mode) })) {
			return true
		}
	}
	if d.entries == nil {
		return false
	}
	for _, entry := range d.entries.byKind[api.ProxyDefaults] {
		if e, ok := entry.(*api.ProxyConfigEntry); ok && is(e.MeshGateway.Mode) {
			return true
		}
	}
	for _, entry := range d.entries.byKind[api.ServiceDefaults] {
		e, ok := entry.(*api.ServiceConfigEntry)
		if !ok {
			continue
		}
		calls := []*api.UpstreamConfig{}
		if e.UpstreamConfig != nil {
			calls = append(calls, e.UpstreamConfig.Overrides...)
			if u := e.UpstreamConfig.Defaults; u != nil {
				calls = append(calls, u)
			}
		}
		if is(e.MeshGateway.Mode) || slices.ContainsFunc(calls, func(u *api.UpstreamConfig) bool { return is(u.MeshGateway.Mode) }) {
			return true
		}
	}
	return false
}

// gatewayDatacenters are those whose mesh gateways calls may go through.
func (d *data) gatewayDatacenters() []string {
	through := d.throughGateways()
	found := make(map[string]bool)
	for _, c := range d.chains {
		for _, t := range c.targets {
			if (t.datacenter != "" || t.peer != "") && (through || t.gateway.Through()) {
				found[""], found[t.datacenter] = true, true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// findGateways reads the mesh gateways on the way to the targets of a new chain, so that there is a way when it counts. What
// cannot be read is a fault of its own.
func (r *run) findGateways(ctx context.Context, c *chain) {
	d := r.world.current()
	d.chains = map[chainKey]*chain{{}: c}
	for _, of := range d.gatewayDatacenters() {
		if _, known := d.gateways[of]; !known {
			_ = r.readGatewaysOf(ctx, of)
		}
	}
}

// readGateways reads which services are mesh gateways, again where it is known, and the instances of those that are new.
func (r *run) readGateways(ctx context.Context) error {
	var errs []error
	d := r.world.current()
	for _, of := range d.gatewayDatacenters() {
		errs = append(errs, r.readGatewaysOf(ctx, of))
	}
	return errors.Join(errs...)
}

func (r *run) readGatewaysOf(ctx context.Context, datacenter string) error {
	params := url.Values{"filter": {areMeshGateways}}
	if datacenter != "" {
		params.Set("dc", datacenter)
	}
	a, err := r.ask.request(ctx, question{path: "/v1/catalog/services", params: params})
	if err != nil {
		return fmt.Errorf("the mesh gateways of datacenter %q: %w", datacenter, err)
	}
	var tags map[string][]string
	if err := decode(a, &tags); err != nil {
		return err
	}
	names := slices.Sorted(maps.Keys(tags))
	r.world.update(func(d *data) bool {
		d.gateways = maps.Clone(d.gateways)
		if d.gateways == nil {
			d.gateways = make(map[string][]string)
		}
		d.gateways[datacenter] = names
		return false
	})
	d := r.world.current()
	for _, name := range names {
		if e := (endpoints{service: name, datacenter: datacenter, gateways: true}); d.targets[e] == nil {
			r.readTarget(ctx, e)
		}
	}
	return nil
}

// gateways are the mesh gateways that are known, by datacenter.
func (b *builder) gateways() map[string][]*catalog.Instance {
	all := make(map[string][]*catalog.Instance)
	for datacenter, names := range b.data.gateways {
		for _, name := range names {
			of := endpoints{service: name, datacenter: datacenter, gateways: true}
			known := b.data.targets[of]
			if known == nil {
				continue
			}
			for _, e := range known.instances {
				if e.gateway {
					all[datacenter] = append(all[datacenter], b.abroad(of, e))
				}
			}
		}
	}
	return all
}

// gatewayMode is how a service reaches what is in other datacenters, where nothing is said of what it calls. Before
// UpstreamConfig.Defaults goes its registration, after it its service-defaults and proxy-defaults (ResolveServiceConfig in
// agent/configentry of Consul).
func (b *builder) gatewayMode(service string, defaults catalog.CallConfig) catalog.GatewayMode {
	var registered api.MeshGatewayMode
	for _, id := range slices.Sorted(maps.Keys(b.data.local)) {
		if p := b.data.local[id].Proxy; p != nil && p.DestinationServiceName == service {
			registered = cmp.Or(registered, p.MeshGateway.Mode)
		}
	}
	var own api.MeshGatewayMode
	if d := b.defaults[service]; d != nil {
		own = d.MeshGateway.Mode
	}
	return cmp.Or(catalog.GatewayMode(registered), defaults.Gateway, catalog.GatewayMode(cmp.Or(own, b.proxy.MeshGateway.Mode)))
}

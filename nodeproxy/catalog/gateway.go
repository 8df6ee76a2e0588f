package catalog

import (
	"cmp"
	"fmt"
	"slices"
)

// RouteOf is where the calls of a service go: what is in another datacenter is reached through mesh gateways where the
// caller's configuration, or else the target's, says so. A caller "" has no configuration.
func (s *Snapshot) RouteOf(caller string, to Destination) *Route {
	route := to.Route()
	isQuery := to.Upstream != nil && to.Upstream.Query // of which only addresses are known: no gateways, as with Consul's proxies
	if isQuery || !slices.ContainsFunc(route.Targets, (*Target).isAway) {
		return route
	}
	mode := s.Call(caller, to).Gateway
	own := &Route{Balance: route.Balance}
	for _, t := range route.Targets {
		own.Targets = append(own.Targets, s.reach(t, cmp.Or(mode, t.Gateway)))
	}
	return own
}

// reach is t as it is reached in a mode. A gateway counts as healthy only while t itself has a healthy instance: what is
// behind it is not seen otherwise.
func (s *Snapshot) reach(t *Target, mode GatewayMode) *Target {
	if !t.isAway() || t.Unreachable != "" {
		return t
	}
	reached := new(*t)
	reached.Gateway = mode
	switch {
	case t.Peered != nil && mode != GatewayLocal: // its instances are the peer's gateways
		reached.Gateway = GatewayRemote
		return reached
	case !mode.Through():
		return reached
	}
	of := ""
	if mode == GatewayRemote {
		of = t.Datacenter
	}
	reached.Instances = nil
	alive := slices.ContainsFunc(t.Instances, func(inst *Instance) bool { return inst.Healthy })
	for _, gw := range s.Gateways[of] {
		reached.Instances = append(reached.Instances, &Instance{
			ID: gw.ID, Service: t.Service, Node: gw.Node, Datacenter: t.Datacenter, Peer: t.peer(), Healthy: gw.Healthy && alive, Mesh: gw.Mesh, Gateway: true,
		})
	}
	if len(reached.Instances) == 0 {
		reached.Unreachable = fmt.Sprintf("%s is to be reached through mesh gateways (mode %q), and datacenter %q has none: register one there, or set MeshGateway.Mode to \"none\" where the datacenters reach each other",
			t, mode, cmp.Or(of, s.Datacenter))
	}
	return reached
}

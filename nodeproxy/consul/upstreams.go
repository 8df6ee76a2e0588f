package consul

import (
	"cmp"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// metaUpstreams is the key of service meta that names upstreams, as "db:9191,cache:9192".
const metaUpstreams = "nodeproxy-upstreams"

// upstream is one that a registration of this node declares.
type upstream struct {
	api.Upstream
	owner string // the ID of the registration
}

// chain names up's discovery chain, or prepared query.
func (up *upstream) chain(d *data) chainKey {
	k := chainKey{service: up.DestinationName, datacenter: up.Datacenter}
	if d.agent != nil && k.datacenter == d.agent.datacenter {
		k.datacenter = ""
	}
	return k
}

// declared lists the upstreams of all registrations of this node, in order of their IDs, those of a sidecar's own before
// those of meta.
func (d *data) declared() []upstream {
	var all []upstream
	for _, id := range slices.Sorted(maps.Keys(d.local)) {
		all = append(all, upstreamsOf(d.local[id])...)
	}
	return all
}

// upstreamsOf lists what one registration declares, as it stands there.
func upstreamsOf(s *api.AgentService) []upstream {
	var all []upstream
	if s.Proxy != nil && s.Kind == api.ServiceKindConnectProxy && !isOurs(s) {
		for _, up := range s.Proxy.Upstreams {
			if !up.CentrallyConfigured {
				all = append(all, upstream{up, s.ID})
			}
		}
	}
	for text := range strings.SplitSeq(s.Meta[metaUpstreams], ",") {
		if text = strings.TrimSpace(text); text == "" || isOurs(s) {
			continue
		}
		name, at, _ := strings.Cut(text, ":")
		up := api.Upstream{DestinationName: name}
		if strings.HasPrefix(at, "/") {
			up.LocalBindSocketPath = at
		} else {
			n, _ := strconv.ParseUint(at, 10, 16) // 0 is refused like one that is missing
			up.LocalBindPort = int(n)
		}
		all = append(all, upstream{up, s.ID})
	}
	return all
}

// resolved are the services that chains and queries lead to.
func (d *data) resolved() map[string]bool {
	names := make(map[string]bool)
	for _, c := range d.chains {
		for _, t := range c.targets {
			if t.unreachable == "" && t.peer == "" {
				names[t.service] = true
			}
		}
	}
	for _, res := range d.queries {
		names[res.of.service] = true
	}
	delete(names, "")
	return names
}

// bound is a place where an upstream is bound: two in one network namespace cannot be.
type bound struct {
	host netip.Addr
	at   netip.AddrPort

	instance, socket string // or, of one instance, the path of a unix socket
}

// addUpstreams gives the instances of this node the upstreams that their registrations declare. It comes last, when all
// services are there.
func (b *builder) addUpstreams() {
	if len(b.data.declared()) == 0 {
		return
	}
	taken := make(map[bound]upstream)
	for _, name := range slices.Sorted(maps.Keys(b.services)) {
		for _, inst := range b.services[name].Instances {
			if !inst.Local || inst.Native {
				continue
			}
			for _, s := range b.registrations(inst) {
				for _, up := range upstreamsOf(s) {
					if made := b.upstream(name, &up); made != nil && b.bind(inst, made, up, taken) {
						b.upstreams[inst.ID] = append(b.upstreams[inst.ID], made)
					}
				}
			}
		}
	}
}

// registrations are those that inst was made of: its sidecar's, then its own.
func (b *builder) registrations(inst *catalog.Instance) []*api.AgentService {
	var all []*api.AgentService
	for _, id := range slices.Sorted(maps.Keys(b.data.local)) {
		s := b.data.local[id]
		isSidecar := s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && s.Proxy.DestinationServiceName == inst.Service &&
			(s.Proxy.DestinationServiceID == inst.ID || s.ID == inst.ID)
		switch {
		case isSidecar:
			all = append([]*api.AgentService{s}, all...)
		case s.ID == inst.ID && s.Kind == api.ServiceKindTypical:
			all = append(all, s)
		}
	}
	return all
}

// bind says whether nothing else is bound where made is. The first keeps the place.
func (b *builder) bind(inst *catalog.Instance, made *catalog.Upstream, up upstream, taken map[bound]upstream) bool {
	at := bound{host: inst.Address.Addr(), at: made.At}
	if made.Socket != "" {
		at = bound{instance: inst.ID, socket: made.Socket}
	}
	if first, twice := taken[at]; twice {
		if first.DestinationName != up.DestinationName || first.DestinationPeer != up.DestinationPeer || first.Datacenter != up.Datacenter || first.DestinationType != up.DestinationType {
			b.problem(inst.Service, "refused", "upstream %q of %q is at %s, where upstream %q of %q is already: give it another place",
				up.DestinationName, up.owner, cmp.Or(made.Socket, made.At.String()), first.DestinationName, first.owner)
		}
		return false
	}
	taken[at] = up
	return true
}

// maxSocketName is how long the last part of a socket's path may be: what is bound is that, and a descriptor.
const maxSocketName = 80

// isMode says whether text is "" or permissions in octal.
func isMode(text string) bool {
	mode, err := strconv.ParseUint(text, 8, 32)
	return text == "" || err == nil && mode > 0 && mode <= 0o777
}

// upstream is up as the proxy uses it, or nil where it is refused.
func (b *builder) upstream(service string, up *upstream) *catalog.Upstream {
	refuse := func(format string, args ...any) *catalog.Upstream {
		b.problem(service, "refused", "upstream %q of %q is refused: "+format, append([]any{up.DestinationName, up.owner}, args...)...)
		return nil
	}
	address := cmp.Or(up.LocalBindAddress, "127.0.0.1")
	ip, err := netip.ParseAddr(address)
	switch {
	case up.LocalBindSocketPath != "" && (!path.IsAbs(up.LocalBindSocketPath) || path.Clean(up.LocalBindSocketPath) != up.LocalBindSocketPath || len(path.Base(up.LocalBindSocketPath)) > maxSocketName):
		return refuse("local_bind_socket_path %q is not absolute and clean, or its last part is longer than %d bytes", up.LocalBindSocketPath, maxSocketName)
	case up.LocalBindSocketPath != "" && up.LocalBindPort != 0:
		return refuse("local_bind_socket_path does not go with local_bind_port: remove one of them")
	case !isMode(up.LocalBindSocketMode):
		return refuse("local_bind_socket_mode %q is no mode, as \"0660\"", up.LocalBindSocketMode)
	case up.DestinationName == "" || up.LocalBindSocketPath == "" && (up.LocalBindPort < 1 || up.LocalBindPort > 65535):
		return refuse("it needs a destination and a port, as in \"db:9191\"")
	case err != nil || ip.Zone() != "" || ip.IsMulticast() || b.isVirtual(ip.Unmap()):
		return refuse("local_bind_address %q is not an address of one host", address)
	case !isDefault(up.DestinationNamespace) || !isDefault(up.DestinationPartition):
		return refuse("it is in namespace %q and partition %q: those of Consul Enterprise are untested and refused", up.DestinationNamespace, up.DestinationPartition)
	}
	made := &catalog.Upstream{Name: up.DestinationName, Config: b.upstreamConfig(service, up)}
	made.Config.Gateway = cmp.Or(catalog.GatewayMode(up.MeshGateway.Mode), made.Config.Gateway)
	if ip = ip.Unmap(); ip.IsUnspecified() { // every address of the host: the one that applications dial is loopback's
		ip = map[bool]netip.Addr{true: netip.AddrFrom4([4]byte{127, 0, 0, 1}), false: netip.IPv6Loopback()}[ip.Is4()]
	}
	if made.Socket = up.LocalBindSocketPath; made.Socket == "" {
		made.At = netip.AddrPortFrom(ip, uint16(up.LocalBindPort))
	} else {
		mode, _ := strconv.ParseUint(up.LocalBindSocketMode, 8, 32)
		made.SocketMode = uint32(mode)
	}
	switch up.DestinationType {
	case api.UpstreamDestTypeService, "":
		made.Route = *b.upstreamRoute(service, up)
	case api.UpstreamDestTypePreparedQuery:
		made.Query, made.Route = true, *b.queryRoute(up)
	default:
		return refuse("destination_type %q is neither \"service\" nor \"prepared_query\"", up.DestinationType)
	}
	return made
}

// upstreamRoute is where the calls of an upstream go that is a service.
func (b *builder) upstreamRoute(service string, up *upstream) *catalog.Route {
	if up.DestinationPeer != "" {
		return b.route(&chain{targets: []target{{endpoints: endpoints{service: up.DestinationName, peer: up.DestinationPeer}}}})
	}
	k := up.chain(b.data)
	if k.datacenter == "" {
		if svc := b.services[k.service]; svc != nil {
			return svc.Route()
		}
		b.problem(service, "unknown-service", "upstream %q of %q is no service of this datacenter: register it, or correct the name", up.DestinationName, up.owner)
		return &catalog.Route{Targets: []*catalog.Target{{Service: k.service}}}
	}
	fail := func(why string) *catalog.Route {
		b.problem(service, "unsupported", "upstream %q of %q can not be reached: %s", up.DestinationName, up.owner, why)
		return &catalog.Route{Targets: []*catalog.Target{{Service: k.service, Datacenter: k.datacenter, Unreachable: why}}}
	}
	c := b.data.chains[k]
	if c == nil {
		return fail(k.fault() + " could not be read yet: see the source in nodeproxy status")
	}
	for _, t := range c.targets {
		if t.unreachable != "" {
			fail(t.unreachable)
		}
	}
	return b.route(c)
}

// queryRoute is where the calls of an upstream go that is a prepared query: to what it answered last.
func (b *builder) queryRoute(up *upstream) *catalog.Route {
	res := b.data.queries[queryKey(up.chain(b.data))]
	if res == nil {
		return &catalog.Route{Targets: []*catalog.Target{{Service: up.DestinationName, Unreachable: queryKey{service: up.DestinationName}.fault() + " has not been answered yet: see the source in nodeproxy status"}}}
	}
	return &catalog.Route{Targets: []*catalog.Target{b.target(res.of, res.instances)}}
}

// The defaults of a PassiveHealthCheck that is written, as Envoy has them.
const (
	defaultFailures = 5
	defaultBase     = 30 * time.Second
	defaultInterval = 10 * time.Second
	defaultPercent  = 10
)

// callConfig reads what can be honoured of how a service calls another. ignore is told of the rest.
func callConfig(u *api.UpstreamConfig, ignore func(field string, isHTTP bool)) catalog.CallConfig {
	c := catalog.CallConfig{ConnectTimeout: time.Duration(max(u.ConnectTimeoutMs, 0)) * time.Millisecond, Gateway: catalog.GatewayMode(u.MeshGateway.Mode)}
	for field, set := range map[string]bool{
		"EnvoyListenerJSON": u.EnvoyListenerJSON != "", "EnvoyClusterJSON": u.EnvoyClusterJSON != "",
		"BalanceOutboundConnections": u.BalanceOutboundConnections != "",
	} {
		if set {
			ignore(field, false)
		}
	}
	if l := u.Limits; l != nil {
		if l.MaxConnections != nil {
			c.MaxConnections = max(*l.MaxConnections, 0)
		}
		for field, set := range map[string]bool{"Limits.MaxPendingRequests": l.MaxPendingRequests != nil, "Limits.MaxConcurrentRequests": l.MaxConcurrentRequests != nil} {
			if set {
				ignore(field, true)
			}
		}
	}
	if h := u.PassiveHealthCheck; h != nil {
		c.Ejection = ejection(h, ignore)
	}
	return c
}

func ejection(h *api.PassiveHealthCheck, ignore func(field string, isHTTP bool)) *catalog.Ejection {
	e := &catalog.Ejection{
		Failures: cmp.Or(int(h.MaxFailures), defaultFailures), Base: defaultBase, Interval: cmp.Or(max(h.Interval, 0), defaultInterval), Percent: defaultPercent,
	}
	if h.BaseEjectionTime != nil && *h.BaseEjectionTime > 0 {
		e.Base = *h.BaseEjectionTime
	}
	if h.MaxEjectionPercent != nil {
		e.Percent = int(min(*h.MaxEjectionPercent, 100))
	}
	for field, set := range map[string]bool{
		"EnforcingConsecutive5xx": h.EnforcingConsecutive5xx != nil && *h.EnforcingConsecutive5xx != 100, "Consecutive5xx": h.Consecutive5xx != nil,
		"EnforcingConsecutiveGatewayFailure": h.EnforcingConsecutiveGatewayFailure != nil, "ConsecutiveGatewayFailure": h.ConsecutiveGatewayFailure != nil,
	} {
		if set {
			ignore("PassiveHealthCheck."+field, true)
		}
	}
	return e
}

// calls is how the services that run here call others.
func (b *builder) calls() map[string]*catalog.Calls {
	all := make(map[string]*catalog.Calls)
	for _, name := range b.needed {
		c := &catalog.Calls{Overrides: make(map[string]catalog.CallConfig)}
		d := b.defaults[name]
		if d == nil || d.UpstreamConfig == nil {
			if c.Defaults.Gateway = b.gatewayMode(name, c.Defaults); c.Defaults.Gateway != catalog.GatewayUnset {
				all[name] = c
			}
			continue
		}
		read := func(u *api.UpstreamConfig) catalog.CallConfig {
			return callConfig(u, func(field string, isHTTP bool) {
				if isHTTP {
					b.problem(name, "l7-ignored", "UpstreamConfig %s %s of %s is ignored: it concerns HTTP", u.Name, field, what(d))
					return
				}
				b.problem(name, "unsupported", "UpstreamConfig %s %s of %s is not honoured", u.Name, field, what(d))
			})
		}
		if u := d.UpstreamConfig.Defaults; u != nil {
			c.Defaults = read(u)
		}
		c.Defaults.Gateway = b.gatewayMode(name, c.Defaults)
		for _, u := range d.UpstreamConfig.Overrides {
			if u.Peer == "" && isDefault(u.Namespace) && isDefault(u.Partition) {
				c.Overrides[u.Name] = read(u)
			}
		}
		all[name] = c
	}
	return all
}

// upstreamConfig reads the Config of a registration's upstream, whose keys are those of service-defaults in snake case.
func (b *builder) upstreamConfig(service string, up *upstream) catalog.CallConfig {
	ignore := func(field string, _ bool) {
		b.problem(service, "unsupported", "Config %s of upstream %q of %q is not honoured", field, up.DestinationName, up.owner)
	}
	var read api.UpstreamConfig
	var about mapstructure.Metadata
	decoder, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
		Result: &read, Metadata: &about, WeaklyTypedInput: true, DecodeHook: mapstructure.StringToTimeDurationHookFunc(),
		MatchName: func(key, field string) bool { return strings.EqualFold(strings.ReplaceAll(key, "_", ""), field) },
	})
	if err == nil {
		err = decoder.Decode(up.Config)
	}
	if err != nil {
		b.problem(service, "unsupported", "Config of upstream %q of %q is not honoured: %v", up.DestinationName, up.owner, err)
		return catalog.CallConfig{}
	}
	for _, key := range about.Unused {
		ignore(key, false)
	}
	return callConfig(&read, ignore)
}

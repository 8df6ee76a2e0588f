package consul

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// entries are the config entries of each kind. They are immutable.
type entries struct{ byKind map[string][]api.ConfigEntry }

// with is e, which may be nil, with the entries of one kind replaced.
func (e *entries) with(kind string, found []api.ConfigEntry) *entries {
	next := &entries{byKind: make(map[string][]api.ConfigEntry)}
	if e != nil {
		maps.Copy(next.byKind, e.byKind)
	}
	next.byKind[kind] = found
	return next
}

func (e *entries) complete() bool { return e != nil && len(e.byKind) == len(entryKinds) }

// settings are the entries as the builder asks them.
type settings struct {
	proxy     *api.ProxyConfigEntry // never nil
	mesh      *api.MeshConfigEntry  // never nil
	defaults  map[string]*api.ServiceConfigEntry
	resolvers map[string]*api.ServiceResolverConfigEntry
	ignoredL7 map[string][]string
	problems  []catalog.Problem
}

// The fields of an entry that are honoured everywhere, or only say where it comes from, and those that concern HTTP.
var (
	ofEveryEntry = []string{"Kind", "Name", "Namespace", "Partition", "Meta", "CreateIndex", "ModifyIndex", "Hash"}
	httpFields   = []string{"RateLimits", "LocalRequestTimeoutMs", "RequestTimeout", "MaxRequestHeadersKB", "HTTP"}
)

func (e *entries) settings() *settings {
	s := &settings{
		proxy: &api.ProxyConfigEntry{}, mesh: &api.MeshConfigEntry{},
		defaults:  make(map[string]*api.ServiceConfigEntry),
		resolvers: make(map[string]*api.ServiceResolverConfigEntry),
		ignoredL7: make(map[string][]string),
	}
	for _, kind := range entryKinds {
		for _, entry := range e.byKind[kind] {
			s.add(entry)
		}
	}
	return s
}

func (s *settings) add(entry api.ConfigEntry) {
	name := entry.GetName()
	switch e := entry.(type) {
	case *api.MeshConfigEntry:
		s.mesh = e
		s.unhonoured("", e, "AllowEnablingPermissiveMutualTLS", "TransparentProxy", "TLS")
	case *api.ProxyConfigEntry:
		s.proxy = e
		s.unhonoured("", e, "Mode", "MutualTLSMode", "MeshGateway", "Config")
		for key := range e.Config {
			if key != "protocol" {
				s.problem("", "unsupported", "Config %s of proxy-defaults is not honoured", key)
			}
		}
	case *api.ServiceConfigEntry:
		s.defaults[name] = e
		s.unhonoured(name, e, "Protocol", "Mode", "MaxInboundConnections", "MutualTLSMode", "MeshGateway", "UpstreamConfig")
	case *api.ServiceResolverConfigEntry:
		s.resolvers[name] = e
		s.unhonoured(name, e, "ConnectTimeout", "DefaultSubset", "Subsets", "Redirect", "Failover", "LoadBalancer")
	default: // routers and splitters
		s.ignoredL7[name] = append(s.ignoredL7[name], entry.GetKind())
		s.problem(name, "l7-ignored", "%s of %q is ignored: connections to %q are balanced over its instances; remove it, or accept that", entry.GetKind(), name, name)
	}
}

// unhonoured reports every field of entry that is set and not among honoured.
func (s *settings) unhonoured(service string, entry api.ConfigEntry, honoured ...string) {
	v := reflect.ValueOf(entry).Elem()
	for _, field := range reflect.VisibleFields(v.Type()) {
		if slices.Contains(honoured, field.Name) || slices.Contains(ofEveryEntry, field.Name) || v.FieldByIndex(field.Index).IsZero() {
			continue
		}
		if !slices.Contains(httpFields, field.Name) {
			s.problem(service, "unsupported", "%s of %s is not honoured", field.Name, what(entry))
			continue
		}
		s.problem(service, "l7-ignored", "%s of %s is ignored: it concerns HTTP", field.Name, what(entry))
		if service != "" {
			s.ignoredL7[service] = append(s.ignoredL7[service], entry.GetKind()+" "+field.Name)
		}
	}
}

func what(entry api.ConfigEntry) string {
	return fmt.Sprintf("%s %q", entry.GetKind(), entry.GetName())
}

func (s *settings) problem(service, kind, format string, args ...any) {
	s.problems = append(s.problems, catalog.Problem{Service: service, Kind: kind, Text: fmt.Sprintf(format, args...)})
}

// tls is what the mesh entry asks of TLS.
func (s *settings) tls() (limits catalog.TLS) {
	if s.mesh.TLS == nil {
		return limits
	}
	read := func(direction string, d *api.MeshDirectionalTLSConfig) (l catalog.TLSLimits) {
		if d == nil {
			return l
		}
		l, ignored := catalog.ParseTLSLimits(d.TLSMinVersion, d.TLSMaxVersion, d.CipherSuites)
		for _, text := range ignored {
			s.problem("", "unsupported", "TLS.%s of the mesh entry: %s", direction, text)
		}
		return l
	}
	limits.Incoming, limits.Outgoing = read("Incoming", s.mesh.TLS.Incoming), read("Outgoing", s.mesh.TLS.Outgoing)
	return limits
}

// protocol is the service's, by service-defaults or by proxy-defaults.
func (s *settings) protocol(service string) string {
	if d := s.defaults[service]; d != nil && d.Protocol != "" {
		return strings.ToLower(d.Protocol)
	}
	if p, ok := s.proxy.Config["protocol"].(string); ok && p != "" {
		return strings.ToLower(p)
	}
	return "tcp"
}

func isHTTP(protocol string) bool {
	return protocol == "http" || protocol == "http2" || protocol == "grpc"
}

// permissive is the service's MutualTLSMode, or fallback where none is set.
func (s *settings) permissive(service string, fallback bool) bool {
	mode := s.proxy.MutualTLSMode
	if d := s.defaults[service]; d != nil && d.MutualTLSMode != api.MutualTLSModeDefault {
		mode = d.MutualTLSMode
	}
	switch {
	case mode == api.MutualTLSModeDefault:
		return fallback
	case !s.mesh.AllowEnablingPermissiveMutualTLS:
		return false
	}
	return mode == api.MutualTLSModePermissive
}

package file

import (
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/hclfile"
	"nodeproxy.io/nodeproxy/resolver"
	"nodeproxy.io/policy"
)

// entries are the config entries that this node understands, by name where there can be several.
type entries struct {
	defaults   map[string]*api.ServiceConfigEntry
	resolvers  map[string]*api.ServiceResolverConfigEntry
	chains     map[string]*resolver.Chain // of those
	proxy      *api.ProxyConfigEntry
	mesh       *meshEntry
	tls        catalog.TLS
	ignoredL7  map[string][]string // by service
	intentions []policy.Intention

	permissive []hclfile.Pos // where MutualTLSMode = "permissive" is written
}

func newEntries() entries {
	return entries{
		defaults:  make(map[string]*api.ServiceConfigEntry),
		resolvers: make(map[string]*api.ServiceResolverConfigEntry),
		chains:    make(map[string]*resolver.Chain),
		ignoredL7: make(map[string][]string),
	}
}

// meshEntry adds to the library's struct the two keys that all others have.
type meshEntry struct {
	Kind, Name string
	api.MeshConfigEntry
}

// intentionsEntry is the library's struct with the place of each source.
type intentionsEntry struct {
	Kind, Name, Namespace, Partition string
	Sources                          []*intentionSource
	JWT                              *api.IntentionJWTRequirement
	Meta                             map[string]string
	CreateIndex, ModifyIndex         uint64
}

type intentionSource struct {
	api.SourceIntention
	Where hclfile.Block
}

// The fields of each kind that are honoured, or only say where the entry comes from. All others that are set are reported; those in
// httpFields as HTTP-level.
var (
	everyEntry = []string{"Kind", "Name", "Namespace", "Partition", "Meta", "CreateIndex", "ModifyIndex", "MeshConfigEntry"}
	httpFields = []string{"RateLimits", "LocalRequestTimeoutMs", "RequestTimeout", "MaxRequestHeadersKB", "HTTP"}
)

// readConfig reads config/* of the mesh directory: one config entry in each file, as `consul config write` takes them.
func (r *reader) readConfig() {
	r.files(filepath.Join(r.dir, configDir), (*reader).readEntry)
	r.compileChains()
	e := &r.mesh.entries
	if e.mesh == nil || !e.mesh.AllowEnablingPermissiveMutualTLS {
		for _, pos := range e.permissive {
			r.fail(pos.Errorf("MutualTLSMode \"permissive\" needs a mesh entry with AllowEnablingPermissiveMutualTLS = true"))
		}
	}
}

func (r *reader) readEntry(f *hclfile.File) {
	kind, name := f.String("Kind"), f.String("Name")
	if kind == "" {
		r.fail(f.Pos("Kind").Errorf("has no Kind: write Kind = \"service-intentions\", or another config entry's; one entry in each file"))
		return
	}
	if kind == api.MeshConfig && name == "" {
		name = api.MeshConfigMesh
	}
	r.byKind[[2]string{kind, name}] = f.Pos("Kind")
	switch {
	case name == "":
		r.fail(f.Pos("Kind").Errorf("%s has no Name", kind))
		return
	case kind == api.ProxyDefaults && name != api.ProxyConfigGlobal, kind == api.MeshConfig && name != api.MeshConfigMesh:
		r.fail(f.Pos("Name").Errorf("%s %q: the only one is called %q", kind, name, map[string]string{api.ProxyDefaults: api.ProxyConfigGlobal, api.MeshConfig: api.MeshConfigMesh}[kind]))
		return
	}
	r.decodeEntry(f, kind, name)
}

func (r *reader) decodeEntry(f *hclfile.File, kind, name string) {
	switch kind {
	case api.ServiceIntentions:
		if entry := (&intentionsEntry{}); r.decode(f, entry) {
			r.addIntentions(f, entry)
		}
	case api.ServiceDefaults:
		if entry := (&api.ServiceConfigEntry{}); r.decode(f, entry) {
			r.addDefaults(f, entry)
		}
	case api.ServiceResolver:
		if entry := (&api.ServiceResolverConfigEntry{}); r.decode(f, entry) {
			r.addResolver(f, entry)
		}
	case api.ProxyDefaults:
		if entry := (&api.ProxyConfigEntry{}); r.decode(f, entry) {
			r.addProxyDefaults(f, entry)
		}
	case api.MeshConfig:
		if entry := (&meshEntry{}); r.decode(f, entry) {
			r.addMesh(f, entry)
		}
	case api.ServiceSplitter:
		if r.decode(f, &api.ServiceSplitterConfigEntry{}) {
			r.ignoreL7(f, name, kind)
		}
	case api.ServiceRouter:
		if r.decode(f, &api.ServiceRouterConfigEntry{}) {
			r.ignoreL7(f, name, kind)
		}
	default:
		r.otherKind(f, kind, name)
	}
}

func (r *reader) addDefaults(f *hclfile.File, entry *api.ServiceConfigEntry) {
	r.unhonoured(f, entry.Name, entry, "Protocol", "MaxInboundConnections", "MutualTLSMode", transparent(entry.Mode))
	r.checkMode(f, entry.MutualTLSMode)
	if entry.MaxInboundConnections < 0 {
		r.fail(f.Pos("MaxInboundConnections").Errorf("MaxInboundConnections is negative"))
	}
	r.mesh.entries.defaults[entry.Name] = entry
}

func (r *reader) addResolver(f *hclfile.File, entry *api.ServiceResolverConfigEntry) {
	r.unhonoured(f, entry.Name, entry, "ConnectTimeout", "DefaultSubset", "Subsets", "Redirect", "Failover", "LoadBalancer", "PrioritizeByLocality")
	for _, wrong := range resolver.Check(entry, r.datacenter) {
		r.fail(f.Pos(wrong.Path...).Errorf("%w", wrong.Err))
	}
	r.mesh.entries.resolvers[entry.Name] = entry
}

// compileChains makes of all service-resolvers together where calls go.
func (r *reader) compileChains() {
	e := &r.mesh.entries
	for _, name := range slices.Sorted(maps.Keys(e.resolvers)) {
		pos := r.byKind[[2]string{api.ServiceResolver, name}]
		chain, err := resolver.Compile(name, e.resolvers)
		if err != nil {
			r.fail(pos.Errorf("%w", err))
			continue
		}
		e.chains[name] = chain
		for _, text := range chain.Ignored {
			r.problem(name, "unsupported", "service-resolver of %q: %s (%s)", name, text, pos)
		}
	}
}

func (r *reader) addProxyDefaults(f *hclfile.File, entry *api.ProxyConfigEntry) {
	r.unhonoured(f, "", entry, "MutualTLSMode", "Config", transparent(entry.Mode))
	r.checkMode(f, entry.MutualTLSMode)
	for key, value := range entry.Config {
		if key != "protocol" {
			r.problem("", "unsupported", "Config %s of proxy-defaults is not honoured (%s)", key, f.Pos("Config", key))
		} else if _, ok := value.(string); !ok {
			r.fail(f.Pos("Config", key).Errorf("protocol is not a string"))
		}
	}
	r.mesh.entries.proxy = entry
}

func (r *reader) addMesh(f *hclfile.File, entry *meshEntry) {
	r.unhonoured(f, "", entry, "AllowEnablingPermissiveMutualTLS", "TransparentProxy", "TLS")
	r.mesh.entries.mesh = entry
	if entry.TLS == nil {
		return
	}
	read := func(direction string, d *api.MeshDirectionalTLSConfig) (l catalog.TLSLimits) {
		if d == nil {
			return l
		}
		l, ignored := catalog.ParseTLSLimits(d.TLSMinVersion, d.TLSMaxVersion, d.CipherSuites)
		for _, text := range ignored {
			r.problem("", "unsupported", "TLS.%s of mesh: %s (%s)", direction, text, f.Pos("TLS", direction))
		}
		return l
	}
	r.mesh.entries.tls = catalog.TLS{Incoming: read("Incoming", entry.TLS.Incoming), Outgoing: read("Outgoing", entry.TLS.Outgoing)}
}

func (r *reader) ignoreL7(f *hclfile.File, name, kind string) {
	r.mesh.entries.ignoredL7[name] = append(r.mesh.entries.ignoredL7[name], kind)
	r.problem(name, "l7-ignored", "%s of %q is ignored: connections to %q are balanced over its instances; remove it, or accept that (%s)", kind, name, name, f.Pos("Kind"))
}

func (r *reader) otherKind(f *hclfile.File, kind, name string) {
	entry, err := api.MakeConfigEntry(kind, name)
	if err != nil {
		r.fail(f.Pos("Kind").Errorf("Kind %q is none of Consul's config entries", kind))
		return
	}
	if r.decode(f, entry) {
		r.problem("", "unsupported", "%s %q is ignored: this node has no use for that kind (%s)", kind, name, f.Pos("Kind"))
	}
}

// decode reads f into entry, whose keys are the only ones allowed, and refuses other namespaces and partitions.
func (r *reader) decode(f *hclfile.File, entry any) bool {
	if err := f.Decode(entry); err != nil {
		r.fail(err)
		return false
	}
	v := reflect.ValueOf(entry).Elem()
	for _, key := range []string{"Namespace", "Partition"} {
		if field := v.FieldByName(key); field.IsValid() && field.String() != "" && field.String() != "default" {
			r.fail(f.Pos(key).Errorf("%s %q: only \"default\" exists here", key, field.String()))
			return false
		}
	}
	return true
}

// unhonoured reports every field of entry that is set and not among honoured.
func (r *reader) unhonoured(f *hclfile.File, service string, entry any, honoured ...string) {
	v := reflect.ValueOf(entry).Elem()
	for _, field := range reflect.VisibleFields(v.Type()) {
		if slices.Contains(honoured, field.Name) || slices.Contains(everyEntry, field.Name) || v.FieldByIndex(field.Index).IsZero() {
			continue
		}
		kind := v.FieldByName("Kind").String()
		if !slices.Contains(httpFields, field.Name) {
			r.problem(service, "unsupported", "%s of %s is not honoured (%s)", field.Name, kind, f.Pos(field.Name))
			continue
		}
		r.problem(service, "l7-ignored", "%s of %s is ignored: it concerns HTTP (%s)", field.Name, kind, f.Pos(field.Name))
		if service != "" {
			r.mesh.entries.ignoredL7[service] = append(r.mesh.entries.ignoredL7[service], kind+" "+field.Name)
		}
	}
}

// transparent is the name of the field that holds mode where it asks for what every service gets anyway.
func transparent(mode api.ProxyMode) string {
	if mode == api.ProxyModeTransparent {
		return "Mode"
	}
	return ""
}

func (r *reader) checkMode(f *hclfile.File, mode api.MutualTLSMode) {
	pos := f.Pos("MutualTLSMode")
	switch mode {
	case api.MutualTLSModeDefault, api.MutualTLSModeStrict:
	case api.MutualTLSModePermissive:
		r.mesh.entries.permissive = append(r.mesh.entries.permissive, pos)
	default:
		r.fail(pos.Errorf("MutualTLSMode %q is neither \"strict\" nor \"permissive\"", mode))
	}
}

// addIntentions files the intentions of one entry, whose name is their destination.
func (r *reader) addIntentions(f *hclfile.File, entry *intentionsEntry) {
	if len(entry.Sources) == 0 {
		r.fail(f.Pos("Name").Errorf("service-intentions %q has no Sources", entry.Name))
	}
	if entry.JWT != nil {
		r.problem(entry.Name, "l7-ignored", "the JWT of the intentions for %q cannot be checked: they deny where %q speaks HTTP, and hold without the JWT where it does not (%s)",
			entry.Name, entry.Name, f.Pos("JWT"))
		r.mesh.entries.ignoredL7[entry.Name] = append(r.mesh.entries.ignoredL7[entry.Name], "service-intentions JWT")
	}
	for _, source := range entry.Sources {
		pos := source.Where.Pos
		in := policy.Intention{
			Source: source.Name, Destination: entry.Name, Origin: shortPos(pos),
			SourceNamespace: source.Namespace, SourcePartition: source.Partition, SourcePeer: source.Peer,
			Permissions: len(source.Permissions) > 0, JWT: entry.JWT != nil,
		}
		r.checkSource(pos, &source.SourceIntention)
		switch {
		case source.Action == api.IntentionActionAllow:
			in.Action = policy.Allow
		case source.Action == api.IntentionActionDeny:
		case source.Action != "":
			r.fail(source.Where.Key("Action").Errorf("Action %q is neither \"allow\" nor \"deny\"", source.Action))
		case !in.Permissions:
			r.fail(pos.Errorf("source %q has no Action: write Action = \"allow\" or \"deny\"", source.Name))
		}
		if in.Permissions {
			if source.Action != "" {
				r.fail(pos.Errorf("source %q has both Action and Permissions: remove one of them", source.Name))
			}
			r.problem(entry.Name, "l7-ignored", "the Permissions of %s => %s cannot be checked at L4, so the pair is denied (%s)", source.Name, entry.Name, pos)
			r.mesh.entries.ignoredL7[entry.Name] = append(r.mesh.entries.ignoredL7[entry.Name], "service-intentions Permissions")
		}
		r.mesh.entries.intentions = append(r.mesh.entries.intentions, in)
		r.origins = append(r.origins, pos)
	}
}

func (r *reader) checkSource(pos hclfile.Pos, source *api.SourceIntention) {
	switch {
	case source.SamenessGroup != "":
		r.fail(pos.Errorf("source %q: sameness groups are not supported", source.Name))
	case source.Type != "" && source.Type != api.IntentionSourceConsul:
		r.fail(pos.Errorf("source %q: Type %q is not \"consul\"", source.Name, source.Type))
	case source.Peer != "":
		r.problem(source.Name, "unsupported", "source %q of peer %q: no peers are known here, so the intention matches nobody (%s)", source.Name, source.Peer, pos)
	case source.Namespace != "" && source.Namespace != "default", source.Partition != "" && source.Partition != "default":
		r.problem(source.Name, "unsupported", "source %q of namespace %q and partition %q: only \"default\" exists here, so the intention matches nobody (%s)",
			source.Name, source.Namespace, source.Partition, pos)
	}
}

// shortPos is pos as verdicts show it: without the directory.
func shortPos(pos hclfile.Pos) string {
	pos.File = filepath.Base(pos.File)
	return pos.String()
}

// strangers reports entries and intentions for services that no node defines. Consul allows them, and so a typing error
// in a name is never told otherwise.
func (r *reader) strangers() {
	defined := map[string]bool{policy.Wildcard: true}
	for _, inst := range r.mesh.instances {
		defined[inst.service] = true
	}
	first, more := make(map[string]string), make(map[string]int)
	names := func(what, name string, pos hclfile.Pos) {
		switch {
		case defined[name]:
		case first[name] == "":
			first[name] = fmt.Sprintf("%s names %q, which no node defines: check the name (%s)", what, name, pos)
		default:
			more[name]++
		}
	}
	for i, in := range r.mesh.entries.intentions {
		if in.SourcePeer == "" {
			names("intention "+in.Source+" => "+in.Destination, in.Source, r.origins[i])
		}
		names("intention "+in.Source+" => "+in.Destination, in.Destination, r.origins[i])
	}
	for name, chain := range r.mesh.entries.chains {
		defined[name] = defined[name] || chain.Targets[0].Service != name // it is another name for what it leads to
	}
	for _, name := range slices.Sorted(maps.Keys(r.mesh.entries.chains)) {
		for _, t := range r.mesh.entries.chains[name].Targets {
			if t.Service != name {
				names(api.ServiceResolver+" of "+name, t.Service, r.byKind[[2]string{api.ServiceResolver, name}])
			}
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(r.byKind), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		switch key[0] {
		case api.ServiceDefaults, api.ServiceResolver, api.ServiceRouter, api.ServiceSplitter:
			names(key[0], key[1], r.byKind[key])
		}
	}
	for name, text := range first {
		if n := more[name]; n > 0 {
			text += fmt.Sprintf(", and %d more", n)
		}
		r.problem(name, "unknown-service", "%s", text)
	}
}

// protocol is the service's, by service-defaults or by proxy-defaults.
func (e *entries) protocol(service string) string {
	if d := e.defaults[service]; d != nil && d.Protocol != "" {
		return d.Protocol
	}
	if e.proxy != nil {
		if p, ok := e.proxy.Config["protocol"].(string); ok && p != "" {
			return p
		}
	}
	return "tcp"
}

func isHTTP(protocol string) bool {
	switch strings.ToLower(protocol) {
	case "http", "http2", "grpc":
		return true
	}
	return false
}

// isPermissive is the service's MutualTLSMode, or fallback where none is set.
func (e *entries) isPermissive(service string, fallback bool) bool {
	mode := api.MutualTLSModeDefault
	if e.proxy != nil {
		mode = e.proxy.MutualTLSMode
	}
	if d := e.defaults[service]; d != nil && d.MutualTLSMode != api.MutualTLSModeDefault {
		mode = d.MutualTLSMode
	}
	if mode == api.MutualTLSModeDefault {
		return fallback
	}
	return mode == api.MutualTLSModePermissive
}

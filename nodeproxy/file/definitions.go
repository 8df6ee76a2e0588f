package file

import (
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/hclfile"
)

// definitions is one file below nodes/<node>/, in the format of Consul's service definitions.
type definitions struct {
	Service  []serviceDefinition
	Services []serviceDefinition
}

// serviceDefinition is Consul's. Its keys are matched as Consul matches them: snake case or CamelCase. The fields that
// ignored lists are read, and reported as ignored.
type serviceDefinition struct {
	ID         string
	Name       string
	Kind       string
	Address    string
	Port       uint16
	SocketPath string
	Tags       []string
	Meta       map[string]string
	Namespace  string
	Partition  string
	Connect    *struct {
		Native         bool
		SidecarService *sidecarDefinition
		Where          hclfile.Block
	}
	Check  []checkDefinition
	Checks []checkDefinition

	TaggedAddresses   any
	Weights           any
	EnableTagOverride any
	Token             any
	Locality          any
	Proxy             any

	Where hclfile.Block
}

type sidecarDefinition struct {
	Address string
	Port    uint16
	Proxy   *struct {
		LocalServiceAddress    string
		LocalServicePort       uint16
		LocalServiceSocketPath string

		Mode, Upstreams, Config, Expose, MeshGateway, TransparentProxy, AccessLogs, EnvoyExtensions any

		Where hclfile.Block
	}

	ID, Name, Kind, Tags, Meta, TaggedAddresses, EnableTagOverride, Token, Weights, Check, Checks, Locality any

	Where hclfile.Block
}

type checkDefinition struct {
	ID, CheckID, Name, Notes string

	TCP           string
	HTTP          string
	Method        string
	Header        map[string][]string
	TLSSkipVerify bool
	Interval      time.Duration
	Timeout       time.Duration
	Status        string // before the first result, "critical" unless it says "passing"

	SuccessBeforePassing   uint16
	FailuresBeforeCritical uint16

	Args, Script, Shell, DockerContainerID, GRPC, GRPCUseTLS, UDP, TTL, AliasService, AliasNode, H2PING, H2PingUseTLS, OSService,
	Body, DisableRedirects, TLSServerName, TCPUseTLS, OutputMaxSize, DeregisterCriticalServiceAfter, FailuresBeforeWarning any

	Where hclfile.Block
}

const (
	defaultInterval = 10 * time.Second
	defaultTimeout  = 10 * time.Second
	minInterval     = 100 * time.Millisecond
)

// instance is one service definition, checked. Its address is zero where the node's own is meant.
type instance struct {
	node, id, service string
	pos               hclfile.Pos

	address netip.Addr
	port    uint16 // 0: the application has no TCP port

	native      bool
	meshAddress netip.Addr // zero: the instance's
	meshPort    uint16     // 0: assigned

	delivery netip.AddrPort
	socket   string

	tags   []string
	meta   map[string]string
	checks []check
}

// listens says whether the instance can be connected to at all.
func (i *instance) listens() bool { return i.port != 0 || i.delivery.IsValid() || i.socket != "" }

// readNodes reads nodes/<node>/* of the mesh directory.
func (r *reader) readNodes() {
	for _, node := range r.list(filepath.Join(r.dir, nodesDir)) {
		path := filepath.Join(r.dir, nodesDir, node.Name())
		// Stat follows symbolic links, as configuration that is mounted into containers has them.
		if info, err := os.Stat(path); err != nil || !info.IsDir() {
			r.misplaced(path, node)
			continue
		}
		if err := checkName(node.Name()); err != nil {
			r.fail(hclfile.Pos{File: path}.Errorf("node name %w", err))
			continue
		}
		r.files(path, func(own *reader, f *hclfile.File) { own.readDefinitions(node.Name(), f) })
	}
}

// misplaced reports a definition in a directory that holds none.
func (r *reader) misplaced(path string, entry fs.DirEntry) {
	if isDefinition(entry.Name()) {
		r.problem("", "refused", "%s is not read: definitions belong in %s/<node>/, config entries in %s/", path, nodesDir, configDir)
	}
}

func (r *reader) readDefinitions(node string, f *hclfile.File) {
	var defs definitions
	if err := f.Decode(&defs); err != nil {
		r.fail(err)
		return
	}
	all := slices.Concat(defs.Service, defs.Services)
	if len(all) == 0 {
		r.fail(hclfile.Pos{File: f.Path()}.Errorf("defines no service: write service { name = \"…\"  port = … }, or remove the file"))
	}
	for i := range all {
		r.add(node, &all[i])
	}
}

// add checks one definition and files it.
func (r *reader) add(node string, def *serviceDefinition) {
	inst := &instance{node: node, id: def.ID, service: def.Name, port: def.Port, pos: def.Where.Pos, tags: def.Tags, meta: def.Meta}
	if inst.id == "" {
		inst.id = def.Name
	}
	if err := checkName(def.Name); err != nil {
		r.fail(def.Where.Key("name").Errorf("service name %w", err))
		return
	}
	if len(inst.id) > 255 || strings.ContainsFunc(inst.id, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		r.fail(def.Where.Key("id").Errorf("service id is longer than 255 bytes or holds spaces or control characters"))
	}
	r.checkKind(def)
	inst.address = r.address(def.Where.Key("address"), def.Address)
	r.addSocket(inst, def)
	r.addConnect(inst, def)
	r.ignored(def.Name, def.Where, reflect.ValueOf(*def))
	for _, c := range slices.Concat(def.Check, def.Checks) {
		r.addCheck(inst, c)
	}
	r.addInstance(inst)
}

func (r *reader) checkKind(def *serviceDefinition) {
	if def.Kind != "" && def.Kind != "typical" {
		r.fail(def.Where.Key("kind").Errorf("kind %q is not supported: a proxy is not defined by itself; write connect { sidecar_service { … } } in the service's own definition", def.Kind))
	}
	for key, value := range map[string]string{"namespace": def.Namespace, "partition": def.Partition} {
		if value != "" && value != "default" {
			r.fail(def.Where.Key(key).Errorf("%s %q: only \"default\" exists here", key, value))
		}
	}
}

func (r *reader) addSocket(inst *instance, def *serviceDefinition) {
	switch {
	case def.SocketPath == "":
	case def.Port != 0 || def.Address != "":
		r.fail(def.Where.Key("socket_path").Errorf("socket_path does not go with address or port: remove one of them"))
	default:
		inst.socket = r.path(def.Where.Key("socket_path"), def.SocketPath)
	}
}

func (r *reader) addConnect(inst *instance, def *serviceDefinition) {
	if def.Connect == nil {
		return
	}
	sidecar := def.Connect.SidecarService
	if def.Connect.Native {
		inst.native = true
		if sidecar != nil {
			r.fail(def.Connect.Where.Key("native").Errorf("native does not go with sidecar_service: remove one of them"))
		}
		if def.Port == 0 {
			r.fail(def.Connect.Where.Key("native").Errorf("a native service needs its port: its clients dial it"))
		}
	}
	if sidecar == nil {
		return
	}
	inst.meshAddress, inst.meshPort = r.address(sidecar.Where.Key("address"), sidecar.Address), sidecar.Port
	r.ignored(def.Name, sidecar.Where, reflect.ValueOf(*sidecar))
	if sidecar.Proxy != nil {
		r.addDelivery(inst, sidecar)
	}
}

func (r *reader) addDelivery(inst *instance, sidecar *sidecarDefinition) {
	proxy := sidecar.Proxy
	r.ignored(inst.service, proxy.Where, reflect.ValueOf(*proxy))
	if proxy.LocalServiceSocketPath != "" {
		inst.socket = r.path(proxy.Where.Key("local_service_socket_path"), proxy.LocalServiceSocketPath)
	}
	if proxy.LocalServiceAddress == "" && proxy.LocalServicePort == 0 {
		return
	}
	to, port := netip.AddrFrom4([4]byte{127, 0, 0, 1}), inst.port // Consul's defaults
	if proxy.LocalServiceAddress != "" {
		ip, err := netip.ParseAddr(proxy.LocalServiceAddress)
		if err != nil || ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" {
			r.fail(proxy.Where.Key("local_service_address").Errorf("local_service_address %q is not an IP address of the workload", proxy.LocalServiceAddress))
		}
		to = ip.Unmap()
	}
	if proxy.LocalServicePort != 0 {
		port = proxy.LocalServicePort
	}
	if port == 0 {
		r.fail(proxy.Where.Pos.Errorf("local_service_address has no port: set local_service_port, or the service's port"))
	}
	inst.delivery = netip.AddrPortFrom(to, port)
}

// address reads an address at which other nodes find an instance. "" is the zero Addr.
func (r *reader) address(pos hclfile.Pos, s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	ip, err := netip.ParseAddr(s)
	if err != nil {
		r.fail(pos.Errorf("address %q is not an IP address: names are not looked up", s))
		return netip.Addr{}
	}
	if err := checkAddress(ip); err != nil {
		r.fail(pos.Errorf("address %w", err))
	}
	return ip.Unmap()
}

// checkAddress says why other nodes could not reach ip.
func checkAddress(ip netip.Addr) error {
	ip = ip.Unmap()
	switch {
	case !ip.IsValid(), ip.IsUnspecified(), ip.IsMulticast(), ip.Zone() != "", ip.IsLinkLocalUnicast(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%s is not the address of one host", ip)
	case ip.IsLoopback():
		return fmt.Errorf("%s is a loopback address: other nodes and namespaces cannot reach it; for where the application listens, set local_service_address", ip)
	}
	return nil
}

func (r *reader) path(pos hclfile.Pos, path string) string {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		r.fail(pos.Errorf("socket path %q is not absolute and clean", path))
	}
	return path
}

// ignored reports the fields of type any in the struct v that are set: they are Consul's, and mean nothing here.
func (r *reader) ignored(service string, where hclfile.Block, v reflect.Value) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type == reflect.TypeFor[any]() && !v.Field(i).IsNil() {
			r.problem(service, "unsupported", "%s of service %q is ignored: %s", snake(f.Name), service, where.Key(f.Name))
		}
	}
}

// addCheck files a check of an instance. A check that this node could not run is an error: a service must not look
// healthy because nobody asked.
func (r *reader) addCheck(inst *instance, def checkDefinition) {
	v := reflect.ValueOf(def)
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.Type == reflect.TypeFor[any]() && !v.Field(i).IsNil() {
			r.fail(def.Where.Key(f.Name).Errorf("check with %s is not supported: use tcp or http, with interval and timeout", snake(f.Name)))
		}
	}
	c := check{
		name: def.Name, tcp: def.TCP, http: def.HTTP, method: def.Method, header: def.Header, skipVerify: def.TLSSkipVerify,
		interval: def.Interval, timeout: def.Timeout, passing: def.Status == "passing",
		successes: int(def.SuccessBeforePassing), failures: int(def.FailuresBeforeCritical),
	}
	if (c.tcp == "") == (c.http == "") {
		r.fail(def.Where.Pos.Errorf("a check has either tcp = \"host:port\" or http = \"http://…\""))
		return
	}
	if u, err := url.Parse(c.http); c.http != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		r.fail(def.Where.Key("http").Errorf("http %q is not a URL with http:// or https://", c.http))
	}
	if c.tcp != "" && !hasPort(c.tcp) {
		r.fail(def.Where.Key("tcp").Errorf("tcp %q is not host:port", c.tcp))
	}
	if def.Status != "" && def.Status != "passing" && def.Status != "critical" {
		r.fail(def.Where.Key("status").Errorf("status %q is neither \"passing\" nor \"critical\"", def.Status))
	}
	if c.interval == 0 {
		c.interval = defaultInterval
	}
	if c.timeout == 0 {
		c.timeout = defaultTimeout
	}
	if c.interval < minInterval || c.timeout <= 0 {
		r.fail(def.Where.Key("interval").Errorf("interval is less than %s, or timeout is negative", minInterval))
	}
	inst.checks = append(inst.checks, c)
}

// snake writes the name of a field as Consul's files have it: LocalServicePort is local_service_port.
func snake(name string) string {
	var b strings.Builder
	for i := range len(name) {
		upper := name[i] >= 'A' && name[i] <= 'Z'
		afterLower := i > 0 && (name[i-1] < 'A' || name[i-1] > 'Z')
		beforeLower := i+1 < len(name) && name[i+1] >= 'a' && name[i+1] <= 'z'
		if upper && i > 0 && (afterLower || beforeLower) {
			b.WriteByte('_')
		}
		b.WriteByte(name[i])
	}
	return strings.ToLower(b.String())
}

// checkName says why name can be no service or node: it goes into SPIFFE IDs, paths and metrics.
func checkName(name string) error {
	if name == "" {
		return fmt.Errorf("is not set")
	}
	bad := func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.'
	}
	if len(name) > 128 || strings.ContainsFunc(name, bad) || name[0] == '.' || name[0] == '-' {
		return fmt.Errorf("%.130q is not 1 to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit", name)
	}
	return nil
}

func (r *reader) problem(service, kind, format string, args ...any) {
	r.mesh.problems = append(r.mesh.problems, catalog.Problem{Service: service, Kind: kind, Text: fmt.Sprintf(format, args...)})
}

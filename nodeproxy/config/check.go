package config

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// The ports that Consul's agent gives to sidecars by itself.
const agentFirst, agentLast = 21000, 21255

const maxSocketPath = 107 // sun_path

// dnsLabel is what a node may be called: its name is a directory of pins and of definitions.
var dnsLabel = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)

// checker turns raw into a Config and collects all that is wrong.
type checker struct {
	raw  *raw
	keys *positions
	errs []error
}

// fail reports what is wrong with the key of that path.
func (c *checker) fail(path []string, format string, args ...any) {
	args = append([]any{strings.Join(path, ".")}, args...)
	c.errs = append(c.errs, c.keys.at(path...).Errorf("%s "+format, args...))
}

// key is the path of a key.
func key(path ...string) []string { return path }

func (c *checker) config() *Config {
	c.notLanded()
	r := c.raw
	return &Config{
		Node:         c.node(),
		Source:       c.source(),
		Consul:       c.consul(),
		Cgroups:      c.cgroups(),
		Systemd:      r.Workloads.Systemd.Enabled,
		Xattr:        r.Workloads.Xattr.Enabled,
		Pods:         c.kubernetes(),
		Containers:   c.containers(),
		Registered:   r.Workloads.Consul.Enabled,
		Inbound:      c.inbound(),
		VirtualCIDRs: c.networks(key("virtual_cidrs"), r.VirtualCIDRs),
		Tunnels:      r.Tunnels,
		Direct:       c.oneOf(key("same_node"), r.SameNode, "direct", "mtls") == "direct",
		PreferLocal:  r.PreferLocal,
		FailOpen:     c.oneOf(key("on_failure"), r.OnFailure, "closed", "open") == "open",
		Existing:     c.existing(),
		DNS:          r.DNS.Enabled,
		Limits:       c.limits(),
		Log:          c.log(),
		Admin:        c.admin(),
		State: State{
			Dir:  c.absolute(key("state", "dir"), r.State.Dir),
			Pins: c.absolute(key("state", "pins"), r.State.Pins),
		},
	}
}

// notLanded refuses what this version has no mechanism for.
func (c *checker) notLanded() {
	r := c.raw
	refuse := func(path []string, instead string) {
		c.fail(path, "is not supported by this version yet: %s", instead)
	}
	c.consulNotLanded(refuse)
	if r.Workloads.Consul.Enabled && c.rawConsul() == nil {
		c.fail(key("workloads", "consul"), `is for what is registered in Consul, and the source is "file": remove it`)
	}
	if len(r.VirtualCIDRs) > 0 && c.keys.has("source", "file") {
		c.fail(key("virtual_cidrs"), "is for addresses that Consul has, and the source is \"file\": remove it, or leave it empty")
	}
}

func (c *checker) consulNotLanded(refuse func([]string, string)) {
	r := c.rawConsul()
	if r == nil {
		return
	}
	for name, value := range map[string]string{"namespace": r.Namespace, "partition": r.Partition} {
		if value != "" && value != "default" {
			refuse(key("source", "consul", name), `remove it, or set it to "default"`)
		}
	}
}

func (c *checker) existing() *time.Duration {
	v := c.raw.ExistingConnection
	if v == "keep" {
		return nil
	}
	if v == "reset" {
		return new(time.Duration)
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		c.fail(key("existing_connections"), `is %q: it must be keep, reset or a duration above 0, as "10m"`, v)
	}
	return &d
}

func (c *checker) node() Node {
	r := c.raw.Node.fromEnvironment()
	if !dnsLabel.MatchString(r.Name) {
		c.fail(key("node", "name"), `is %q: set it to this node's name: letters, digits and hyphens, at most 63, as in node { name = "node-1" }`, r.Name)
	}
	address, err := netip.ParseAddr(r.Address)
	if err != nil || !address.Unmap().IsValid() || address.IsUnspecified() || address.IsMulticast() || address.Zone() != "" {
		c.fail(key("node", "address"), `is %q: set it to the IP address by which other nodes reach this one, as in node { address = "10.0.0.5" }`, r.Address)
	}
	return Node{Name: r.Name, Address: address.Unmap()}
}

func (c *checker) source() FileSource {
	hasFile, hasConsul := c.keys.has("source", "file"), c.keys.has("source", "consul")
	switch {
	case hasFile && hasConsul:
		c.errs = append(c.errs, c.keys.at("source", "file").Errorf("there is another source at %s: exactly one is needed, remove the other", c.keys.at("source", "consul")))
	case !hasFile && !hasConsul:
		c.errs = append(c.errs, c.keys.whole.Errorf(`there is no source: exactly one is needed, as in source "file" { path = "/etc/nodeproxy/mesh.d" }`))
	}
	i := slices.IndexFunc(c.raw.Source, func(s rawSource) bool { return s.File != nil })
	if i < 0 {
		return FileSource{}
	}
	r := *c.raw.Source[i].File
	r.VirtualIPs = cmp.Or(r.VirtualIPs, defaultVirtualIPs)
	ips, err := netip.ParsePrefix(r.VirtualIPs)
	if err != nil || ips != ips.Masked() {
		c.fail(key("source", "file", "virtual_ips"), `is %q: it must be a network, as "240.0.0.0/8"`, r.VirtualIPs)
	}
	return FileSource{Path: c.absolute(key("source", "file", "path"), r.Path), VirtualIPs: ips}
}

// rawConsul is the source "consul" block, or nil.
func (c *checker) rawConsul() *rawConsul {
	for _, s := range c.raw.Source {
		if s.Consul != nil {
			return s.Consul
		}
	}
	return nil
}

func (c *checker) consul() *ConsulSource {
	r := c.rawConsul()
	if r == nil {
		return nil
	}
	at := func(name string) []string { return key("source", "consul", name) }
	path := func(name, v string) string {
		if v == "" {
			return ""
		}
		return c.absolute(at(name), v)
	}
	s := &ConsulSource{
		Datacenter: r.Datacenter, AuthMethod: r.AuthMethod, BearerToken: path("bearer_token_file", r.BearerTokenFile),
		TokenFile: path("token_file", r.TokenFile), TokenDir: path("token_dir", r.TokenDir),
		CAFile: path("ca_file", r.CAFile), CertFile: path("cert_file", r.CertFile), KeyFile: path("key_file", r.KeyFile),
	}
	if (r.CertFile == "") != (r.KeyFile == "") {
		c.fail(at("cert_file"), "goes with key_file: set both or none")
	}
	if (r.AuthMethod == "") != (r.BearerTokenFile == "") {
		c.fail(at("auth_method"), "goes with bearer_token_file: set both or none")
	}
	if r.AuthMethod != "" && r.TokenFile != "" {
		c.fail(at("auth_method"), "gives the token that token_file would hold: remove one of them")
	}
	c.consulAddresses(s, r, at)
	text := cmp.Or(r.VirtualIPs, defaultConsulIPs)
	ips, err := netip.ParsePrefix(text)
	if err != nil || ips != ips.Masked() {
		c.fail(at("virtual_ips"), `is %q: it must be a network, as %q`, text, defaultConsulIPs)
	}
	s.VirtualIPs = ips
	return s
}

// consulAddresses reads who is asked: the node's agent, or servers.
func (c *checker) consulAddresses(s *ConsulSource, r *rawConsul, at func(string) []string) {
	wellFormed := func(name, address string, schemes ...string) {
		if scheme, rest, found := strings.Cut(address, "://"); found && (!slices.Contains(schemes, scheme) || rest == "") {
			c.fail(at(name), `has %q: it must be host:port, or a URL with %s`, address, strings.Join(schemes, ", "))
		}
	}
	if c.oneOf(at("mode"), cmp.Or(r.Mode, "agent"), "agent", "servers") != "servers" {
		s.Address = cmp.Or(r.Address, defaultConsulAddress)
		wellFormed("address", s.Address, "http", "https", "unix")
		if len(r.Addresses) > 0 || r.ServicesDir != "" {
			c.fail(at("mode"), `is "agent": addresses and services_dir go with "servers"`)
		}
		return
	}
	s.Servers = slices.Clone(r.Addresses)
	if r.Address != "" {
		s.Servers = append([]string{r.Address}, s.Servers...)
	}
	if len(s.Servers) == 0 {
		c.fail(at("mode"), `is "servers", and there is no address of one: set addresses = ["10.0.0.11:8500", …]`)
	}
	for _, address := range s.Servers {
		wellFormed("addresses", address, "http", "https")
	}
	if r.ServicesDir != "" {
		s.ServicesDir = c.absolute(at("services_dir"), r.ServicesDir)
	}
}

func (c *checker) cgroups() []Cgroup {
	var all []Cgroup
	labels := make(map[string]string) // by path
	for _, label := range slices.Sorted(maps.Keys(c.raw.Workloads.Cgroup)) {
		at := func(name string) []string { return key("workloads", "cgroup", label, name) }
		r := c.raw.Workloads.Cgroup[label]
		path := c.absolute(at("path"), r.Path)
		if path != "" {
			if err := onCgroup2(path); err != nil {
				c.fail(at("path"), "is %s: %w", path, err)
			}
			if first, twice := labels[path]; twice {
				c.fail(at("path"), "is %s, which cgroup %q at %s has already: remove one of them",
					path, first, c.keys.at("workloads", "cgroup", first, "path"))
			}
			labels[path] = label
		}
		if !catalog.IsServiceName(r.Service) {
			c.fail(at("service"), "is %q: set it to the name of the service that the workload is", r.Service)
		}
		for i, name := range r.Also {
			if !catalog.IsServiceName(name) || name == r.Service || slices.Contains(r.Also[:i], name) {
				c.fail(at("also_serves"), "has %q: list the names of further services, each once and without %q, which service is", name, r.Service)
			}
		}
		if r.Mode != "" {
			c.oneOf(at("mode"), r.Mode, string(Strict), string(Permissive))
		}
		if r.Consul != "" {
			c.oneOf(at("consul_access"), r.Consul, "allow", "refuse")
		}
		all = append(all, Cgroup{Label: label, Path: path, Service: r.Service, Also: r.Also, Mode: Mode(r.Mode), Consul: r.Consul})
	}
	return all
}

func (c *checker) inbound() Inbound {
	r := c.raw.Inbound
	in := Inbound{Mode: Mode(c.oneOf(key("inbound", "mode"), r.Mode, string(Strict), string(Permissive)))}
	var err error
	if in.FirstPort, in.LastPort, err = portRange(r.Ports); err != nil {
		c.fail(key("inbound", "ports"), "is %q: %w", r.Ports, err)
	}
	in.PlaintextFrom = c.networks(key("inbound", "plaintext_from"), r.PlaintextFrom)
	for _, path := range r.Probers {
		if !filepath.IsAbs(path) || path != filepath.Clean(path) {
			c.fail(key("inbound", "probers"), `has %q: it must be a list of absolute paths of cgroups, as ["/sys/fs/cgroup/system.slice/kubelet.service"]`, path)
		} else if err := onCgroup2(path); err != nil {
			c.fail(key("inbound", "probers"), "has %q: %w", path, err)
		} else {
			in.Probers = append(in.Probers, path)
		}
	}
	return in
}

func (c *checker) networks(path, texts []string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		network, err := netip.ParsePrefix(text)
		if err != nil || network != network.Masked() || network.Addr().Is4In6() {
			c.fail(path, `has %q: it must be a list of networks, as ["10.0.0.0/8", "fd00::/64"]`, text)
			continue
		}
		all = append(all, network)
	}
	return all
}

func portRange(s string) (first, last uint16, err error) {
	low, high, found := strings.Cut(s, "-")
	f, err1 := strconv.ParseUint(strings.TrimSpace(low), 10, 16)
	l, err2 := strconv.ParseUint(strings.TrimSpace(high), 10, 16)
	switch {
	case !found || err1 != nil || err2 != nil || f == 0:
		return 0, 0, fmt.Errorf(`it must be two ports, as "21500-21999"`)
	case f > l:
		return 0, 0, fmt.Errorf("its first port is above its last")
	case f <= agentLast && l >= agentFirst:
		return 0, 0, fmt.Errorf("it overlaps %d-%d, which Consul's agent gives to sidecars", agentFirst, agentLast)
	}
	return uint16(f), uint16(l), nil
}

func (c *checker) limits() Limits {
	r := c.raw.Limits
	count := func(name string, v int) {
		if v < 1 {
			c.fail(key("limits", name), "is %d: it must be at least 1", v)
		}
	}
	wait := func(name string, v, least time.Duration) {
		if v < least {
			c.fail(key("limits", name), "is %s: it must be at least %s", v, least)
		}
	}
	count("connections", r.Connections)
	count("per_workload", r.PerWorkload)
	wait("handshake", r.Handshake, time.Millisecond)
	wait("connect", r.Connect, time.Millisecond)
	wait("idle", r.Idle, 0)
	wait("drain", r.Drain, 0)
	return Limits(r)
}

func (c *checker) log() Log {
	r := c.raw.Log
	var level slog.Level
	if c.oneOf(key("log", "level"), r.Level, "debug", "info", "warn", "error") != "" {
		_ = level.UnmarshalText([]byte(r.Level)) // those four it knows
	}
	return Log{
		Level:  level,
		Format: c.oneOf(key("log", "format"), r.Format, "text", "json"),
		Access: c.oneOf(key("log", "access"), r.Access, "none", "denied", "all"),
	}
}

func (c *checker) admin() Admin {
	r := c.raw.Admin
	socket := c.absolute(key("admin", "socket"), r.Socket)
	if len(socket) > maxSocketPath {
		c.fail(key("admin", "socket"), "is longer than the %d bytes that a unix socket's path can have", maxSocketPath)
	}
	if r.Metrics != "" {
		_, port, err := net.SplitHostPort(r.Metrics)
		if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 {
			c.fail(key("admin", "metrics"), `is %q: it must be host:port, as "127.0.0.1:20210", or "" for none`, r.Metrics)
		}
	}
	return Admin{Socket: socket, Metrics: r.Metrics}
}

// oneOf returns v, or "" after an error if it is none of allowed.
func (c *checker) oneOf(path []string, v string, allowed ...string) string {
	if slices.Contains(allowed, v) {
		return v
	}
	c.fail(path, "is %q: it must be %s", v, strings.Join(allowed, " or "))
	return ""
}

// absolute returns v, or "" after an error if it is not an absolute path.
func (c *checker) absolute(path []string, v string) string {
	if !filepath.IsAbs(v) {
		c.fail(path, "is %q: it must be an absolute path", v)
		return ""
	}
	return filepath.Clean(v)
}

package consul

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
)

// fixed is a question that is always the same.
func fixed(path string) func() question {
	return func() question { return question{path: path} }
}

func decode(a *answer, into any) error {
	if err := json.Unmarshal(a.body, into); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	return nil
}

func (r *run) agentTopic() topic {
	return topic{what: "itself", ask: fixed(selfPath), apply: func(a *answer) error {
		next, err := parseAgent(a, &r.cfg)
		if err != nil {
			return err
		}
		if r.cfg.agentless() { // what a server says of itself is not this node's
			next.node, next.address, next.dns = r.cfg.catalogNode(), r.cfg.NodeAddress.String(), nil
		}
		r.world.update(func(d *data) bool {
			if reflect.DeepEqual(d.agent, next) { // its answer differs each time
				return false
			}
			d.agent = next
			return true
		})
		return nil
	}}
}

const selfPath = "/v1/agent/self"

// parseAgent reads what the agent says of itself. One of another datacenter, or too old, is an error.
func parseAgent(a *answer, cfg *Config) (*agent, error) {
	var self struct {
		Config struct{ Datacenter, NodeName, Version string }
		Debug  struct {
			ACLsEnabled            bool
			HTTPPort, HTTPSPort    int
			GRPCPort, GRPCTLSPort  int
			HTTPAddrs, HTTPSAddrs  []string
			GRPCAddrs              []string
			GRPCTLSAddrs           []string
			DNSAddrs               []string
			DefaultIntentionPolicy string
			Virtual4               string `json:"ConnectVirtualIPCIDRv4"`
			Virtual6               string `json:"ConnectVirtualIPCIDRv6"`
		} `json:"DebugConfig"`
		Member struct{ Addr string }
	}
	if err := decode(a, &self); err != nil {
		return nil, err
	}
	if want := cfg.Datacenter; want != "" && want != self.Config.Datacenter {
		return nil, fmt.Errorf("the agent is in datacenter %q and not in %q: correct the source's address or datacenter", self.Config.Datacenter, want)
	}
	if err := checkVersion(self.Config.Version); err != nil {
		return nil, err
	}
	found := &agent{
		node: self.Config.NodeName, datacenter: self.Config.Datacenter, address: self.Member.Addr,
		version: self.Config.Version, defaultIntention: self.Debug.DefaultIntentionPolicy, acls: self.Debug.ACLsEnabled,
	}
	found.grpc, found.grpcTLS = uint16(max(self.Debug.GRPCPort, 0)), uint16(max(self.Debug.GRPCTLSPort, 0))
	for _, text := range []string{self.Debug.Virtual4, self.Debug.Virtual6} {
		if p, err := netip.ParsePrefix(text); err == nil {
			found.virtual = append(found.virtual, p.Masked())
		}
	}
	for _, port := range []int{self.Debug.HTTPPort, self.Debug.HTTPSPort, self.Debug.GRPCPort, self.Debug.GRPCTLSPort} {
		if port > 0 && port <= math.MaxUint16 {
			found.ports = append(found.ports, uint16(port))
		}
	}
	for _, text := range slices.Concat(self.Debug.HTTPAddrs, self.Debug.HTTPSAddrs, self.Debug.GRPCAddrs, self.Debug.GRPCTLSAddrs) {
		if at, err := netip.ParseAddrPort(strings.TrimPrefix(text, "tcp://")); err == nil && !at.Addr().IsUnspecified() {
			found.own = append(found.own, at)
		}
	}
	for _, text := range self.Debug.DNSAddrs {
		if at, err := netip.ParseAddrPort(strings.TrimPrefix(text, "tcp://")); err == nil && !at.Addr().IsLoopback() {
			found.dns = append(found.dns, at)
		}
	}
	return found, nil
}

func (r *run) rootsTopic() topic {
	path := "/v1/agent/connect/ca/roots"
	if r.cfg.agentless() {
		path = "/v1/connect/ca/roots"
	}
	return topic{what: "roots", every: time.Second, ask: fixed(path), apply: func(a *answer) error {
		next, err := parseRoots(a)
		if err != nil {
			return err
		}
		r.world.update(func(d *data) bool {
			d.roots = next
			return true
		})
		r.leaves.rotate(next)
		return nil
	}}
}

func parseRoots(a *answer) (*roots, error) {
	var list api.CARootList
	if err := decode(a, &list); err != nil {
		return nil, err
	}
	next := &roots{trustDomain: strings.ToLower(list.TrustDomain)}
	for _, root := range list.Roots {
		certs, err := parseCertificates(root.RootCertPEM)
		if err != nil {
			return nil, fmt.Errorf("read root %q: %w", root.Name, err)
		}
		if root.ID == list.ActiveRootID {
			next.active = certs[0]
			next.all = append(certs, next.all...)
			continue
		}
		next.all = append(next.all, certs...)
	}
	if next.active == nil || next.trustDomain == "" {
		return nil, errors.New("there is no active root: is connect enabled on the servers?")
	}
	return next, nil
}

// parseCertificates reads all certificates of a PEM text: at least one.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("it holds no certificate in PEM")
	}
	return certs, nil
}

// namesTopic are the services of the datacenter. Its index moves with every registration, so it also says when the
// instances should be read again.
func (r *run) namesTopic() topic {
	return topic{what: "the names of services", every: time.Second, ask: fixed("/v1/catalog/services"), apply: func(a *answer) error {
		var tags map[string][]string
		if err := decode(a, &tags); err != nil {
			return err
		}
		looks := make(map[string]string, len(tags))
		for name := range tags {
			service, isSidecar := strings.CutSuffix(name, sidecarSuffix)
			if _, known := tags[service]; name != "consul" && !(isSidecar && known) {
				_, hasSidecar := tags[name+sidecarSuffix]
				looks[name] = fmt.Sprint(tags[name], hasSidecar, tags[name+sidecarSuffix])
			}
		}
		var gone []string
		r.world.update(func(d *data) bool {
			gone = d.rename(looks)
			d.filtered = a.filtered
			return true
		})
		for _, name := range gone {
			r.world.answered(serviceFault(name))
		}
		wake(r.known)
		return nil
	}, woken: func() { wake(r.named) }} // another instance of a known service says the same
}

// rename replaces the names of all services. What each looks like by its tags is compared: what looks different is to be
// read at once. It returns the names that are gone.
func (d *data) rename(looks map[string]string) (gone []string) {
	d.names = slices.Sorted(maps.Keys(looks))
	for name, s := range d.services {
		look, there := looks[name]
		switch {
		case !there:
			gone = append(gone, name)
			delete(d.services, name)
		case look != d.looks[name]:
			d.services[name] = &service{instances: s.instances, changed: s.changed} // as if it was read long ago
		}
	}
	d.looks = looks
	return gone
}

// registrationsTopic says when to ask for this node's registrations. They themselves come from the agent, which has them
// before the catalog does and when the servers are gone: here none is asked for.
func (r *run) registrationsTopic() topic {
	return topic{what: "this node's entries in the catalog", every: 50 * time.Millisecond,
		ask: func() question {
			return question{path: "/v1/catalog/node-services/" + escape(r.world.current().agent.node), params: url.Values{"filter": {`ID == ""`}}}
		},
		apply: func(*answer) error { return nil },
		woken: func() { wake(r.lookNow) }}
}

func (r *run) localTopic() topic {
	return topic{what: "this node's registrations", ask: fixed("/v1/agent/services"), apply: func(a *answer) error {
		local := make(map[string]*api.AgentService)
		if err := decode(a, &local); err != nil {
			return err
		}
		others := false
		r.world.update(func(d *data) bool {
			others = d.local == nil || !sameButOurs(d.local, local)
			d.local = local
			return others
		})
		if others {
			r.chainsChanged() // it may declare other upstreams
		} else {
			wake(r.altered)
		}
		return nil
	}}
}

// sameButOurs says whether two answers differ at most in what we have registered, of which a snapshot does not tell.
func sameButOurs(a, b map[string]*api.AgentService) bool {
	others := func(all map[string]*api.AgentService) map[string]*api.AgentService {
		all = maps.Clone(all)
		maps.DeleteFunc(all, func(_ string, s *api.AgentService) bool {
			return isOurs(s) && (s.Kind == api.ServiceKindConnectProxy || s.ID == proxyService)
		})
		return all
	}
	return reflect.DeepEqual(others(a), others(b))
}

// entryKinds are the config entries that are asked for.
var entryKinds = []string{api.MeshConfig, api.ProxyDefaults, api.ServiceDefaults, api.ServiceResolver, api.ServiceRouter, api.ServiceSplitter}

// entryTopics are those of all kinds but service-resolver, which is waited for: see resolverTopic.
func (r *run) entryTopics() []topic {
	var all []topic
	for _, kind := range entryKinds {
		if kind != api.ServiceResolver {
			all = append(all, r.entryTopic(kind))
		}
	}
	return all
}

func (r *run) entryTopic(kind string) topic {
	return topic{what: kind + " entries", ask: fixed("/v1/config/" + kind), apply: func(a *answer) error {
		found, err := parseEntries(a, kind)
		if err != nil {
			return err
		}
		r.world.update(func(d *data) bool {
			d.entries = d.entries.with(kind, found)
			return true
		})
		return nil
	}}
}

func parseEntries(a *answer, kind string) ([]api.ConfigEntry, error) {
	var list []json.RawMessage
	if err := decode(a, &list); err != nil {
		return nil, err
	}
	found := make([]api.ConfigEntry, 0, len(list))
	for _, raw := range list {
		entry, err := api.DecodeConfigEntryFromJSON(raw)
		if err != nil {
			return nil, fmt.Errorf("read a %s entry: %w", kind, err)
		}
		found = append(found, entry)
	}
	return found, nil
}

package consul

import (
	"maps"
	"net"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

// maxProbed is how many ports one check is believed to connect to in its time.
const maxProbed = 8

// probes are the checks of one registration that connect to it in plaintext, by check: the ports that each was seen to
// connect to. The agent shows what kind a check is, but not its target: that is in its output alone.
type probes map[string][]uint16

// connecting are the kinds of checks that connect to what they check, or that run programs which may.
var connecting = []string{"tcp", "http", "grpc", "h2ping", "script"}

// checksTopic are the checks of this node's registrations.
func (r *run) checksTopic() topic {
	return topic{what: "this node's checks", ask: fixed("/v1/agent/checks"), apply: func(a *answer) error {
		var all map[string]*api.AgentCheck
		if err := decode(a, &all); err != nil {
			return err
		}
		r.world.update(func(d *data) bool {
			next, marked := probesOf(all, d.checks), endingChecksOf(all)
			changed := d.checks == nil || !reflect.DeepEqual(next, d.checks) || !maps.Equal(marked, d.marked)
			d.checks, d.marked = next, marked
			return changed
		})
		return nil
	}}
}

// probesOf lists the checks that connect, by the registration that they belong to. What a check connected to before counts
// as well: not every output says where.
func probesOf(all map[string]*api.AgentCheck, before map[string]probes) map[string]probes {
	next := make(map[string]probes)
	for id, c := range all {
		if c == nil || c.ServiceID == "" || !slices.Contains(connecting, c.Type) {
			continue
		}
		if next[c.ServiceID] == nil {
			next[c.ServiceID] = make(probes)
		}
		ports := before[c.ServiceID][id]
		if port := checkedPort(c.Type, c.Output); port != 0 && len(ports) < maxProbed && !slices.Contains(ports, port) {
			ports = append(slices.Clone(ports), port)
			slices.Sort(ports)
		}
		next[c.ServiceID][id] = ports
	}
	return next
}

// checkedPlaces match the outputs of the agent's checks (agent/checks/check.go), those of failures included. The first that
// matches counts: what follows may be the application's own words.
var checkedPlaces = []*regexp.Regexp{
	regexp.MustCompile(`^TCP(?:\+TLS)? connect (\S+): Success`),
	regexp.MustCompile(`^HTTP [A-Z]+ (\S+): \d`),
	regexp.MustCompile(`^[A-Z][a-z]+ "([^"\s]+)": `),
	regexp.MustCompile(`^gRPC check ([^\s/]+)\S*: success`),
	regexp.MustCompile(`^Failed to dial to (\S+): `),
	regexp.MustCompile(`\bdial tcp (\S+): `),
}

// checkedPort is where a check says that it connected to, or could not, 0 if it does not say.
func checkedPort(kind, output string) uint16 {
	if kind == "script" {
		return 0
	}
	for _, place := range checkedPlaces {
		found := place.FindStringSubmatch(output)
		if found == nil {
			continue
		}
		text := found[1]
		if u, err := url.Parse(text); err == nil && u.Host != "" {
			text = u.Host
			if u.Port() == "" {
				text = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
			}
		}
		_, port, err := net.SplitHostPort(text)
		n, errPort := strconv.ParseUint(port, 10, 16)
		if err != nil || errPort != nil {
			return 0
		}
		return uint16(n)
	}
	return 0
}

// markProbed notes at which ports the agent checks the instances of this node.
func (b *builder) markProbed() {
	for _, svc := range b.services {
		for _, inst := range svc.Instances {
			if !inst.Local || inst.Native {
				continue
			}
			b.probe(inst, b.data.checks[inst.ID], inst.Address.Port(), inst.Delivery.Port())
			for id, s := range b.data.local {
				if s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && s.Proxy.DestinationServiceName == svc.Name && s.Port == int(inst.Mesh.Port()) {
					b.probe(inst, b.data.checks[id], inst.Mesh.Port())
				}
			}
		}
	}
}

// probe adds the ports of checks to an instance: its own, and those that were seen.
func (b *builder) probe(inst *catalog.Instance, checks probes, own ...uint16) {
	if len(checks) == 0 {
		return
	}
	all := append(inst.Probed, own...)
	for _, ports := range checks {
		all = append(all, ports...)
	}
	slices.Sort(all)
	inst.Probed = slices.DeleteFunc(slices.Compact(all), func(port uint16) bool { return port == 0 })
}

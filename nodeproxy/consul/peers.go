package consul

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// peering is another cluster as the servers know it. Its certificates are the peer's roots, kept current by the servers.
type peering struct {
	name, trustDomain string
	roots             [][]byte
	holds             bool // no other peer was known by the trust domain before, or is with it
}

// peerMeta is how an instance of a peer's service is recognised.
type peerMeta struct{ sni, identity, protocol string }

// addPeerMeta fills in what the library leaves out of entries of a peer's service: it is the same for all of them.
func addPeerMeta(a *answer, of endpoints, found []endpoint) error {
	if of.peer == "" {
		return nil
	}
	var list []struct {
		Service struct {
			Connect struct {
				PeerMeta struct {
					SNI, SpiffeID []string
					Protocol      string
				}
			}
		}
	}
	if err := decode(a, &list); err != nil {
		return err
	}
	for _, entry := range list {
		meta := entry.Service.Connect.PeerMeta
		if len(meta.SNI) == 0 || len(meta.SpiffeID) == 0 {
			continue
		}
		for i := range found { // the first ID is the service's, others are those of gateways that end HTTP
			found[i].peered = peerMeta{meta.SNI[0], meta.SpiffeID[0], meta.Protocol}
		}
		break
	}
	return nil
}

// namesPeers says whether a peer matters to anything here.
func (d *data) namesPeers() bool {
	for _, c := range d.chains {
		if slices.ContainsFunc(c.targets, func(t target) bool { return t.peer != "" }) {
			return true
		}
	}
	for _, rules := range d.intentions {
		if slices.ContainsFunc(rules, func(r rule) bool { return r.SourcePeer != "" }) {
			return true
		}
	}
	return slices.ContainsFunc(d.declared(), func(up upstream) bool { return up.DestinationPeer != "" })
}

func (d *data) knowsPeer(name string) bool {
	return slices.ContainsFunc(d.peers, func(p peering) bool { return p.name == name })
}

// readPeers reads who the peers are, where that matters.
func (r *run) readPeers(ctx context.Context) error {
	if d := r.world.current(); !d.namesPeers() {
		return nil
	}
	a, err := r.ask.request(ctx, question{path: "/v1/peerings"})
	if err != nil {
		return fmt.Errorf("the peers: %w", err)
	}
	var list []*api.Peering
	if err := decode(a, &list); err != nil {
		return err
	}
	var found []peering
	for _, p := range list {
		if peer := parsePeering(p); peer != nil {
			found = append(found, *peer)
		}
	}
	slices.SortFunc(found, func(x, y peering) int { return cmp.Compare(x.name, y.name) })
	r.world.update(func(d *data) bool {
		known := d.peers
		if known == nil && r.earlier != nil {
			for _, p := range r.earlier.snap.Peers {
				known = append(known, peering{name: p.Name, trustDomain: p.TrustDomain, holds: true})
			}
		}
		settleClaims(found, known)
		if reflect.DeepEqual(d.peers, found) {
			return false
		}
		d.peers = found
		return true
	})
	return nil
}

// settleClaims says which peers hold the trust domains that they claim: who held it as of known, or is alone. Of several that
// come at once none does: which of them it belongs to is not known, and one that is wrong could be any service of the other.
func settleClaims(found, known []peering) {
	holder, claims := make(map[string]string), make(map[string]int)
	for _, p := range known {
		if p.holds {
			holder[p.trustDomain] = p.name
		}
	}
	for _, p := range found {
		claims[p.trustDomain]++
	}
	held := make(map[string]bool)
	for i := range found {
		p := &found[i]
		p.holds = holder[p.trustDomain] == p.name
		held[p.trustDomain] = held[p.trustDomain] || p.holds
	}
	for i := range found {
		p := &found[i]
		p.holds = p.holds || !held[p.trustDomain] && claims[p.trustDomain] == 1
	}
}

// parsePeering is p, or nil where it has no roots yet. The roots of Consul's own CA, and those that Vault makes for it, name
// the trust domain; where none does, the name of the peer's servers ends with it.
func parsePeering(p *api.Peering) *peering {
	peer := &peering{name: p.Name}
	_, peer.trustDomain, _ = strings.Cut(p.PeerServerName, ".peering.")
	for _, text := range p.PeerCAPems {
		certs, err := parseCertificates(text)
		if err != nil {
			return nil
		}
		for _, cert := range certs {
			peer.roots = append(peer.roots, cert.Raw)
			if len(cert.URIs) == 1 && cert.URIs[0].Scheme == "spiffe" {
				peer.trustDomain = cert.URIs[0].Host
			}
		}
	}
	peer.trustDomain = strings.ToLower(peer.trustDomain)
	if peer.trustDomain == "" || len(peer.roots) == 0 || p.State == api.PeeringStateDeleting || p.State == api.PeeringStateTerminated {
		return nil
	}
	return peer
}

// addPeers notes the peers. A peer says itself what its trust domain is: one that is ours, or another's, is refused.
func (b *builder) addPeers() {
	for _, p := range b.data.peers {
		if !p.holds || p.trustDomain == b.data.roots.trustDomain {
			b.problem("", "refused", "peer %q has the trust domain %q, which this cluster or another peer has too: nothing of it is trusted", p.name, p.trustDomain)
			continue
		}
		b.peers = append(b.peers, catalog.Peer{Name: p.name, TrustDomain: p.trustDomain, Roots: p.roots})
	}
}

// domainOf is the trust domain of a peer, "" where it is not known.
func (b *builder) domainOf(peer string) string {
	for _, p := range b.peers {
		if p.Name == peer {
			return p.TrustDomain
		}
	}
	return ""
}

// setPeer makes t, of the instances found for a question, a target of the peer that the question names, if any.
func (b *builder) setPeer(t *catalog.Target, of endpoints) {
	if of.peer == "" {
		return
	}
	t.Peered = &catalog.Peered{Peer: of.peer}
	domain := b.domainOf(of.peer)
	var meta peerMeta
	if known := b.data.targets[of]; known != nil && len(known.instances) > 0 {
		meta = known.instances[0].peered
	}
	id, err := policy.ParseIdentity(meta.identity)
	t.Peered.SNI, t.Peered.Identity = meta.sni, id
	switch {
	case t.Unreachable != "":
	case domain == "":
		t.Unreachable = fmt.Sprintf("the roots of peer %q are not known: is it peered, and has the token peering = \"read\"?", of.peer)
	case len(t.Instances) == 0:
		t.Unreachable = fmt.Sprintf("peer %q exports no instance of %q to this cluster: see its exported-services, and its mesh gateways", of.peer, of.service)
	case err != nil || id.TrustDomain != domain:
		t.Unreachable = fmt.Sprintf("%q of peer %q is to be recognised by %q, which is no service of the trust domain %q", of.service, of.peer, meta.identity, domain)
	case meta.protocol != "" && meta.protocol != "tcp":
		t.Unreachable = fmt.Sprintf("%q of peer %q has protocol %q: its gateways end HTTP there, which needs an L7 proxy; of peers only \"tcp\" is supported", of.service, of.peer, meta.protocol)
	}
}

package consul

import (
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/policy"
)

func TestAPeeringsTrustDomainIsThatOfItsRoots(t *testing.T) {
	inURI, _ := mtlstest.NewRoot(t, func(c *x509.Certificate) { c.URIs = []*url.URL{mtlstest.URI(t, "spiffe://East.consul")} }).PEM(t)
	bare, _ := mtlstest.NewRoot(t).PEM(t)
	for what, c := range map[string]struct {
		peering api.Peering
		want    string
	}{
		"in the root":                  {api.Peering{PeerCAPems: []string{inURI}}, "east.consul"},
		"in the server's name":         {api.Peering{PeerCAPems: []string{bare}, PeerServerName: "server.dc2.peering.west.consul"}, "west.consul"},
		"nowhere":                      {api.Peering{PeerCAPems: []string{bare}}, ""},
		"without roots":                {api.Peering{PeerServerName: "server.dc2.peering.west.consul"}, ""},
		"with something else for one":  {api.Peering{PeerCAPems: []string{"x"}, PeerServerName: "server.dc2.peering.west.consul"}, ""},
		"of one that was terminated":   {api.Peering{PeerCAPems: []string{inURI}, State: api.PeeringStateTerminated}, ""},
		"of one that is being deleted": {api.Peering{PeerCAPems: []string{inURI}, State: api.PeeringStateDeleting}, ""},
	} {
		got := ""
		if p := parsePeering(&c.peering); p != nil {
			got = p.trustDomain
		}
		if got != c.want {
			t.Errorf("%s it is %q, want %q", what, got, c.want)
		}
	}
}

func TestAPeersServiceIsRecognisedByWhatConsulGives(t *testing.T) {
	d := sample()
	of := endpoints{service: "api", peer: "east"}
	d.chainOf("abroad", &chain{targets: []target{{endpoints: of}}})
	meta := peerMeta{"api.default.default.us.external.east.consul", "spiffe://east.consul/ns/default/dc/dc9/svc/api", "tcp"}
	gate := endpoint{node: "node-2", id: "api-1", mesh: place{"10.9.0.9", 8443}, healthy: true, gateway: true, peered: meta}
	d.targets[of] = &service{read: time.Now(), instances: []endpoint{gate}}
	d.intentions["api"] = []rule{{Intention: policy.Intention{Source: "web", Destination: "api", Action: policy.Allow, SourcePeer: "east"}}}
	foreign, err := policy.ParseIdentity("spiffe://east.consul/ns/default/dc/dc9/svc/web")
	if err != nil {
		t.Fatal(err)
	}
	target := func() (*catalog.Snapshot, *catalog.Target) {
		s := build(t, d, "web")
		return s, s.RouteOf("web", catalog.Destination{Service: s.Services["abroad"]}).Targets[0]
	}
	s, unknown := target()
	if !strings.Contains(unknown.Unreachable, `the roots of peer "east" are not known`) || s.Policy.Decide(foreign, "api").Allowed || !strings.Contains(problems(s), `the trust domain of peer "east" is not known`) {
		t.Errorf("before the peer is known: %+v, %s", unknown, problems(s))
	}
	east := peering{name: "east", trustDomain: "east.consul", roots: [][]byte{{1}}, holds: true}
	d.peers = []peering{east}
	s, known := target()
	if known.Unreachable != "" || known.String() != "api.external.east" || known.Peered.SNI != meta.sni || s.TargetIdentity(known).String() != meta.identity ||
		!known.Usable() || !s.Policy.Decide(foreign, "api").Allowed {
		t.Errorf("the target is %+v, %+v", known, known.Peered)
	}
	for what, c := range map[string]struct {
		change func()
		want   string
	}{
		"HTTP":            {func() { d.targets[of].instances[0].peered.protocol = "http" }, `has protocol "http"`},
		"another domain":  {func() { d.targets[of].instances[0].peered.identity = strings.Replace(meta.identity, "east", "west", 1) }, `no service of the trust domain "east.consul"`},
		"a gateway's ID":  {func() { d.targets[of].instances[0].peered.identity = "spiffe://east.consul/gateway/mesh/dc/dc9" }, "no service of the trust domain"},
		"nothing of it":   {func() { d.targets[of].instances = nil }, `exports no instance of "api"`},
		"our own domain":  {func() { d.peers[0].trustDomain = d.roots.trustDomain }, `the roots of peer "east" are not known`},
		"somebody else's": {func() { d.peers[0].holds = false }, `the roots of peer "east" are not known`},
	} {
		d.targets[of].instances = []endpoint{gate}
		d.peers = []peering{east}
		c.change()
		if s, got := target(); !strings.Contains(got.Unreachable, c.want) || !d.peers[0].holds && len(s.Peers) > 0 {
			t.Errorf("%s: %q, want %q", what, got.Unreachable, c.want)
		}
	}
}

// TestAClaimToAPeersTrustDomainTakesItFromNobody has peers come and go, who claim trust domains by name: "west=east.consul".
func TestAClaimToAPeersTrustDomainTakesItFromNobody(t *testing.T) {
	peers := func(claims string) (all []peering) {
		for claim := range strings.FieldsSeq(claims) {
			name, domain, _ := strings.Cut(claim, "=")
			all = append(all, peering{name: name, trustDomain: domain})
		}
		return all
	}
	var known []peering
	for _, step := range []struct{ what, claims, held string }{
		{"the first", "east=e", "east=e"},
		{"another's of its own", "east=e west=w", "east=e west=w"},
		{"one that claims what is held", "evil=e east=e west=w", "east=e west=w"},
		{"one that held something else", "evil=e east=e west=e", "east=e"},
		{"who gives back what it claimed", "evil=e east=e west=w", "east=e west=w"},
		{"once the holder is gone, of several nobody", "evil=e west=e", ""},
		{"a newcomer among them", "east=e evil=e west=e", ""},
		{"the only one left", "evil=e", "evil=e"},
		{"two at once", "x=n y=n", ""},
	} {
		found := peers(step.claims)
		settleClaims(found, known)
		var held []string
		for _, p := range found {
			if p.holds {
				held = append(held, p.name+"="+p.trustDomain)
			}
		}
		if got := strings.Join(held, " "); got != step.held {
			t.Errorf("%s: %q hold, want %q", step.what, got, step.held)
		}
		known = found
	}
}

package mtls_test

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/policy"
)

const (
	eastDomain = "66666666-7777-8888-9999-000000000000.consul"
	eastAPI    = "spiffe://" + eastDomain + "/ns/default/dc/dc9/svc/api"
)

// peered are the credentials of a service api of this mesh, which has a peer "east".
func peered(t *testing.T, root, east *mtlstest.Authority, leaf *tls.Certificate) (*mtls.Credentials, *catalog.Target) {
	t.Helper()
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: trustDomain}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := catalog.New(catalog.Snapshot{
		TrustDomain: trustDomain, Datacenter: "dc1", Policy: p, Roots: []*x509.Certificate{root.Cert},
		Leaves: map[string]*tls.Certificate{"api": leaf}, Services: map[string]*catalog.Service{"api": {Name: "api"}},
		Peers: []catalog.Peer{{Name: "east", TrustDomain: eastDomain, Roots: [][]byte{east.Cert.Raw}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	id, err := policy.ParseIdentity(eastAPI)
	if err != nil {
		t.Fatal(err)
	}
	return mtls.New(snap, snap.Leaves), &catalog.Target{Service: "api", Peered: &catalog.Peered{Peer: "east", SNI: "api.default.default.us.external." + eastDomain, Identity: id}}
}

func TestAPeersRootsVouchForItsTrustDomainAlone(t *testing.T) {
	root, east, stranger := mtlstest.NewRoot(t), mtlstest.NewRoot(t), mtlstest.NewRoot(t)
	ours, target := peered(t, root, east, root.Leaf(t, apiURI))
	for what, c := range map[string]struct {
		leaf *tls.Certificate
		good bool
	}{
		"the peer's":                        {east.Leaf(t, eastAPI), true},
		"an intermediate of the peer's":     {east.Intermediate(t).Leaf(t, eastAPI), true},
		"our domain by the peer's root":     {east.Leaf(t, apiURI), false},
		"the peer's domain by our root":     {root.Leaf(t, eastAPI), false},
		"the peer's domain by a stranger":   {stranger.Leaf(t, eastAPI), false},
		"a third domain by the peer's root": {east.Leaf(t, strings.Replace(eastAPI, "666", "667", 1)), false},
	} {
		t.Run(what, func(t *testing.T) {
			client, server := pair(t)
			result := accept(ours, server)
			config := clientConfig(c.leaf)
			config.ServerName = "api.default.default.east.external." + trustDomain // as the peer calls what it imports
			secure := tls.Client(client, config)
			_ = secure.Handshake()
			got := <-result
			if c.good {
				if got.err != nil || got.peer.String() != eastAPI {
					t.Errorf("as a client it is %s: %v", got.peer, got.err)
				}
			} else {
				wantReason(t, got.err, catalog.ReasonPeerIdentity, "verify")
			}

			client, server = pair(t)
			sni := make(chan string, 1)
			go func() {
				_ = tls.Server(server, &tls.Config{Certificates: []tls.Certificate{*c.leaf}, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
					sni <- hello.ServerName
					return nil, nil
				}}).Handshake()
			}()
			_, err := ours.Connect(client, "api", target, "")
			if got := <-sni; got != target.Peered.SNI {
				t.Errorf("the SNI is %s", got)
			}
			if c.good && err != nil {
				t.Errorf("as a server: %v", err)
			} else if !c.good {
				wantReason(t, err, catalog.ReasonPeerIdentity, "verify")
			}
		})
	}
}

package mtls_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/policy"
)

// within is the credentials of a mesh that limits TLS.
func within(t *testing.T, root *mtlstest.Authority, limits catalog.TLS) *mtls.Credentials {
	t.Helper()
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: trustDomain}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := catalog.New(catalog.Snapshot{
		TrustDomain: trustDomain, Datacenter: "dc1", Policy: p, TLS: limits, Roots: []*x509.Certificate{root.Cert},
		Leaves: map[string]*tls.Certificate{"api": root.Leaf(t, apiURI), "web": root.Leaf(t, webURI)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return mtls.New(snap, snap.Leaves)
}

func TestTheTargetsIdentityAndNotTheDialledOnesIsVerified(t *testing.T) {
	root := mtlstest.NewRoot(t)
	far := strings.Replace(apiURI, "/dc/dc1/", "/dc/dc2/", 1)
	for _, c := range []struct {
		server string
		target catalog.Target
		sni    string // "": refused
	}{
		{far, catalog.Target{Service: "api", Datacenter: "dc2"}, "api.default.dc2.internal." + trustDomain},
		{far, catalog.Target{Service: "api", Datacenter: "dc2", Subset: "v2"}, "v2.api.default.dc2.internal." + trustDomain},
		{apiURI, catalog.Target{Service: "api", Subset: "v2"}, "v2." + sniAPI},
		{far, catalog.Target{Service: "api"}, ""},
		{apiURI, catalog.Target{Service: "api", Datacenter: "dc2"}, ""},
		{webURI, catalog.Target{Service: "api"}, ""},
	} {
		client, server := pair(t)
		sni := make(chan string, 1)
		leaf := root.Leaf(t, c.server)
		go func() {
			conn := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{*leaf}, ClientAuth: tls.RequireAnyClientCert})
			_ = conn.Handshake()
			sni <- conn.ConnectionState().ServerName
		}()
		_, err := within(t, root, catalog.TLS{}).Connect(client, "web", &c.target, "")
		if c.sni == "" {
			wantReason(t, err, catalog.ReasonPeerIdentity, c.server)
			continue
		}
		if err != nil {
			t.Errorf("%s as %s: %v", c.server, &c.target, err)
		}
		if got := <-sni; got != c.sni {
			t.Errorf("%s: SNI %q, want %q", &c.target, got, c.sni)
		}
	}
}

func TestTheMeshLimitsTLS(t *testing.T) {
	root := mtlstest.NewRoot(t)
	suite := tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
	for name, c := range map[string]struct {
		client, server catalog.TLSLimits
		version, suite uint16 // 0: refused, any
	}{
		"nothing":                {version: tls.VersionTLS13},
		"at most 1.2 outgoing":   {client: catalog.TLSLimits{Max: tls.VersionTLS12}, version: tls.VersionTLS12},
		"at most 1.2 incoming":   {server: catalog.TLSLimits{Max: tls.VersionTLS12}, version: tls.VersionTLS12},
		"1.2 against 1.3":        {client: catalog.TLSLimits{Max: tls.VersionTLS12}, server: catalog.TLSLimits{Min: tls.VersionTLS13}},
		"one suite outgoing":     {client: catalog.TLSLimits{Max: tls.VersionTLS12, Suites: []uint16{suite}}, version: tls.VersionTLS12, suite: suite},
		"suites without overlap": {client: catalog.TLSLimits{Max: tls.VersionTLS12, Suites: []uint16{suite}}, server: catalog.TLSLimits{Suites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}}},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t)
			result := accept(within(t, root, catalog.TLS{Incoming: c.server}), server)
			peer, err := within(t, root, catalog.TLS{Outgoing: c.client}).Connect(client, "web", &catalog.Target{Service: "api"}, "")
			if c.version == 0 {
				wantReason(t, err, catalog.ReasonHandshakeFailed, "handshake")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := <-result; got.err != nil {
				t.Fatal(got.err)
			}
			if older := peer.Older != nil; older != (c.version == tls.VersionTLS12) || older == (peer.Records != nil) {
				t.Errorf("TLS 1.2: %v, records: %v", older, peer.Records != nil)
			} else if older && c.suite != 0 && peer.Older.ConnectionState().CipherSuite != c.suite {
				t.Errorf("suite %s", tls.CipherSuiteName(peer.Older.ConnectionState().CipherSuite))
			}
		})
	}
}

func TestTheProtocolNeedsTLS13OnBothSides(t *testing.T) {
	root := mtlstest.NewRoot(t)
	old := catalog.TLSLimits{Max: tls.VersionTLS12}
	for name, c := range map[string]struct {
		client, server catalog.TLSLimits
		want           string
	}{
		"nothing":              {want: "test/1"},
		"at most 1.3":          {client: catalog.TLSLimits{Max: tls.VersionTLS13}, server: catalog.TLSLimits{Max: tls.VersionTLS13}, want: "test/1"},
		"at most 1.2 outgoing": {client: old},
		"at most 1.2 incoming": {server: old},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t)
			accepted := make(chan error, 1)
			go func() {
				_, err := within(t, root, catalog.TLS{Incoming: c.server}).Accept(server, "api", "test/1", func() error { return nil })
				accepted <- err
			}()
			peer, err := within(t, root, catalog.TLS{Outgoing: c.client}).Connect(client, "web", &catalog.Target{Service: "api"}, "test/1")
			if err := errors.Join(err, <-accepted); err != nil {
				t.Fatal(err)
			}
			if got := peer.Protocol; got != c.want {
				t.Errorf("%q was negotiated, want %q", got, c.want)
			}
		})
	}
}

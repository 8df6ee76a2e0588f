package mtls_test

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
)

// present shows leaf to c as a client's, and returns what c says.
func present(t *testing.T, c *mtls.Credentials, leaf *tls.Certificate) error {
	t.Helper()
	client, server := pair(t)
	defer client.Close()
	result := accept(c, server)
	go func() { _ = tls.Client(client, clientConfig(leaf)).Handshake() }()
	return (<-result).err
}

func TestACertificateThatWasVerifiedBeforeIsRefused(t *testing.T) {
	root := mtlstest.NewRoot(t)
	fresh := func() *mtls.Credentials {
		return credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI), "web": root.Leaf(t, webURI)})
	}
	t.Run("once it has expired", func(t *testing.T) {
		c := fresh()
		leaf := root.Leaf(t, webURI, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(4 * time.Second) })
		if err := present(t, c, leaf); err != nil {
			t.Fatalf("before it expired: %v", err)
		}
		<-time.After(time.Until(leaf.Leaf.NotAfter) + time.Millisecond)
		wantReason(t, present(t, c, leaf), catalog.ReasonPeerIdentity, "expired")
	})
	t.Run("for the other side of TLS", func(t *testing.T) {
		c := fresh()
		leaf := root.Leaf(t, apiURI, usage(x509.ExtKeyUsageClientAuth))
		if err := present(t, c, leaf); err != nil {
			t.Fatal(err)
		}
		client, server := pair(t)
		go tls.Server(server, &tls.Config{Certificates: []tls.Certificate{*leaf}, ClientAuth: tls.RequireAnyClientCert}).Handshake()
		_, err := c.Connect(client, "web", &catalog.Target{Service: "api"}, "")
		wantReason(t, err, catalog.ReasonPeerIdentity, "key usage")
	})
	t.Run("without its key", func(t *testing.T) {
		c := fresh()
		leaf := root.Leaf(t, webURI)
		if err := present(t, c, leaf); err != nil {
			t.Fatal(err)
		}
		stolen := *leaf
		stolen.PrivateKey = root.Leaf(t, webURI).PrivateKey
		wantReason(t, present(t, c, &stolen), catalog.ReasonHandshakeFailed, "signature")
	})
}

// BenchmarkHandshake is both sides of a handshake with a certificate that both have seen before.
func BenchmarkHandshake(b *testing.B) {
	root := mtlstest.NewRoot(b)
	c := credentials(b, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(b, apiURI), "web": root.Leaf(b, webURI)})
	b.ReportAllocs()
	for b.Loop() {
		client, server := pair(b)
		result := accept(c, server)
		if _, err := c.Connect(client, "web", &catalog.Target{Service: "api"}, ""); err != nil {
			b.Fatal(err)
		}
		if got := <-result; got.err != nil {
			b.Fatal(got.err)
		}
		client.Close()
		server.Close()
	}
}

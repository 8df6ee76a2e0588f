// Package mtls is both TLS sides of Consul Connect for any local service: it shows the service's own leaf, and accepts a
// peer only by chain, extended key usage and SPIFFE ID.
//
// It authenticates and nothing else: whether the peer may connect is decided by its caller, after the handshake. It
// keeps no sessions and negotiates no ALPN, so every connection is authenticated on its own and looks to any Connect
// peer like one of Consul's own.
package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// Credentials are the certificates and roots of one snapshot. They are immutable and safe for concurrent use; a
// connection keeps none of them after its handshake.
type Credentials struct {
	snap   *catalog.Snapshot
	leaves map[string]*tls.Certificate
	roots  *x509.CertPool
}

// New returns the credentials of snap, with leaves as the certificates of the local services.
func New(snap *catalog.Snapshot, leaves map[string]*tls.Certificate) *Credentials {
	roots := x509.NewCertPool()
	for _, root := range snap.Roots {
		roots.AddCert(root)
	}
	return &Credentials{snap: snap, leaves: leaves, roots: roots}
}

// Leaf returns the certificate of a local service. The error is a *catalog.Refusal with ReasonNoCertificate when there
// is none, or it is not valid now.
func (c *Credentials) Leaf(service string) (*tls.Certificate, error) {
	leaf := c.leaves[service]
	if leaf == nil || leaf.Leaf == nil {
		return nil, refuse(catalog.ReasonNoCertificate, "find the certificate of %q: the source has not delivered one: see the source in nodeproxy status", service)
	}
	now := time.Now()
	if now.Before(leaf.Leaf.NotBefore) || now.After(leaf.Leaf.NotAfter) {
		return nil, refuse(catalog.ReasonNoCertificate, "use the certificate of %q: it is valid from %s to %s: check the clock and the source in nodeproxy status",
			service, leaf.Leaf.NotBefore.Format(time.RFC3339), leaf.Leaf.NotAfter.Format(time.RFC3339))
	}
	return leaf, nil
}

// Accept does the server's side of the handshake on conn for the local service that its local address selected, and
// returns who the peer is. It calls heard when the client's first message has arrived whole, before the costly part; an
// error of heard ends the handshake. The caller sets a deadline, and closes conn on error: the alert has been sent by then.
//
// Errors are *catalog.Refusal: ReasonNoCertificate before anything is read, ReasonPeerIdentity for a client certificate
// that is not one of this mesh's services, ReasonHandshakeFailed for all else, an SNI of another service among it.
func (c *Credentials) Accept(conn net.Conn, service string, heard func() error) (*tls.Conn, policy.Identity, error) {
	leaf, err := c.Leaf(service)
	if err != nil {
		return nil, policy.Identity{}, err
	}
	var peer policy.Identity
	config := base(leaf, c.snap.TLS.Incoming)
	config.ClientAuth = tls.RequireAnyClientCert // verified in VerifyConnection, which knows the reason
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if err := c.checkSNI(hello.ServerName, service); err != nil {
			return nil, err
		}
		return nil, heard()
	}
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		peer, err = c.verify(state, x509.ExtKeyUsageClientAuth)
		return err
	}
	secure := tls.Server(conn, config)
	if err := secure.Handshake(); err != nil {
		return nil, policy.Identity{}, handshakeError(conn, err)
	}
	return secure, peer, nil
}

// Connect does the client's side of the handshake on conn as the local service source, with an instance of target: the
// one that was chosen, whatever was dialled. The caller sets a deadline, and closes conn on error.
//
// With TLS 1.3 the server's refusal of our certificate comes only after Connect returned, with the first Read.
//
// Errors are *catalog.Refusal: ReasonNoCertificate before anything is sent, ReasonPeerIdentity when the server is not
// target, ReasonHandshakeFailed for all else.
func (c *Credentials) Connect(conn net.Conn, source string, target *catalog.Target) (*tls.Conn, error) {
	leaf, err := c.Leaf(source)
	if err != nil {
		return nil, err
	}
	want := c.snap.TargetIdentity(target)
	config := base(leaf, c.snap.TLS.Outgoing)
	config.ServerName = sni(want)
	if target.Subset != "" {
		config.ServerName = target.Subset + "." + config.ServerName
	}
	config.InsecureSkipVerify = true // no hostname to check: VerifyConnection checks chain and SPIFFE ID
	// Without it a certificate that the server's hints do not mention would be left out, and refused as missing.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return leaf, nil }
	config.VerifyConnection = func(state tls.ConnectionState) error {
		got, err := c.verify(state, x509.ExtKeyUsageServerAuth)
		if err == nil && got != want {
			err = refuse(catalog.ReasonPeerIdentity, "verify the server at %s: it is %s and not %s: the address may have moved to another service", conn.RemoteAddr(), got, want)
		}
		return err
	}
	secure := tls.Client(conn, config)
	if err := secure.Handshake(); err != nil {
		return nil, handshakeError(conn, err)
	}
	return secure, nil
}

// base is what both sides have in common, within limits. NextProtos stays empty: a native client offers h2, and a list
// without it would end the handshake.
func base(leaf *tls.Certificate, limits catalog.TLSLimits) *tls.Config {
	suites := limits.Suites
	if suites == nil {
		suites = catalog.CipherSuites()
	}
	return &tls.Config{
		MinVersion:                  max(tls.VersionTLS12, limits.Min),
		MaxVersion:                  limits.Max,
		CipherSuites:                suites,
		Certificates:                []tls.Certificate{*leaf},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // the caller writes tens of kilobytes at a time
	}
}

// verify checks a peer's certificate: chain with the intermediates it sent, key usage, and exactly one URI SAN that is
// the SPIFFE ID of a service in our trust domain. Every error has ReasonPeerIdentity.
func (c *Credentials) verify(state tls.ConnectionState, usage x509.ExtKeyUsage) (policy.Identity, error) {
	id, err := c.identify(state.PeerCertificates, usage)
	if err != nil {
		return policy.Identity{}, refuse(catalog.ReasonPeerIdentity, "verify the peer's certificate: %w", err)
	}
	return id, nil
}

func (c *Credentials) identify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (policy.Identity, error) {
	if len(chain) == 0 {
		return policy.Identity{}, errors.New("it sent none")
	}
	leaf := chain[0]
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	options := x509.VerifyOptions{Roots: c.roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}
	if _, err := leaf.Verify(options); err != nil {
		return policy.Identity{}, err
	}
	switch {
	case leaf.IsCA:
		return policy.Identity{}, errors.New("it is a CA's, not a service's")
	case !slices.Contains(leaf.ExtKeyUsage, usage): // Verify lets a certificate without any usage pass
		return policy.Identity{}, errors.New("its extended key usage is not for this side of TLS")
	case len(leaf.URIs) != 1:
		return policy.Identity{}, fmt.Errorf("it has %d URI SANs instead of one", len(leaf.URIs))
	}
	id, err := policy.ParseIdentity(leaf.URIs[0].String())
	if err != nil {
		return policy.Identity{}, err
	}
	if id.TrustDomain != c.snap.TrustDomain {
		return policy.Identity{}, fmt.Errorf("its trust domain is %q and ours is %q", id.TrustDomain, c.snap.TrustDomain)
	}
	return id, nil
}

// sni is the server name under which clients ask for a service (agent/connect/sni.go of Consul).
func sni(id policy.Identity) string {
	return strings.Join([]string{id.Service, id.Namespace, id.Datacenter, "internal", id.TrustDomain}, ".")
}

// checkSNI compares name with what clients may send for service. Names can contain dots, so it is never taken apart. Only
// Envoy sends one; it selects nothing.
func (c *Credentials) checkSNI(name, service string) error {
	whole := sni(c.snap.Identity(service))
	if name == "" || strings.EqualFold(name, whole) {
		return nil
	}
	if svc := c.snap.Services[service]; svc != nil {
		for _, subset := range svc.Subsets {
			if strings.EqualFold(name, subset+"."+whole) {
				return nil
			}
		}
	}
	return refuse(catalog.ReasonHandshakeFailed, "check the SNI %.100q: the address asked belongs to %q, whose SNI is %q", name, service, whole)
}

func handshakeError(conn net.Conn, err error) error {
	if refusal, ok := errors.AsType[*catalog.Refusal](err); ok {
		return refusal
	}
	return refuse(catalog.ReasonHandshakeFailed, "do the TLS handshake with %s: %w", conn.RemoteAddr(), err)
}

func refuse(reason catalog.Reason, format string, args ...any) error {
	return &catalog.Refusal{Reason: reason, Err: fmt.Errorf(format, args...)}
}

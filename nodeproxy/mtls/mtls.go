// Package mtls is both TLS sides of Consul Connect for any local service: it shows the service's own leaf, and accepts a
// peer only by chain, extended key usage and SPIFFE ID.
//
// It authenticates and nothing else: whether the peer may connect is decided by its caller, after the handshake. It
// keeps no sessions and negotiates no ALPN but one that its caller names, so every connection is authenticated on its own
// and looks to any Connect peer like one of Consul's own.
package mtls

import (
	"crypto/fips140"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/record"
	"nodeproxy.io/policy"
)

// Credentials are the certificates and roots of one snapshot. They are immutable and safe for concurrent use; a
// connection keeps none of them after its handshake.
type Credentials struct {
	snap   *catalog.Snapshot
	leaves map[string]*tls.Certificate
	roots  *x509.CertPool
	peers  map[string]*x509.CertPool // the roots of other trust domains, each for itself
	known  known
}

// New returns the credentials of snap, with leaves as the certificates of the local services.
func New(snap *catalog.Snapshot, leaves map[string]*tls.Certificate) *Credentials {
	roots := x509.NewCertPool()
	for _, root := range snap.Roots {
		roots.AddCert(root)
	}
	c := &Credentials{snap: snap, leaves: leaves, roots: roots, peers: make(map[string]*x509.CertPool)}
	for _, peer := range snap.Peers {
		pool := x509.NewCertPool()
		for _, der := range peer.Roots {
			if root, err := x509.ParseCertificate(der); err == nil { // the source has parsed it already
				pool.AddCert(root)
			}
		}
		c.peers[peer.TrustDomain] = pool
	}
	delete(c.peers, snap.TrustDomain)
	return c
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
// A client that offers protocol alone, with TLS 1.3, gets it where the mesh does not cap TLS below that; no other client sees that there is an ALPN: one that offers
// something else would end the handshake. With "" nobody gets one.
//
// Errors are *catalog.Refusal: ReasonNoCertificate before anything is read, ReasonPeerIdentity for a client certificate
// that is not one of this mesh's services, ReasonHandshakeFailed for all else, an SNI of another service among it.
func (c *Credentials) Accept(conn net.Conn, service, protocol string, heard func() error) (*Secured, error) {
	leaf, err := c.Leaf(service)
	if err != nil {
		return nil, err
	}
	var peer Peer
	var secrets record.Secrets
	config := base(leaf, c.snap.TLS.Incoming, &secrets)
	config.ClientAuth = tls.RequireAnyClientCert // verified in VerifyConnection, which knows the reason
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		peer, err = c.verify(state.PeerCertificates, x509.ExtKeyUsageClientAuth)
		return err
	}
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if err := c.checkSNI(hello.ServerName, service); err != nil {
			return nil, err
		}
		if err := heard(); err != nil || !offersAlone(hello, protocol) || !c.snap.TLS.Incoming.Allows(tls.VersionTLS13) {
			return nil, err
		}
		negotiating := config.Clone()
		negotiating.NextProtos = []string{protocol}
		return negotiating, nil
	}
	return secure(tls.Server(record.Stepwise(conn), config), &secrets, false, &peer, leaf.Leaf)
}

func offersAlone(hello *tls.ClientHelloInfo, protocol string) bool {
	return protocol != "" && len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == protocol &&
		slices.Contains(hello.SupportedVersions, tls.VersionTLS13)
}

// Connect does the client's side of the handshake on conn as the local service source, with an instance of target: the
// one that was chosen, whatever was dialled. The caller sets a deadline, and closes conn on error. It offers protocol
// alone as ALPN, or none if it is "" or the mesh caps TLS below 1.3; Secured says whether the server took it,
// which it may with TLS 1.3 only. A server may also end the handshake because of it: see NoSuchProtocol.
//
// With TLS 1.3 the server's refusal of our certificate comes only after Connect returned, with the first Read.
//
// Errors are *catalog.Refusal: ReasonNoCertificate before anything is sent, ReasonPeerIdentity when the server is not
// target, ReasonHandshakeFailed for all else.
func (c *Credentials) Connect(conn net.Conn, source string, target *catalog.Target, protocol string) (*Secured, error) {
	leaf, err := c.Leaf(source)
	if err != nil {
		return nil, err
	}
	want := c.snap.TargetIdentity(target)
	var peer Peer
	var secrets record.Secrets
	config := base(leaf, c.snap.TLS.Outgoing, &secrets)
	if protocol != "" && c.snap.TLS.Outgoing.Allows(tls.VersionTLS13) {
		config.NextProtos = []string{protocol}
	}
	config.ServerName = sni(want)
	if target.Peered != nil {
		config.ServerName = target.Peered.SNI
	}
	if target.Subset != "" {
		config.ServerName = target.Subset + "." + config.ServerName
	}
	config.InsecureSkipVerify = true // no hostname to check: VerifyConnection checks chain and SPIFFE ID
	// Without it a certificate that the server's hints do not mention would be left out, and refused as missing.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return leaf, nil }
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		peer, err = c.verify(state.PeerCertificates, x509.ExtKeyUsageServerAuth)
		if got := peer.Identity; err == nil && got != want {
			err = refuse(catalog.ReasonPeerIdentity, "verify the server at %s: it is %s and not %s: the address may have moved to another service", conn.RemoteAddr(), got, want)
		}
		if err == nil && state.NegotiatedProtocol != "" && state.Version < tls.VersionTLS13 {
			err = refuse(catalog.ReasonHandshakeFailed, "do the TLS handshake with %s: it took %q without TLS 1.3", conn.RemoteAddr(), protocol)
		}
		return err
	}
	return secure(tls.Client(record.Stepwise(conn), config), &secrets, true, &peer, leaf.Leaf)
}

// Secured is a connection after its handshake.
type Secured struct {
	Peer     Peer
	Protocol string // that was negotiated, or ""; its caller names none where FIPS 140 is asked for

	// One of the two is what goes on from here. With TLS 1.3 nothing is left of the handshake, and all that was received after it is still to be
	// read from the connection below.
	Records *record.Layer // TLS 1.3
	Older   *tls.Conn     // TLS 1.2, and any where FIPS 140 is asked for, whose validated module makes its nonces itself
}

// secure does the handshake of conn, and fills in what peer does not say yet.
func secure(conn *tls.Conn, secrets *record.Secrets, client bool, peer *Peer, ours *x509.Certificate) (*Secured, error) {
	if err := conn.Handshake(); err != nil {
		return nil, handshakeError(conn, err)
	}
	peer.leaf = ours
	state := conn.ConnectionState()
	if state.Version < tls.VersionTLS13 || fips140.Enabled() {
		return &Secured{Peer: *peer, Older: conn}, nil
	}
	records, err := secrets.Layer(state, client)
	if err != nil {
		return nil, handshakeError(conn, err)
	}
	return &Secured{Peer: *peer, Protocol: state.NegotiatedProtocol, Records: records}, nil
}

// NoSuchProtocol says whether a handshake failed because the server insists on another ALPN.
func NoSuchProtocol(err error) bool {
	const noApplicationProtocol = tls.AlertError(120) // RFC 7301, section 3.2
	remote, ok := errors.AsType[*net.OpError](err)
	return ok && remote.Op == "remote error" && remote.Err.Error() == noApplicationProtocol.Error()
}

// Peer is the other side of a connection as its certificates showed it in the handshake.
type Peer struct {
	Identity policy.Identity

	until time.Time         // the first NotAfter of the chain to the root
	leaf  *x509.Certificate // ours, which it was shown
}

// Still says whether a handshake with peer, as the local service, would end like the one that it was in: our leaf is the
// same, and nothing has expired. Whether roots and settings are the same is for SameTerms. The error is a *catalog.Refusal.
func (c *Credentials) Still(peer *Peer, service string) error {
	leaf, err := c.Leaf(service)
	if err != nil {
		return err
	}
	if !leaf.Leaf.Equal(peer.leaf) {
		return refuse(catalog.ReasonNoCertificate, "use the certificate of %q: it was replaced", service)
	}
	if time.Now().After(peer.until) {
		return refuse(catalog.ReasonPeerIdentity, "trust %s: its certificate expired at %s", peer.Identity, peer.until.Format(time.RFC3339))
	}
	return nil
}

// Until is when the certificates of peer, or our leaf, expire.
func (p *Peer) Until() time.Time {
	if p.leaf.NotAfter.Before(p.until) {
		return p.leaf.NotAfter
	}
	return p.until
}

// SameTerms says whether c and o trust the same, and the mesh asks the same of TLS.
func (c *Credentials) SameTerms(o *Credentials) bool {
	return c.snap.TrustDomain == o.snap.TrustDomain && reflect.DeepEqual(c.snap.TLS, o.snap.TLS) && reflect.DeepEqual(c.snap.Peers, o.snap.Peers) &&
		slices.EqualFunc(c.snap.Roots, o.snap.Roots, (*x509.Certificate).Equal)
}

// base is what both sides have in common, within limits. NextProtos stays empty: a native client offers h2, and a list
// without it would end the handshake.
func base(leaf *tls.Certificate, limits catalog.TLSLimits, secrets *record.Secrets) *tls.Config {
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
		KeyLogWriter:                secrets, // which stay in memory
		DynamicRecordSizingDisabled: true,    // the caller writes tens of kilobytes at a time
	}
}

// verify checks a peer's certificate: chain with the intermediates it sent, key usage, and exactly one URI SAN that is
// the SPIFFE ID of a service in our trust domain, or a peer's, by the roots of just that domain. Every error has ReasonPeerIdentity.
func (c *Credentials) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (Peer, error) {
	key := keyOf(chain, usage)
	if peer, ok := c.known.find(key); ok {
		return peer, nil
	}
	id, until, err := c.identify(chain, usage)
	if err != nil {
		return Peer{}, refuse(catalog.ReasonPeerIdentity, "verify the peer's certificate: %w", err)
	}
	peer := Peer{Identity: id, until: until}
	c.known.add(key, peer)
	return peer, nil
}

func (c *Credentials) identify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (id policy.Identity, until time.Time, err error) {
	if len(chain) == 0 {
		return id, until, errors.New("it sent none")
	}
	leaf := chain[0]
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	roots := c.roots
	if len(leaf.URIs) == 1 && c.peers[leaf.URIs[0].Host] != nil {
		roots = c.peers[leaf.URIs[0].Host]
	}
	options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}
	chains, err := leaf.Verify(options)
	if err != nil {
		return id, until, err
	}
	switch {
	case leaf.IsCA:
		return id, until, errors.New("it is a CA's, not a service's")
	case !slices.Contains(leaf.ExtKeyUsage, usage): // Verify lets a certificate without any usage pass
		return id, until, errors.New("its extended key usage is not for this side of TLS")
	case len(leaf.URIs) != 1:
		return id, until, fmt.Errorf("it has %d URI SANs instead of one", len(leaf.URIs))
	}
	id, err = policy.ParseIdentity(leaf.URIs[0].String())
	if err != nil {
		return id, until, err
	}
	if ours := id.TrustDomain == c.snap.TrustDomain; ours != (roots == c.roots) || !ours && roots != c.peers[id.TrustDomain] {
		return id, until, fmt.Errorf("its trust domain is %q and ours is %q", id.TrustDomain, c.snap.TrustDomain)
	}
	for _, chain := range chains {
		if first := firstExpiry(chain); first.After(until) {
			until = first
		}
	}
	return id, until, nil
}

func firstExpiry(chain []*x509.Certificate) time.Time {
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
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
	for _, peer := range c.snap.Peers { // who calls what was exported to it, by its own name for it here
		if strings.EqualFold(name, strings.Join([]string{service, "default", "default", peer.Name, "external", c.snap.TrustDomain}, ".")) {
			return nil
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

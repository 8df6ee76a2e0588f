package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/tests/netlab"
)

// badPeer is a certificate that nobody may accept.
type badPeer struct {
	name   string
	cert   *tls.Certificate
	reason catalog.Reason
}

// badPeers makes a certificate of service that is wrong in each way. usage is the one that it should have.
func badPeers(t *testing.T, root *mtlstest.Authority, id *url.URL, usage x509.ExtKeyUsage) []badPeer {
	other := x509.ExtKeyUsageClientAuth
	if usage == other {
		other = x509.ExtKeyUsageServerAuth
	}
	leaf := func(change func(*x509.Certificate)) *tls.Certificate { return root.Leaf(t, id.String(), change) }
	elsewhere := *id
	elsewhere.Host = "11111111-2222-3333-4444-555555555555.consul"
	stranger := mtlstest.NewRoot(t, func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: id.Host}} })
	alongside := stranger.Leaf(t, id.String())
	alongside.Certificate = append(alongside.Certificate[:1:1], stranger.Cert.Raw)
	bare := root.Intermediate(t).Leaf(t, id.String())
	bare.Certificate = bare.Certificate[:1]
	return []badPeer{
		{"wrong trust domain", leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{&elsewhere} }), catalog.ReasonPeerIdentity},
		{"expired", leaf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), catalog.ReasonPeerIdentity},
		{"self-signed", mtlstest.NewRoot(t, func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.URIs = false, x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{usage}, []*url.URL{id}
		}).Self(), catalog.ReasonPeerIdentity},
		{"of another mesh's root", stranger.Leaf(t, id.String()), catalog.ReasonPeerIdentity},
		{"of another mesh's root, which comes along", alongside, catalog.ReasonPeerIdentity},
		{"a CA's", leaf(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), catalog.ReasonPeerIdentity},
		{"two URI SANs", leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, &elsewhere) }), catalog.ReasonPeerIdentity},
		{"missing intermediate", bare, catalog.ReasonPeerIdentity},
		{"wrong extended key usage", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{other} }), catalog.ReasonPeerIdentity},
		{"no extended key usage", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), catalog.ReasonPeerIdentity},
	}
}

// spiffe is the identity of a service of the mesh.
func spiffe(root *mtlstest.Authority, service string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: root.Cert.URIs[0].Host, Path: "/ns/default/dc/dc1/svc/" + service}
}

// meet does a handshake with a mesh port from inside a workload's namespace and sends "peer" to the application behind it. It
// returns the server's certificate, if that came, and the application's answer or why there is none.
func (m *mesh) meet(from *netlab.Workload, at string, cert *tls.Certificate, change ...func(*tls.Config)) (server *x509.Certificate, answer string, err error) {
	m.t.Helper()
	raw, err := from.Namespace.Dial(m.ctx(), "tcp", at)
	m.must(err)
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(patience))
	config := &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection:   func(s tls.ConnectionState) error { server = s.PeerCertificates[0]; return nil },
	}
	if cert != nil { // also when the server's hints do not name its issuer
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	for _, f := range change {
		f(config)
	}
	conn := tls.Client(raw, config)
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return server, "", err
	}
	text := make([]byte, 512)
	n, err := conn.Read(text)
	if n > 0 {
		return server, string(text[:n]), nil
	}
	return server, "", err
}

// TestAClientWithABadCertificateNeverReachesTheApplication dials a mesh port with certificates that the mesh's own CA, or
// another, has signed.
func TestAClientWithABadCertificateNeverReachesTheApplication(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	server := m.serve(api, fmt.Sprintf(":%d", port))
	m.allow("api", "web")
	m.start()
	at, root := m.mesh(0, "api"), mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	id := spiffe(root, "web")
	none := badPeer{"no certificate", nil, catalog.ReasonHandshakeFailed}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, bad := range append(badPeers(t, root, id, x509.ExtKeyUsageClientAuth), none) {
			t.Run(fmt.Sprintf("%s, %s", tls.VersionName(version), bad.name), func(t *testing.T) {
				m := m.in(t)
				before := m.denials(1, bad.reason)
				_, answer, err := m.meet(web, at, bad.cert, func(c *tls.Config) { c.MinVersion, c.MaxVersion = version, version })
				if alert, ok := errors.AsType[*net.OpError](err); answer != "" || !ok || alert.Op != "remote error" {
					t.Errorf("the client got %q, %v; want an alert", answer, err)
				}
				m.comesToDenials(1, bad.reason, before+1)
			})
		}
	}
	if strings.Contains(server.Output(), "accepted") {
		t.Errorf("the application has accepted: %s", server.Output())
	}
	if _, answer, err := m.meet(web, at, root.Leaf(t, id.String())); !strings.Contains(answer, "accept=") {
		t.Errorf("a client with a good certificate got %q, %v", answer, err)
	}
}

// foreign is a server of the test's own at the mesh address of a service.
type foreign struct {
	certs  chan *tls.Certificate // for the next connection
	served chan served
	closed chan struct{} // at the end of the test
}

// served is what a connection was: whose, and what was read of it.
type served struct {
	peer *x509.Certificate
	text string
}

// foreignPeer defines a service on node 2 whose mesh port is the test's own TLS server.
func (m *mesh) foreignPeer(service string) *foreign {
	m.t.Helper()
	w, err := m.Nodes[1].Workload(service)
	m.must(err)
	m.must(m.DefineElsewhere(service, fmt.Sprintf("service {\n  name = %q\n  address = %q\n  port = %d\n  connect {\n    sidecar_service {\n      port = 8443\n    }\n  }\n}\n", service, w.IPv4, port)))
	ln, err := w.Namespace.Listen("tcp4", at(w.IPv4, 8443))
	m.must(err)
	f := &foreign{certs: make(chan *tls.Certificate, 1), served: make(chan served, 1), closed: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			f.serve(raw)
		}
	}()
	m.t.Cleanup(func() { ln.Close(); close(f.closed); <-done })
	return f
}

func (f *foreign) serve(raw net.Conn) {
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(patience))
	var cert *tls.Certificate
	select {
	case cert = <-f.certs:
	case <-f.closed:
		return // nobody should have come
	}
	conn := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{*cert}, ClientAuth: tls.RequireAnyClientCert})
	var got served
	text := make([]byte, 64)
	n, _ := conn.Read(text)
	got.text = string(text[:n])
	if peers := conn.ConnectionState().PeerCertificates; len(peers) > 0 {
		got.peer = peers[0]
	}
	if n > 0 {
		_, _ = io.WriteString(conn, "accept=foreign\n")
		_ = conn.CloseWrite()
		_, _ = conn.Read(text)
	}
	select {
	case f.served <- got:
	case <-f.closed:
	}
}

// TestAServerWithABadCertificateGetsNoByteOfTheApplications lets a daemon dial a server that is not who it should be.
func TestAServerWithABadCertificateGetsNoByteOfTheApplications(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	peer := m.foreignPeer("bank")
	m.allow("bank", "web")
	m.start()
	root := mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	id := spiffe(root, "bank")
	bad := append(badPeers(t, root, id, x509.ExtKeyUsageServerAuth),
		badPeer{"another service's", root.Leaf(t, spiffe(root, "web").String()), catalog.ReasonPeerIdentity})
	for _, bad := range bad {
		t.Run(bad.name, func(t *testing.T) {
			m := m.in(t)
			before := m.denials(0, bad.reason)
			peer.certs <- bad.cert
			// A reset that comes before the application has sent is told to its send.
			if out := m.dial(web, m.vip("bank"), "secret"); !strings.Contains(out, "end: reset") && !strings.Contains(out, "send: ") {
				t.Errorf("the application got: %s", out)
			}
			if got := <-peer.served; got.text != "" || got.peer != nil {
				t.Errorf("the server got %q, and the certificate of %v", got.text, got.peer)
			}
			m.comesToDenials(0, bad.reason, before+1)
		})
	}
	peer.certs <- root.Leaf(t, id.String())
	if out := m.dial(web, m.vip("bank"), "secret"); !strings.Contains(out, "accept=foreign") {
		t.Errorf("a server with a good certificate is not reached: %s", out)
	}
	if got := <-peer.served; got.text != "secret\n" {
		t.Errorf("it got %q", got.text)
	}
	// Nobody but the client's node enforces the intention here.
	m.deny("bank", "web")
	m.awaitGeneration(0)
	m.getsNothing(web, m.vip("bank"))
	m.comesToDenials(0, catalog.ReasonIntention, 1)
}

// comesToDenials waits until a node's counter of denials for a reason is n. The client may hear of its denial first.
func (m *mesh) comesToDenials(node int, reason catalog.Reason, n float64) {
	m.t.Helper()
	m.eventually("the refusal is counted", func() error {
		if now := m.denials(node, reason); now != n {
			return fmt.Errorf("%s is at %v and not at %v:\n%s", reason, now, n, m.series(node, "nodeproxy_denied_total"))
		}
		return nil
	})
}

// TestTheCertificateOnTheWireIsTheWorkloadsOwn looks at what peers are shown by two services of one node, as clients and as
// servers.
func TestTheCertificateOnTheWireIsTheWorkloadsOwn(t *testing.T) {
	m := newMesh(t)
	clients := map[string]*netlab.Workload{"web": m.place(0, "web"), "cart": m.place(0, "cart")}
	host, err := m.Nodes[0].HostWorkload("batch")
	m.must(err)
	m.Daemons[0].Enroll(host, "batch")
	m.define(0, "batch", 8081, host.IPv4)
	m.serve(host, ":8081")
	clients["batch"] = host
	peer := m.foreignPeer("bank")
	m.allow("bank", "web", "cart", "batch")
	m.allow("cart", "web")
	m.start()
	root := mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	want := func(what, service string, cert *x509.Certificate) {
		t.Helper()
		if cert == nil || len(cert.URIs) != 1 || cert.URIs[0].String() != spiffe(root, service).String() {
			t.Errorf("%s %s shows %+v", what, service, cert)
		}
	}
	for range 3 {
		for service, w := range clients {
			peer.certs <- root.Leaf(t, spiffe(root, "bank").String())
			m.reaches(w, m.vip("bank"))
			want("the client", service, (<-peer.served).peer)
			cert, _, _ := m.meet(clients["web"], m.mesh(0, service), root.Leaf(t, spiffe(root, "web").String()))
			want("the server", service, cert)
		}
	}
	// An SNI selects nothing: one of another service ends the handshake.
	sni := fmt.Sprintf("cart.default.dc1.internal.%s", root.Cert.URIs[0].Host)
	cert, answer, err := m.meet(clients["web"], m.mesh(0, "web"), root.Leaf(t, spiffe(root, "web").String()), func(c *tls.Config) { c.ServerName = sni })
	if err == nil || cert != nil {
		t.Errorf("web's port shows %+v and answers %q for cart's SNI", cert, answer)
	}
}

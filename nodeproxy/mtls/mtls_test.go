package mtls_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/mtls/record"
	"nodeproxy.io/policy"
)

const (
	trustDomain = "11111111-2222-3333-4444-555555555555.consul"
	sniAPI      = "api.default.dc1.internal." + trustDomain
	webURI      = "spiffe://" + trustDomain + "/ns/default/dc/dc1/svc/web"
	apiURI      = "spiffe://" + trustDomain + "/ns/default/dc/dc1/svc/api"
)

var apiIdentity = policy.Identity{TrustDomain: trustDomain, Namespace: "default", Datacenter: "dc1", Service: "api"}

func credentials(t testing.TB, roots []*mtlstest.Authority, leaves map[string]*tls.Certificate) *mtls.Credentials {
	t.Helper()
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: trustDomain}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := catalog.Snapshot{
		Generation: 1, TrustDomain: trustDomain, Datacenter: "dc1", Leaves: leaves, Policy: p,
		Services: map[string]*catalog.Service{"api": {Name: "api", Subsets: []string{"v2"}}, "web": {Name: "web"}, "v1.api": {Name: "v1.api"}},
	}
	for _, root := range roots {
		s.Roots = append(s.Roots, root.Cert)
	}
	snap, err := catalog.New(s)
	if err != nil {
		t.Fatal(err)
	}
	return mtls.New(snap, snap.Leaves)
}

// pair is two ends of a TCP connection over loopback, with a deadline for the whole test.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{client, server} {
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		t.Cleanup(func() { conn.Close() })
	}
	return client, server
}

type accepted struct {
	conn net.Conn
	done *mtls.Secured
	peer policy.Identity
	err  error
}

// accept runs the server's side for api as the proxy does: on error the connection is closed.
func accept(c *mtls.Credentials, conn net.Conn) <-chan accepted {
	result := make(chan accepted, 1)
	go func() {
		done, err := c.Accept(conn, "api", "", func() error { return nil })
		if err != nil {
			conn.Close()
			result <- accepted{err: err}
			return
		}
		result <- accepted{conn, done, done.Peer.Identity, nil}
	}()
	return result
}

// say sends a short text after a handshake.
func say(t testing.TB, conn net.Conn, done *mtls.Secured, text string) {
	t.Helper()
	if done.Older != nil {
		if _, err := io.WriteString(done.Older, text); err != nil {
			t.Error(err)
		}
		return
	}
	out := make([]byte, record.SealedSize(len(text)))
	n, err := done.Records.Seal(out, append([]byte(text), 0)[:len(text)])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(out[:n]); err != nil {
		t.Error(err)
	}
}

func wantReason(t *testing.T, err error, reason catalog.Reason, words string) {
	t.Helper()
	refusal, ok := errors.AsType[*catalog.Refusal](err)
	if !ok || refusal.Reason != reason {
		t.Fatalf("got %v (%q), want reason %q", err, catalog.ReasonOf(err, ""), reason)
	}
	if !strings.Contains(err.Error(), words) {
		t.Fatalf("error %q does not mention %q", err, words)
	}
}

// clientConfig is a peer that is not ours: it verifies nothing.
func clientConfig(leaf *tls.Certificate) *tls.Config {
	config := &tls.Config{InsecureSkipVerify: true, ServerName: sniAPI}
	if leaf != nil {
		config.Certificates = []tls.Certificate{*leaf}
	}
	return config
}

func TestBothSidesMeetAndCarryBytes(t *testing.T) {
	root := mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI), "web": root.Leaf(t, webURI)})
	client, server := pair(t)
	result := accept(c, server)
	done, err := c.Connect(client, "web", &catalog.Target{Service: "api"}, "")
	if err != nil {
		t.Fatal(err)
	}
	got := <-result
	if got.err != nil {
		t.Fatal(got.err)
	}
	if got.peer.String() != webURI {
		t.Fatalf("the server sees %s, want %s", got.peer, webURI)
	}
	if done.Protocol != "" || done.Records == nil || got.done.Records == nil {
		t.Fatalf("ALPN %q; TLS 1.3: %v and %v", done.Protocol, done.Records != nil, got.done.Records != nil)
	}
	say(t, client, done, "hello")
	received := make([]byte, record.SealedSize(5))
	n, err := server.Read(received)
	if err != nil {
		t.Fatal(err)
	}
	if _, size, err := got.done.Records.Open(received[:n]); err != nil || string(received[record.HeaderSize:][:size]) != "hello" {
		t.Fatalf("read %q, %v", received[record.HeaderSize:][:size], err)
	}
}

func TestServerRefusesClientCertificate(t *testing.T) {
	root, stranger := mtlstest.NewRoot(t), mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI)})
	bare := root.Intermediate(t).Leaf(t, webURI)
	bare.Certificate = bare.Certificate[:1]
	tests := []struct {
		name   string
		leaf   *tls.Certificate
		reason catalog.Reason
		words  string
	}{
		{"none", nil, catalog.ReasonHandshakeFailed, "certificate"},
		{"of a foreign root", stranger.Leaf(t, webURI), catalog.ReasonPeerIdentity, "unknown authority"},
		{"self-signed", selfSigned(t), catalog.ReasonPeerIdentity, "unknown authority"},
		{"missing intermediate", bare, catalog.ReasonPeerIdentity, "unknown authority"},
		{"expired", root.Leaf(t, webURI, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), catalog.ReasonPeerIdentity, "expired"},
		{"not yet valid", root.Leaf(t, webURI, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), catalog.ReasonPeerIdentity, "not yet valid"},
		{"wrong trust domain", root.Leaf(t, "spiffe://other.consul/ns/default/dc/dc1/svc/web"), catalog.ReasonPeerIdentity, "trust domain"},
		{"two URI SANs", root.Leaf(t, webURI, addURI(t, apiURI)), catalog.ReasonPeerIdentity, "2 URI SANs"},
		{"no URI SAN", root.Leaf(t, webURI, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"web"} }), catalog.ReasonPeerIdentity, "0 URI SANs"},
		{"a gateway's", root.Leaf(t, "spiffe://"+trustDomain+"/gateway/mesh/dc/dc1"), catalog.ReasonPeerIdentity, "SPIFFE"},
		{"server only", root.Leaf(t, webURI, usage(x509.ExtKeyUsageServerAuth)), catalog.ReasonPeerIdentity, "key usage"},
		{"no usage", root.Leaf(t, webURI, usage()), catalog.ReasonPeerIdentity, "key usage"},
		{"a CA's", root.Leaf(t, webURI, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), catalog.ReasonPeerIdentity, "CA"},
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, tt := range tests {
			t.Run(tls.VersionName(version)+"/"+tt.name, func(t *testing.T) {
				client, server := pair(t)
				result := accept(c, server)
				config := clientConfig(tt.leaf)
				config.MaxVersion = version
				peer := tls.Client(client, config)
				go peer.Write([]byte("secret"))
				got := <-result
				if got.err == nil {
					t.Fatal("the server accepted it")
				}
				wantReason(t, got.err, tt.reason, tt.words)
				if _, err := peer.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
					t.Fatalf("the client read %v, want to be told of the refusal", err)
				}
			})
		}
	}
}

func selfSigned(t testing.TB) *tls.Certificate {
	stranger := mtlstest.NewRoot(t)
	leaf := stranger.Leaf(t, webURI)
	leaf.Certificate = append(leaf.Certificate, stranger.Cert.Raw)
	return leaf
}

func addURI(t testing.TB, uri string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.URIs = append(c.URIs, mtlstest.URI(t, uri)) }
}

func usage(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = u }
}

func TestClientRefusesServerCertificate(t *testing.T) {
	root, stranger := mtlstest.NewRoot(t), mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"web": root.Leaf(t, webURI)})
	tests := []struct {
		name  string
		leaf  *tls.Certificate
		words string
	}{
		{"of a foreign root", stranger.Leaf(t, apiURI), "unknown authority"},
		{"another service's", root.Leaf(t, webURI), "svc/web"},
		{"another datacenter's", root.Leaf(t, "spiffe://"+trustDomain+"/ns/default/dc/dc2/svc/api"), "dc/dc2"},
		{"another namespace's", root.Leaf(t, "spiffe://"+trustDomain+"/ns/other/dc/dc1/svc/api"), "ns/other"},
		{"another partition's", root.Leaf(t, "spiffe://"+trustDomain+"/ap/other/ns/default/dc/dc1/svc/api"), "ap/other"},
		{"another trust domain's", root.Leaf(t, "spiffe://other.consul/ns/default/dc/dc1/svc/api"), "trust domain"},
		{"expired", root.Leaf(t, apiURI, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "expired"},
		{"two URI SANs", root.Leaf(t, apiURI, addURI(t, webURI)), "2 URI SANs"},
		{"client only", root.Leaf(t, apiURI, usage(x509.ExtKeyUsageClientAuth)), "key usage"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, server := pair(t)
			go tls.Server(server, &tls.Config{Certificates: []tls.Certificate{*tt.leaf}, ClientAuth: tls.RequireAnyClientCert}).Handshake()
			_, err := c.Connect(client, "web", &catalog.Target{Service: "api"}, "")
			wantReason(t, err, catalog.ReasonPeerIdentity, tt.words)
		})
	}
}

func TestSNI(t *testing.T) {
	root := mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI)})
	leaf := root.Leaf(t, webURI)
	tests := map[string]bool{
		"":                                      true,
		sniAPI:                                  true,
		"API" + sniAPI[3:]:                      true,
		"v2." + sniAPI:                          true,
		"v3." + sniAPI:                          false, // no such subset
		"v1." + sniAPI:                          false, // another service's whole name
		"web" + sniAPI[3:]:                      false,
		"api":                                   false,
		"api.example.com":                       false,
		sniAPI + ".example":                     false,
		"api.default.dc1.internal.other.consul": false,
		"api.default.default.dc1.internal-v1." + "td": false,
	}
	for name, want := range tests {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t)
			result := accept(c, server)
			config := clientConfig(leaf)
			config.ServerName = name
			go tls.Client(client, config).Handshake()
			got := <-result
			if !want {
				wantReason(t, got.err, catalog.ReasonHandshakeFailed, "SNI")
			} else if got.err != nil {
				t.Fatal(got.err)
			}
		})
	}
}

func TestWhatPeersOffer(t *testing.T) {
	root := mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI)})
	leaf := root.Leaf(t, webURI)
	tests := []struct {
		name   string
		change func(*tls.Config)
		ok     bool
	}{
		{"a native client's h2", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, true},
		{"TLS 1.2 at most", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		{"TLS 1.2 and h2", func(c *tls.Config) { c.MaxVersion, c.NextProtos = tls.VersionTLS12, []string{"h2"} }, true},
		{"a session cache", func(c *tls.Config) { c.ClientSessionCache = noTickets{t} }, true},
		{"TLS 1.2 and a session cache", func(c *tls.Config) { c.MaxVersion, c.ClientSessionCache = tls.VersionTLS12, noTickets{t} }, true},
		{"TLS 1.1 at most", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		{"TLS 1.2 with CBC alone", func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			config := clientConfig(leaf)
			tt.change(config)
			for range 2 { // the second would resume a session
				client, server := pair(t)
				result := accept(c, server)
				peer := tls.Client(client, config)
				handshake := peer.Handshake()
				got := <-result
				if !tt.ok {
					wantReason(t, got.err, catalog.ReasonHandshakeFailed, "tls:")
					continue
				}
				if handshake != nil || got.err != nil {
					t.Fatalf("client: %v, server: %v", handshake, got.err)
				}
				say(t, got.conn, got.done, "x") // a session ticket would come before it
				if _, err := peer.Read(make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
				if state := peer.ConnectionState(); state.NegotiatedProtocol != "" || state.DidResume {
					t.Fatalf("ALPN %q, resumed %v", state.NegotiatedProtocol, state.DidResume)
				}
				got.conn.Close()
			}
		})
	}
}

// noTickets is a client's session cache that must not be given anything.
type noTickets struct{ t *testing.T }

func (noTickets) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (n noTickets) Put(string, *tls.ClientSessionState) {
	n.t.Error("the server issued a session ticket")
}

func TestIntermediatesThatThePeerSendsAreUsed(t *testing.T) {
	old, root := mtlstest.NewRoot(t), mtlstest.NewRoot(t)
	cross := root.CrossSignedBy(t, old)
	tests := map[string]struct{ roots, signs *mtlstest.Authority }{
		"plain intermediate":          {root, root.Intermediate(t)},
		"cross-signed, old root":      {old, cross},
		"cross-signed, new root":      {root, cross},
		"new root, intermediate kept": {root, root},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			// Each side knows one root alone; the other's leaf must lead there.
			server := credentials(t, []*mtlstest.Authority{tt.roots}, map[string]*tls.Certificate{"api": tt.signs.Leaf(t, apiURI)})
			client := credentials(t, []*mtlstest.Authority{tt.roots}, map[string]*tls.Certificate{"web": tt.signs.Leaf(t, webURI)})
			here, there := pair(t)
			result := accept(server, there)
			if _, err := client.Connect(here, "web", &catalog.Target{Service: "api"}, ""); err != nil {
				t.Fatal(err)
			}
			if got := <-result; got.err != nil {
				t.Fatal(got.err)
			}
		})
	}
}

func TestNoValidLeafOfOurOwn(t *testing.T) {
	root := mtlstest.NewRoot(t)
	expired := root.Leaf(t, apiURI, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	for name, leaves := range map[string]map[string]*tls.Certificate{"missing": nil, "expired": {"api": expired}} {
		t.Run(name, func(t *testing.T) {
			c := credentials(t, []*mtlstest.Authority{root}, leaves)
			_, err := c.Accept(nil, "api", "", func() error { return nil }) // nil: nothing may be read or sent
			wantReason(t, err, catalog.ReasonNoCertificate, `"api"`)
			_, err = c.Connect(nil, "api", &catalog.Target{Service: "web"}, "")
			wantReason(t, err, catalog.ReasonNoCertificate, `"api"`)
		})
	}
}

func TestHandshakeEndsAtTheDeadline(t *testing.T) {
	root := mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI)})
	_, server := pair(t)
	server.SetDeadline(time.Now().Add(50 * time.Millisecond))
	got := <-accept(c, server)
	wantReason(t, got.err, catalog.ReasonHandshakeFailed, "timeout")
}

func TestIdentityWithAnEncodedSegment(t *testing.T) {
	root := mtlstest.NewRoot(t)
	c := credentials(t, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(t, apiURI)})
	id := apiIdentity
	id.Service = "a b/c"
	client, server := pair(t)
	result := accept(c, server)
	leaf := root.Leaf(t, apiURI, func(c *x509.Certificate) { c.URIs = []*url.URL{id.URL()} })
	go tls.Client(client, clientConfig(leaf)).Handshake()
	if got := <-result; got.err != nil || got.peer != id {
		t.Fatalf("got %v, %v; want %v", got.peer, got.err, id)
	}
}

func FuzzClientHello(f *testing.F) {
	root := mtlstest.NewRoot(f)
	c := credentials(f, []*mtlstest.Authority{root}, map[string]*tls.Certificate{"api": root.Leaf(f, apiURI)})
	for _, config := range []*tls.Config{clientConfig(nil), {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}} {
		f.Add(clientHello(config))
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{22, 3, 1, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, hostile []byte) {
		client, server := net.Pipe()
		defer client.Close()
		server.SetDeadline(time.Now().Add(10 * time.Second))
		result := accept(c, server)
		go io.Copy(io.Discard, client)
		client.SetWriteDeadline(time.Now().Add(10 * time.Second))
		client.Write(hostile)
		client.Close()
		if got := <-result; got.err == nil {
			t.Fatal("a peer without a certificate was accepted")
		} else if _, ok := errors.AsType[*catalog.Refusal](got.err); !ok {
			t.Fatalf("error without a reason: %v", got.err)
		}
	})
}

func clientHello(config *tls.Config) []byte {
	client, server := net.Pipe()
	defer server.Close()
	go func() {
		tls.Client(client, config).Handshake()
		client.Close()
	}()
	buf := make([]byte, 4096)
	n, _ := server.Read(buf)
	return buf[:n]
}

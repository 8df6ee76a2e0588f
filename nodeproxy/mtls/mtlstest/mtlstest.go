// Package mtlstest issues certificates for tests: of a mesh, and wrong in every way a peer's certificate can be.
package mtlstest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority signs certificates. It is the root, or an intermediate that leaves carry with them.
type Authority struct {
	Cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	chain [][]byte // what a leaf carries after itself
}

// NewRoot makes a self-signed authority, after change has had its way with it.
func NewRoot(tb testing.TB, change ...func(*x509.Certificate)) *Authority {
	tb.Helper()
	key := newKey(tb)
	template := caTemplate()
	for _, f := range change {
		f(template)
	}
	return &Authority{Cert: sign(tb, template, template, key.Public(), key), key: key}
}

// Read is the authority that a mesh directory keeps in dir, its ca.
func Read(tb testing.TB, dir string) *Authority {
	tb.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "root.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		tb.Fatal(err)
	}
	return &Authority{Cert: pair.Leaf, key: pair.PrivateKey.(*ecdsa.PrivateKey)}
}

// Write makes a the authority of the mesh directory whose ca is dir.
func (a *Authority) Write(tb testing.TB, dir string) {
	tb.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		tb.Fatal(err)
	}
	for _, f := range []struct {
		name  string
		block pem.Block
		mode  os.FileMode
	}{{"key.pem", pem.Block{Type: "PRIVATE KEY", Bytes: key}, 0o600}, {"root.pem", pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw}, 0o644}} {
		if err := os.WriteFile(filepath.Join(dir, f.name), pem.EncodeToMemory(&f.block), f.mode); err != nil {
			tb.Fatal(err)
		}
	}
}

// Self is the authority's own certificate, as a peer would use it.
func (a *Authority) Self() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{a.Cert.Raw}, PrivateKey: a.key, Leaf: a.Cert}
}

// PEM is the certificate and the key of a, as a configuration takes them.
func (a *Authority) PEM(tb testing.TB) (cert, key string) {
	tb.Helper()
	der, err := x509.MarshalECPrivateKey(a.key)
	if err != nil {
		tb.Fatal(err)
	}
	cert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw}))
	return cert, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}

// Intermediate makes an authority signed by a; its leaves carry its certificate.
func (a *Authority) Intermediate(tb testing.TB) *Authority {
	tb.Helper()
	key := newKey(tb)
	cert := sign(tb, caTemplate(), a.Cert, key.Public(), a.key)
	return &Authority{Cert: cert, key: key, chain: append([][]byte{cert.Raw}, a.chain...)}
}

// CrossSignedBy is a, whose leaves carry a certificate of a's key signed by old: peers that know old alone trust them.
func (a *Authority) CrossSignedBy(tb testing.TB, old *Authority) *Authority {
	tb.Helper()
	template := *a.Cert
	template.SerialNumber = serial(tb)
	template.AuthorityKeyId = nil
	cross := sign(tb, &template, old.Cert, a.key.Public(), old.key)
	return &Authority{Cert: a.Cert, key: a.key, chain: [][]byte{cross.Raw}}
}

// Leaf issues a certificate of one URI SAN for both sides of TLS, as Consul does, after change has had its way with it.
func (a *Authority) Leaf(tb testing.TB, uri string, change ...func(*x509.Certificate)) *tls.Certificate {
	tb.Helper()
	key := newKey(tb)
	template := &x509.Certificate{
		SerialNumber: serial(tb),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:         []*url.URL{URI(tb, uri)},
	}
	for _, f := range change {
		f(template)
	}
	cert := sign(tb, template, a.Cert, key.Public(), a.key)
	return &tls.Certificate{Certificate: append([][]byte{cert.Raw}, a.chain...), PrivateKey: key, Leaf: cert}
}

// URI parses s.
func URI(tb testing.TB, s string) *url.URL {
	tb.Helper()
	u, err := url.Parse(s)
	if err != nil {
		tb.Fatal(err)
	}
	return u
}

func caTemplate() *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: "mesh " + rand.Text()},
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func serial(tb testing.TB) *big.Int {
	tb.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

func sign(tb testing.TB, template, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

package file

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"nodeproxy.io/policy"
)

const (
	caDir   = "ca"
	rootPEM = "root.pem"
	keyPEM  = "key.pem"

	rootLife  = 10 * 365 * 24 * time.Hour
	leafLife  = 72 * time.Hour
	clockSkew = time.Minute // certificates are valid from so long ago, for nodes whose clocks are behind

	maxPEM = 1 << 20
)

// authority is the built-in CA as it is on disk.
//
// root.pem holds the root that signs, then the older roots that are still trusted, then the cross-signed intermediates,
// each being a newer root's key signed by an older root. key.pem holds the key of the root that signs; while a rotation
// is written also the key before it.
type authority struct {
	trustDomain   string
	key           *ecdsa.PrivateKey
	roots         []*x509.Certificate // the signing one first
	intermediates []*x509.Certificate // the newest first
}

// equal says whether a and b sign and trust the same.
func (a *authority) equal(b *authority) bool {
	same := func(x, y *x509.Certificate) bool { return x.Equal(y) }
	return a != nil && b != nil && slices.EqualFunc(a.roots, b.roots, same) && slices.EqualFunc(a.intermediates, b.intermediates, same)
}

// openAuthority reads the CA of the mesh directory dir, and makes one when there is none and create is set. Several
// processes may call it at once: all get the same.
func openAuthority(ctx context.Context, dir string, now time.Time, create bool) (*authority, error) {
	_, err := os.Stat(filepath.Join(dir, caDir, rootPEM))
	if err == nil {
		return readAuthority(dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if !create {
		return nil, fmt.Errorf("read CA: %s is gone: restore it; to start a new mesh, stop every daemon that uses the directory first",
			filepath.Join(dir, caDir, rootPEM))
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := createAuthority(dir, now); err != nil {
		return nil, err
	}
	return readAuthority(dir)
}

// createAuthority makes a CA in dir, whose lock is held, unless there is one. root.pem is written last and makes it valid.
func createAuthority(dir string, now time.Time) error {
	ca := filepath.Join(dir, caDir)
	if _, err := os.Stat(filepath.Join(ca, rootPEM)); err == nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(ca, keyPEM)); err == nil {
		return fmt.Errorf("create CA: %s is there without %s: restore that, or remove the key to start a new mesh", filepath.Join(ca, keyPEM), rootPEM)
	}
	if err := os.MkdirAll(ca, 0o755); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	a, err := newAuthority(newUUID()+".consul", now)
	if err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	if err := a.writeKeys(ca, a.key); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	if err := a.writeRoots(ca); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	return nil
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])  // never fails
	b[6] = b[6]&0x0f | 0x40 // version 4
	b[8] = b[8]&0x3f | 0x80 // RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// newAuthority makes a key and its self-signed root.
func newAuthority(trustDomain string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: fmt.Sprintf("nodeproxy mesh CA %.8x", serial.Bytes())},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(rootLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	root, err := sign(template, template, key, key)
	if err != nil {
		return nil, err
	}
	return &authority{trustDomain: trustDomain, key: key, roots: []*x509.Certificate{root}}, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func sign(template, parent *x509.Certificate, subject, issuer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.Public(), issuer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Rotate gives the mesh directory dir a new root. The old root signs it as an intermediate, which the leaves then carry, so that a node that
// has not seen the new root yet verifies them too; the old root stays trusted until it expires or somebody removes it
// from ca/root.pem. Running daemons see the change and issue new leaves at once. A crash in the middle leaves the old
// root in force.
func Rotate(ctx context.Context, dir string) error { return rotate(ctx, dir, time.Now()) }

func rotate(ctx context.Context, dir string, now time.Time) error {
	unlock, err := lock(ctx, dir)
	if err != nil {
		return fmt.Errorf("rotate CA: %w", err)
	}
	defer unlock()
	old, err := readAuthority(dir)
	if err != nil {
		return fmt.Errorf("rotate CA: %w", err)
	}
	next, err := newAuthority(old.trustDomain, now)
	if err != nil {
		return fmt.Errorf("rotate CA: %w", err)
	}
	cross, err := old.crossSign(next)
	if err != nil {
		return fmt.Errorf("rotate CA: %w", err)
	}
	valid := func(certs []*x509.Certificate) []*x509.Certificate {
		return slices.DeleteFunc(slices.Clone(certs), func(c *x509.Certificate) bool { return now.After(c.NotAfter) })
	}
	next.roots = append(next.roots, valid(old.roots)...)
	next.intermediates = append([]*x509.Certificate{cross}, valid(old.intermediates)...)

	ca := filepath.Join(dir, caDir)
	if err := next.writeKeys(ca, next.key, old.key); err != nil {
		return fmt.Errorf("rotate CA: %w", err)
	}
	if err := next.writeRoots(ca); err != nil { // from here on next is in force
		return fmt.Errorf("rotate CA: %w", err)
	}
	if err := next.writeKeys(ca, next.key); err != nil {
		return fmt.Errorf("rotate CA: remove the old key: %w", err)
	}
	return nil
}

// crossSign makes an intermediate of next's root, signed by a.
func (a *authority) crossSign(next *authority) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := *next.roots[0]
	template.SerialNumber = serial
	if template.NotAfter.After(a.roots[0].NotAfter) {
		template.NotAfter = a.roots[0].NotAfter
	}
	return sign(&template, a.roots[0], next.key, a.key)
}

func (a *authority) writeRoots(ca string) error {
	var out bytes.Buffer
	for _, c := range slices.Concat(a.roots, a.intermediates) {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return write(filepath.Join(ca, rootPEM), out.Bytes(), 0o644)
}

func (a *authority) writeKeys(ca string, keys ...*ecdsa.PrivateKey) error {
	var out bytes.Buffer
	for _, key := range keys {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		_ = pem.Encode(&out, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	return write(filepath.Join(ca, keyPEM), out.Bytes(), 0o600)
}

// readAuthority reads both files without a lock. When the key does not fit and the roots are others by then, a rotation
// has come between, and it reads again.
func readAuthority(dir string) (*authority, error) {
	var before *authority
	for {
		a := &authority{}
		if err := a.readRoots(filepath.Join(dir, caDir, rootPEM)); err != nil {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		err := a.readKey(filepath.Join(dir, caDir, keyPEM))
		if err == nil {
			return a, nil
		}
		if a.equal(before) {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		before = a
	}
}

func (a *authority) readRoots(path string) error {
	blocks, _, err := readPEM(path)
	if err != nil {
		return err
	}
	for _, b := range blocks {
		cert, err := x509.ParseCertificate(b.Bytes)
		switch {
		case b.Type != "CERTIFICATE":
			return fmt.Errorf("%s: holds a %q: only certificates belong there", path, b.Type)
		case err != nil:
			return fmt.Errorf("%s: %w", path, err)
		case !cert.IsCA || len(cert.URIs) != 1 || cert.URIs[0].Scheme != "spiffe":
			return fmt.Errorf("%s: certificate %q is no mesh root: it has no spiffe:// trust domain", path, cert.Subject.CommonName)
		}
		if a.trustDomain == "" {
			a.trustDomain = cert.URIs[0].Host
		}
		if cert.URIs[0].Host != a.trustDomain {
			return fmt.Errorf("%s: holds two trust domains, %s and %s: remove the roots of one", path, a.trustDomain, cert.URIs[0].Host)
		}
		if bytes.Equal(cert.RawSubject, cert.RawIssuer) {
			a.roots = append(a.roots, cert)
		} else {
			a.intermediates = append(a.intermediates, cert)
		}
	}
	if len(a.roots) == 0 {
		return fmt.Errorf("%s: holds no root: restore it", path)
	}
	return nil
}

func (a *authority) readKey(path string) error {
	blocks, mode, err := readPEM(path)
	if err != nil {
		return err
	}
	if mode.Perm()&0o077 != 0 {
		return fmt.Errorf("%s: others than its owner may read it (mode %04o): chmod 600 it, and rotate the root if somebody did", path, mode.Perm())
	}
	for _, b := range blocks {
		parsed, err := x509.ParsePKCS8PrivateKey(b.Bytes)
		if err != nil {
			return fmt.Errorf("%s: not a private key: restore it", path) // the parser's error could quote the key
		}
		if key, ok := parsed.(*ecdsa.PrivateKey); ok && key.PublicKey.Equal(a.roots[0].PublicKey) {
			a.key = key
			return nil
		}
	}
	return fmt.Errorf("%s: holds no EC key of the first certificate in %s: restore it", path, rootPEM)
}

// readPEM reads a small PEM file with nothing but blocks in it.
func readPEM(path string) ([]*pem.Block, fs.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPEM))
	if err != nil {
		return nil, 0, err
	}
	var blocks []*pem.Block
	for {
		var b *pem.Block
		b, data = pem.Decode(data)
		if b == nil {
			break
		}
		blocks = append(blocks, b)
	}
	if len(blocks) == 0 || len(bytes.TrimSpace(data)) > 0 {
		return nil, 0, fmt.Errorf("%s: not PEM, or more than that: restore it", path)
	}
	return blocks, info.Mode(), nil
}

// issue makes a leaf as Consul does: EC P-256, no subject, one URI SAN, for clients and servers.
func (a *authority) issue(id policy.Identity, now time.Time) (*tls.Certificate, error) {
	if now.After(a.roots[0].NotAfter) {
		return nil, fmt.Errorf("issue leaf: the root expired at %s: rotate it", a.roots[0].NotAfter)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	notAfter := now.Add(leafLife)
	if notAfter.After(a.roots[0].NotAfter) {
		notAfter = a.roots[0].NotAfter
	}
	leaf, err := sign(&x509.Certificate{
		SerialNumber:          serial,
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, a.roots[0], key, a.key)
	if err != nil {
		return nil, err
	}
	chain := [][]byte{leaf.Raw}
	for _, c := range a.intermediates {
		if now.Before(c.NotAfter) {
			chain = append(chain, c.Raw)
		}
	}
	return &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}, nil
}

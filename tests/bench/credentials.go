package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// credentials are the files of the peers: a root, and what each side shows, of the shape that Connect's have.
type credentials struct {
	root      string
	near, far identity
}

// identity is one side's certificate, its key, and both in one file.
type identity struct{ certificate, key, both string }

func newCredentials(dir string) (*credentials, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root of a benchmark"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, err
	}
	c := &credentials{root: filepath.Join(dir, "root.pem")}
	if err := os.WriteFile(c.root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return nil, err
	}
	for i, side := range []struct {
		name string
		to   *identity
	}{{"near", &c.near}, {"far", &c.far}} {
		if *side.to, err = issue(dir, side.name, int64(i+2), root, key); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func issue(dir, name string, serial int64, root *x509.Certificate, by *ecdsa.PrivateKey) (id identity, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return id, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: root.NotBefore, NotAfter: root.NotAfter, DNSNames: []string{name},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: "bench.consul", Path: "/ns/default/dc/dc1/svc/" + name}},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), by)
	if err != nil {
		return id, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return id, err
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	id = identity{filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem"), filepath.Join(dir, name+"-both.pem")}
	return id, errors.Join(
		os.WriteFile(id.certificate, certificate, 0o644),
		os.WriteFile(id.key, private, 0o600),
		os.WriteFile(id.both, append(certificate, private...), 0o600),
	)
}

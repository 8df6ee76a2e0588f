package catalog

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/gob"
	"errors"
	"fmt"
	"time"
)

// Remembered is a snapshot as a store keeps it, for the daemon that runs next.
type Remembered struct {
	Snapshot *Snapshot
	Kind     string    // of the source: Health.Kind
	Location string    // Health.Location
	Updated  time.Time // Health.Updated: when the snapshot was last known to be current
}

// encoding is in front of what Encode writes. Raise the number when a field changes its meaning.
const encoding = "nodeproxy snapshot 1\n"

// encoded is a Remembered whose certificates are in DER. Fields that are added to a Snapshot are in it without more ado.
type encoded struct {
	Snapshot Snapshot // without Roots and Leaves
	Roots    [][]byte
	Leaves   map[string]encodedLeaf

	Kind, Location string
	Updated        time.Time
}

type encodedLeaf struct {
	Chain [][]byte
	Key   []byte // PKCS #8
}

// Encode writes r whole, the private keys of its leaves too: the result must never reach a disk.
func (r *Remembered) Encode() ([]byte, error) {
	e := encoded{Snapshot: *r.Snapshot, Leaves: make(map[string]encodedLeaf), Kind: r.Kind, Location: r.Location, Updated: r.Updated}
	e.Snapshot.Roots, e.Snapshot.Leaves = nil, nil
	for _, root := range r.Snapshot.Roots {
		e.Roots = append(e.Roots, root.Raw)
	}
	for service, leaf := range r.Snapshot.Leaves {
		key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
		if err != nil {
			return nil, fmt.Errorf("encode the key of %q: %w", service, err)
		}
		e.Leaves[service] = encodedLeaf{leaf.Certificate, key}
	}
	b := bytes.NewBufferString(encoding)
	if err := gob.NewEncoder(b).Encode(e); err != nil {
		return nil, fmt.Errorf("encode the snapshot: %w", err)
	}
	return b.Bytes(), nil
}

// ErrOtherEncoding says that what is to be decoded was written by a version that writes it in another way.
var ErrOtherEncoding = errors.New("it was written by another version")

// Decode reads what Encode wrote, and checks it as New does.
func Decode(text []byte) (*Remembered, error) {
	rest, ok := bytes.CutPrefix(text, []byte(encoding))
	if !ok {
		return nil, ErrOtherEncoding
	}
	var e encoded
	if err := gob.NewDecoder(bytes.NewReader(rest)).Decode(&e); err != nil {
		return nil, fmt.Errorf("decode the snapshot: %w", err)
	}
	s := e.Snapshot
	for _, der := range e.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("decode a root: %w", err)
		}
		s.Roots = append(s.Roots, root)
	}
	s.Leaves = make(map[string]*tls.Certificate, len(e.Leaves))
	for service, leaf := range e.Leaves {
		cert, err := leaf.decode()
		if err != nil {
			return nil, fmt.Errorf("decode the certificate of %q: %w", service, err)
		}
		s.Leaves[service] = cert
	}
	snap, err := New(s)
	if err != nil {
		return nil, err
	}
	return &Remembered{Snapshot: snap, Kind: e.Kind, Location: e.Location, Updated: e.Updated}, nil
}

func (l *encodedLeaf) decode() (*tls.Certificate, error) {
	if len(l.Chain) == 0 {
		return nil, errors.New("it is missing")
	}
	cert, err := x509.ParseCertificate(l.Chain[0])
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(l.Key)
	if err != nil {
		return nil, err
	}
	own, ok := key.(crypto.Signer)
	public, hasEqual := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !hasEqual || !public.Equal(own.Public()) {
		return nil, errors.New("the key is another's")
	}
	return &tls.Certificate{Certificate: l.Chain, PrivateKey: key, Leaf: cert}, nil
}

package record

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"

	"nodeproxy.io/nodeproxy/mtls/aesgcm"
)

// suite is what a cipher suite of TLS 1.3 stands for.
type suite struct {
	hash func() hash.Hash
	key  int // bytes
	aead func(key []byte) (cipher.AEAD, error)
}

var suites = map[uint16]*suite{
	tls.TLS_AES_128_GCM_SHA256:       {sha256.New, 16, aesgcm.New},
	tls.TLS_AES_256_GCM_SHA384:       {sha512.New384, 32, aesgcm.New},
	tls.TLS_CHACHA20_POLY1305_SHA256: {sha256.New, chacha20poly1305.KeySize, chacha20poly1305.New},
}

const nonceSize = 12

// direction is the keys of one direction, and how many records they have protected.
type direction struct {
	suite  *suite
	secret []byte // the traffic secret, from which the next one is made
	aead   cipher.AEAD
	iv     [nonceSize]byte
	nonce  [nonceSize]byte
	count  uint64
}

// use makes d protect with the keys of a traffic secret, which it keeps.
func (d *direction) use(secret []byte) error {
	key, err := d.suite.expand(secret, "key", d.suite.key)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := d.suite.expand(secret, "iv", nonceSize)
	if err != nil {
		return err
	}
	if d.aead, err = d.suite.aead(key); err != nil {
		return fmt.Errorf("use a traffic secret: %w", err)
	}
	copy(d.iv[:], iv)
	d.secret, d.count = secret, 0
	return nil
}

// update takes the next generation of keys (RFC 8446, section 7.2).
func (d *direction) update() error {
	old := d.secret
	defer clear(old)
	next, err := d.suite.expand(old, "traffic upd", len(old))
	if err != nil {
		return err
	}
	return d.use(next)
}

// next is the nonce of the next record.
func (d *direction) next() []byte {
	d.nonce = d.iv
	low := d.nonce[nonceSize-8:]
	binary.BigEndian.PutUint64(low, binary.BigEndian.Uint64(low)^d.count)
	d.count++
	return d.nonce[:]
}

// expand is HKDF-Expand-Label without a context (RFC 8446, section 7.1).
func (s *suite) expand(secret []byte, label string, size int) ([]byte, error) {
	label = "tls13 " + label
	info := string([]byte{byte(size >> 8), byte(size), byte(len(label))}) + label + "\x00"
	p, err := hkdf.Expand(s.hash, secret, info, size)
	if err != nil {
		return nil, fmt.Errorf("derive a key: %w", err)
	}
	return p, nil
}

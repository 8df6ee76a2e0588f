// Package aesgcm is AES-GCM (NIST SP 800-38D) as a cipher.AEAD that encrypts sixteen blocks at a time where the
// processor has AES and carry-less multiplication on 512-bit registers (VAES, VPCLMULQDQ, AVX-512). Elsewhere, and
// where FIPS 140 is asked for, it is crypto/cipher's.
//
// It keeps half a KiB for each key and allocates nothing for a message. Which instructions run and which memory is
// read depends on lengths alone, never on keys or text.
package aesgcm

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
)

// New returns AES-GCM with nonces of 12 and tags of 16 bytes, safe for concurrent use. Its Seal and Open keep the
// whole contract of cipher.AEAD: they append to dst, work in place where input and output begin at the same byte,
// panic for a nonce of another length, a partial overlap, or a message of more than 2^36-32 bytes, and Open clears
// what it wrote before it returns an error. The error is an aes.KeySizeError.
//
// With fips140=only crypto/cipher refuses nonces that its caller makes: records are for crypto/tls alone there.
func New(key []byte) (cipher.AEAD, error) {
	return choose(key, vectors() && !fips140.Enabled())
}

// choose takes crypto/cipher's also for keys of 192 bits, which TLS has no use for.
func choose(key []byte, vectors bool) (cipher.AEAD, error) {
	if vectors && (len(key) == 16 || len(key) == 32) {
		return newVector(key), nil
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

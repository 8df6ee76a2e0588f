package aesgcm

import (
	"crypto/cipher"
	"crypto/subtle"
	"errors"
	"slices"
	"unsafe"

	"golang.org/x/sys/cpu"
)

const (
	blockSize  = 16
	nonceSize  = 12
	tagSize    = 16
	maxMessage = (1<<32 - 2) * blockSize // the counter has 32 bits, and its first value is the tag's
)

// vectors tells whether processor and system have all that the assembly needs; HasAVX512 is only set where the system
// keeps 512-bit registers.
func vectors() bool {
	x := &cpu.X86
	return x.HasAVX512 && x.HasAVX512F && x.HasAVX512BW && x.HasAVX512DQ && x.HasAVX512VL &&
		x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ && x.HasAES && x.HasBMI2
}

// vector is a key, in the layout that the assembly knows and alone reads and writes. The powers come first: reads of
// four of them may go past the last, into the keys, for blocks that are zero.
type vector struct {
	_      [16][blockSize]byte // the powers H^16 … H^1, each times x and with its bytes reversed
	_      [15][blockSize]byte // the keys of 10 or 14 rounds and the first
	rounds uint64
}

// expand writes keys and powers for the key, of 16 bytes if v.rounds is 10, of 32 if it is 14.
//
//go:noescape
func expand(v *vector, key *byte)

// crypt encrypts, or decrypts if open, n bytes from src to dst, which are the same or apart, and computes their tag.
//
//go:noescape
func crypt(v *vector, open bool, dst, src *byte, n uint64, nonce, data *byte, dataLen uint64, tag *[tagSize]byte)

func newVector(key []byte) cipher.AEAD {
	v := &vector{rounds: uint64(len(key)/4 + 6)}
	expand(v, &key[0])
	return v
}

func (*vector) NonceSize() int { return nonceSize }

func (*vector) Overhead() int { return tagSize }

func (v *vector) Seal(dst, nonce, plaintext, additionalData []byte) []byte {
	if uint64(len(plaintext)) > maxMessage {
		panic("aesgcm: message too large")
	}
	whole, out := extend(dst, len(plaintext)+tagSize)
	check(out, nonce, plaintext, additionalData)
	var tag [tagSize]byte
	crypt(v, false, unsafe.SliceData(out), unsafe.SliceData(plaintext), uint64(len(plaintext)),
		&nonce[0], unsafe.SliceData(additionalData), uint64(len(additionalData)), &tag)
	copy(out[len(plaintext):], tag[:])
	return whole
}

var errOpen = errors.New("aesgcm: message authentication failed")

func (v *vector) Open(dst, nonce, ciphertext, additionalData []byte) ([]byte, error) {
	if len(nonce) != nonceSize {
		panic("aesgcm: incorrect nonce length")
	}
	n := len(ciphertext) - tagSize
	if n < 0 || uint64(n) > maxMessage {
		return nil, errOpen
	}
	whole, out := extend(dst, n)
	check(out, nonce, ciphertext, additionalData)
	var tag [tagSize]byte
	crypt(v, true, unsafe.SliceData(out), unsafe.SliceData(ciphertext), uint64(n),
		&nonce[0], unsafe.SliceData(additionalData), uint64(len(additionalData)), &tag)
	if subtle.ConstantTimeCompare(tag[:], ciphertext[n:]) != 1 {
		clear(out)
		return nil, errOpen
	}
	return whole, nil
}

// extend returns dst with n more bytes, and those.
func extend(dst []byte, n int) (whole, added []byte) {
	whole = slices.Grow(dst, n)[:len(dst)+n]
	return whole, whole[len(dst):]
}

// check panics for what a caller of Seal or Open must not pass.
func check(out, nonce, in, additionalData []byte) {
	if len(nonce) != nonceSize {
		panic("aesgcm: incorrect nonce length")
	}
	if overlap(out, in) && &out[0] != &in[0] {
		panic("aesgcm: invalid buffer overlap of output and input")
	}
	if overlap(out, additionalData) {
		panic("aesgcm: invalid buffer overlap of output and additional data")
	}
}

// overlap tells whether a and b share a byte.
func overlap(a, b []byte) bool {
	return len(a) > 0 && len(b) > 0 &&
		uintptr(unsafe.Pointer(&a[0])) <= uintptr(unsafe.Pointer(&b[len(b)-1])) &&
		uintptr(unsafe.Pointer(&b[0])) <= uintptr(unsafe.Pointer(&a[len(a)-1]))
}

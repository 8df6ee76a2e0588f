package aesgcm

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"testing"
)

// BenchmarkGCM is the package beside crypto/cipher, in one run because shared machines change speed.
func BenchmarkGCM(b *testing.B) {
	for _, bits := range []int{128, 256} {
		for _, size := range []int{128, 1 << 10, 16 << 10} {
			ours, err := New(make([]byte, bits/8))
			if err != nil {
				b.Fatal(err)
			}
			for _, seal := range []bool{true, false} {
				for name, aead := range map[string]cipher.AEAD{"ours": ours, "crypto-cipher": standard(b, make([]byte, bits/8))} {
					run, verb := benchmarkOpen, "open"
					if seal {
						run, verb = benchmarkSeal, "seal"
					}
					b.Run(fmt.Sprintf("aes%d/%s/%d/%s", bits, verb, size, name), func(b *testing.B) { run(b, aead, size) })
				}
			}
		}
	}
}

func benchmarkSeal(b *testing.B, aead cipher.AEAD, size int) {
	plain, sealed, nonce, data := make([]byte, size), make([]byte, 0, size+aead.Overhead()), make([]byte, 12), make([]byte, 5)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		aead.Seal(sealed, nonce, plain, data)
	}
}

func benchmarkOpen(b *testing.B, aead cipher.AEAD, size int) {
	nonce, data := make([]byte, 12), make([]byte, 5)
	sealed, plain := aead.Seal(nil, nonce, make([]byte, size), data), make([]byte, size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := aead.Open(plain[:0], nonce, sealed, data); err != nil {
			b.Fatal(err)
		}
	}
}

func standard(tb testing.TB, key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		tb.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		tb.Fatal(err)
	}
	return aead
}

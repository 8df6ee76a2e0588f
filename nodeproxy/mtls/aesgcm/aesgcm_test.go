package aesgcm

import (
	"bytes"
	"crypto/cipher"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"
)

// each runs test with what New returns here, and with what it returns on another processor.
func each(t *testing.T, test func(t *testing.T, with func(key []byte) cipher.AEAD)) {
	for name, fast := range map[string]bool{"vectors": vectors(), "standard": false} {
		t.Run(name, func(t *testing.T) {
			test(t, func(key []byte) cipher.AEAD {
				aead, err := choose(key, fast)
				if err != nil {
					t.Fatal(err)
				}
				return aead
			})
		})
	}
}

// The test cases of McGrew and Viega's specification whose nonces have 12 bytes, by number.
func TestAnswersOfTheSpecification(t *testing.T) {
	const (
		zeros = "00000000000000000000000000000000"
		key   = "feffe9928665731c6d6a8f9467308308"
		nonce = "cafebabefacedbaddecaf888"
		data  = "feedfacedeadbeeffeedfacedeadbeefabaddad2"
		plain = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
		out3  = "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091"
		out15 = "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
	)
	each(t, func(t *testing.T, with func([]byte) cipher.AEAD) {
		for number, c := range map[int]struct{ key, nonce, data, plain, sealed string }{
			1:  {zeros, zeros[:24], "", "", "58e2fccefa7e3061367f1d57a4e7455a"},
			2:  {zeros, zeros[:24], "", zeros, "0388dace60b6a392f328c2b971b2fe78" + "ab6e47d42cec13bdf53a67b21257bddf"},
			3:  {key, nonce, "", plain + "1aafd255", out3 + "473f5985" + "4d5c2af327cd64a62cf35abd2ba6fab4"},
			4:  {key, nonce, data, plain, out3 + "5bc94fbc3221a5db94fae95ae7121a47"},
			13: {zeros + zeros, zeros[:24], "", "", "530f8afbc74536b9a963b4f1c4cb738b"},
			14: {zeros + zeros, zeros[:24], "", zeros, "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919"},
			15: {key + key, nonce, "", plain + "1aafd255", out15 + "898015ad" + "b094dac5d93471bdec1a502270e3cc6c"},
			16: {key + key, nonce, data, plain, out15 + "76fc6ece0f4e1768cddf8853bb2d551b"},
		} {
			sealed := with(decode(c.key)).Seal(nil, decode(c.nonce), decode(c.plain), decode(c.data))
			if !bytes.Equal(sealed, decode(c.sealed)) {
				t.Errorf("case %d: %x, want %s", number, sealed, c.sealed)
			}
		}
	})
}

func decode(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func TestAgreesWithTheStandardLibrary(t *testing.T) {
	source := rand.New(rand.NewPCG(1, 2))
	var lengths []int
	for n := range 1101 {
		lengths = append(lengths, n)
	}
	for range 100 {
		lengths = append(lengths, source.IntN(70_000))
	}
	const counter = 1 << 16 // blocks after which a third byte of the counter moves
	lengths = append(lengths, 16*(counter-17), 16*(counter-1)+5, 16*(counter+15)+1, 16*(counter+300))
	for i, n := range lengths {
		agree(t, bytesOf(source, 16+i%2*16), bytesOf(source, 12), bytesOf(source, n), bytesOf(source, i%101), i%67)
	}
}

func FuzzAgreesWithTheStandardLibrary(f *testing.F) {
	for _, n := range []int{0, 1, 16, 63, 64, 240, 241, 256, 300, 512, 1000} {
		f.Add(make([]byte, 16), make([]byte, 12), make([]byte, n), make([]byte, 5), uint(n))
	}
	f.Fuzz(func(t *testing.T, key, nonce, plain, data []byte, offset uint) {
		key = append(key, make([]byte, 32)...)[:16+offset%2*16]
		agree(t, key, append(nonce, make([]byte, 12)...)[:12], plain, data, int(offset%128))
	})
}

// agree seals and opens apart and in place, with buffers that begin at any address.
func agree(t *testing.T, key, nonce, plain, data []byte, offset int) {
	t.Helper()
	ours, err := New(key)
	if err != nil {
		t.Fatal(err)
	}
	want := standard(t, key).Seal(nil, nonce, plain, data)
	fail := func(what string) {
		t.Helper()
		t.Fatalf("%s: %d bytes at %d, %d more, key of %d: not what crypto/cipher does", what, len(plain), offset, len(data), len(key))
	}
	at := func(b []byte) []byte { return append(make([]byte, offset, offset+len(b)+64), b...)[offset:] }

	if got := ours.Seal(at(nil), nonce, plain, at(data)); !bytes.Equal(got, want) {
		fail("seal")
	}
	if b := at(plain); !bytes.Equal(ours.Seal(b[:0], nonce, b, data), want) {
		fail("seal in place")
	}
	if got, err := ours.Open(at(nil), nonce, want, at(data)); err != nil || !bytes.Equal(got, plain) {
		fail("open")
	}
	b := at(want)
	if got, err := ours.Open(b[:0], nonce, b, data); err != nil || !bytes.Equal(got, plain) {
		fail("open in place")
	}
}

func bytesOf(source *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(source.Uint32())
	}
	return b
}

// One changed bit anywhere is an error, nothing is returned, and no text stays in the buffer.
func TestNothingOfAChangedMessageIsReleased(t *testing.T) {
	each(t, func(t *testing.T, with func([]byte) cipher.AEAD) {
		source := rand.New(rand.NewPCG(3, 4))
		for _, n := range []int{0, 1, 15, 16, 17, 63, 64, 65, 239, 240, 241, 255, 256, 257, 300, 511, 512, 513, 800} {
			nonce, data := bytesOf(source, 12), bytesOf(source, 1+n%40)
			aead := with(bytesOf(source, 16+n%2*16))
			sealed := aead.Seal(nil, nonce, bytesOf(source, n), data)
			for _, part := range [][]byte{sealed, data, nonce} {
				for i := range part {
					part[i] ^= 1 << (i % 8)
					refused(t, aead, make([]byte, 0, n), nonce, sealed, data)
					inPlace := bytes.Clone(sealed)
					refused(t, aead, inPlace[:0], nonce, inPlace, data)
					part[i] ^= 1 << (i % 8)
				}
			}
			refused(t, aead, make([]byte, 0, n), nonce, sealed[:len(sealed)-1], data)
			refused(t, aead, make([]byte, 0, n), nonce, sealed, data[:len(data)-1])
			if _, err := aead.Open(nil, nonce, sealed, data); err != nil {
				t.Fatalf("%d bytes, unchanged: %v", n, err)
			}
		}
		for n := range 16 {
			refused(t, with(make([]byte, 16)), nil, make([]byte, 12), make([]byte, n), nil)
		}
	})
}

func refused(t *testing.T, aead cipher.AEAD, dst, nonce, sealed, data []byte) {
	t.Helper()
	n := max(len(sealed)-16, 0)
	got, err := aead.Open(dst, nonce, sealed, data)
	if err == nil || got != nil {
		t.Fatalf("a changed message of %d bytes was opened", n)
	}
	if cap(dst) > 0 && !bytes.Equal(dst[:n], make([]byte, n)) {
		t.Fatalf("text of a changed message of %d bytes is in the buffer", n)
	}
}

func TestKeepsTheContractOfAEAD(t *testing.T) {
	each(t, func(t *testing.T, with func([]byte) cipher.AEAD) {
		aead, nonce, data := with(make([]byte, 16)), make([]byte, 12), make([]byte, 40)
		if aead.NonceSize() != 12 || aead.Overhead() != 16 {
			t.Errorf("nonce of %d, tag of %d bytes", aead.NonceSize(), aead.Overhead())
		}
		buffer := []byte("before....................................................after")
		sealed := aead.Seal(buffer[:6], nonce, make([]byte, 32), data)
		if string(sealed[:6]) != "before" || &sealed[0] != &buffer[0] || string(buffer[54:]) != "....after" {
			t.Errorf("sealed into a buffer with room: %q", buffer)
		}
		if longer := aead.Seal(buffer[:6:8], nonce, nil, nil); string(longer[:6]) != "before" || len(longer) != 22 || &longer[0] == &buffer[0] {
			t.Errorf("sealed into a buffer without room: %q", longer)
		}
		panics := func(what string, call func()) {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", what)
				}
			}()
			call()
		}
		for _, n := range []int{0, 11, 13} {
			panics("nonce", func() { aead.Seal(nil, make([]byte, n), nil, nil) })
			panics("nonce", func() { _, _ = aead.Open(nil, make([]byte, n), make([]byte, 20), nil) })
		}
		b := make([]byte, 200)
		panics("output after input", func() { aead.Seal(b[1:1], nonce, b[:32], nil) })
		panics("output before input", func() { aead.Seal(b[:0], nonce, b[1:32], nil) })
		panics("open after input", func() { _, _ = aead.Open(b[1:1], nonce, b[:32], nil) })
		panics("open before input", func() { _, _ = aead.Open(b[:0], nonce, b[15:60], nil) })
		panics("additional data in the tag", func() { aead.Seal(b[:0], nonce, b[:32], b[47:60]) })
		panics("additional data in the text", func() { _, _ = aead.Open(b[:0], nonce, b[100:150], b[33:60]) })
		aead.Seal(b[:0], nonce, b[48:80], b[80:90])
		if n := testing.AllocsPerRun(100, func() {
			sealed := aead.Seal(b[:0], nonce, b[:100], data)
			_, _ = aead.Open(sealed[:0], nonce, sealed, data)
		}); n != 0 {
			t.Errorf("%v allocations for a message", n)
		}
	})
	if _, err := New(make([]byte, 17)); err == nil {
		t.Error("took a key of 17 bytes")
	}
	if aead, err := New(make([]byte, 24)); err != nil || aead.Overhead() != 16 {
		t.Errorf("took no key of 24 bytes: %v", err)
	}
}

func TestServesManyGoroutines(t *testing.T) {
	each(t, func(t *testing.T, with func([]byte) cipher.AEAD) {
		aead := with(make([]byte, 32))
		var group sync.WaitGroup
		for worker := range byte(8) {
			group.Go(func() {
				nonce, plain := append(make([]byte, 11), worker), bytes.Repeat([]byte{worker}, 3000)
				for range 200 {
					opened, err := aead.Open(nil, nonce, aead.Seal(nil, nonce, plain, nonce), nonce)
					if err != nil || !bytes.Equal(opened, plain) {
						t.Errorf("worker %d: another text came back: %v", worker, err)
						return
					}
				}
			})
		}
		group.Wait()
	})
}

// Where FIPS 140 is asked for, the validated module encrypts.
func TestFIPSTakesTheStandardLibrary(t *testing.T) {
	if os.Getenv("AESGCM_TYPE") != "" {
		aead, err := New(make([]byte, 16))
		fmt.Printf("%T %v\n", aead, err)
		return
	}
	self := exec.Command(os.Args[0], "-test.run=^TestFIPSTakesTheStandardLibrary$")
	self.Env = append(os.Environ(), "AESGCM_TYPE=1", "GODEBUG=fips140=on")
	out, err := self.CombinedOutput()
	if err != nil || !bytes.HasPrefix(out, fmt.Appendf(nil, "%T <nil>\n", standard(t, make([]byte, 16)))) {
		t.Errorf("%v: %s", err, out)
	}
}

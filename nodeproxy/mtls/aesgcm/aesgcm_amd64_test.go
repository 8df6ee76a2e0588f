package aesgcm

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Each buffer ends where memory ends, then begins where it begins.
func TestTouchesNothingBesideItsBuffers(t *testing.T) {
	if !vectors() {
		return // nothing here but crypto/cipher
	}
	source := rand.New(rand.NewPCG(5, 6))
	src, dst, data, nonce := newEdge(t), newEdge(t), newEdge(t), newEdge(t)
	key := bytesOf(source, 32)
	v, reference := newVector(key).(*vector), standard(t, key)
	for n := range 700 {
		for _, side := range []func(edge, int) []byte{edge.first, edge.last} {
			in, out, d, iv := side(src, n), side(dst, n), side(data, n%70), side(nonce, 12)
			copy(in, bytesOf(source, n))
			copy(d, bytesOf(source, len(d)))
			copy(iv, bytesOf(source, len(iv)))
			clear(dst)
			want := reference.Seal(nil, iv, in, d)
			var tag [tagSize]byte
			crypt(v, false, unsafe.SliceData(out), unsafe.SliceData(in), uint64(n), &iv[0], unsafe.SliceData(d), uint64(len(d)), &tag)
			if !bytes.Equal(out, want[:n]) || !bytes.Equal(tag[:], want[n:]) {
				t.Fatalf("%d bytes: not what crypto/cipher does", n)
			}
			clear(out)
			if !bytes.Equal(dst, make([]byte, len(dst))) {
				t.Fatalf("%d bytes: wrote beside the output", n)
			}
			copy(in, want)
			crypt(v, true, unsafe.SliceData(out), unsafe.SliceData(in), uint64(n), &iv[0], unsafe.SliceData(d), uint64(len(d)), &tag)
			if !bytes.Equal(reference.Seal(nil, iv, out, d), want) || !bytes.Equal(tag[:], want[n:]) {
				t.Fatalf("%d bytes: did not open", n)
			}
		}
	}
}

// edge is a page between two that nobody may touch.
type edge []byte

func newEdge(t *testing.T) edge {
	t.Helper()
	size := unix.Getpagesize()
	memory, err := unix.Mmap(-1, 0, 3*size, unix.PROT_NONE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	page := memory[size : 2*size]
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return edge(page[:size:size])
}

func (e edge) first(n int) []byte { return e[:n] }

func (e edge) last(n int) []byte { return e[len(e)-n:] }

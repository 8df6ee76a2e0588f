package redirect_test

import (
	"fmt"
	"os"
	"testing"

	"nodeproxy.io/redirect"
)

// BenchmarkOpenNamespace is what a workload's first process in a namespace of its own costs.
func BenchmarkOpenNamespace(b *testing.B) {
	n := newNode(b)
	netns, err := n.lab.Namespace()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		f, err := os.Open(netns.Path())
		if err != nil {
			b.Fatal(err)
		}
		ns, err := n.r.OpenNamespace(f)
		if err != nil {
			b.Fatal(err)
		}
		if err := ns.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStoreSave is what keeping a snapshot costs: about 300 KiB for a hundred services.
func BenchmarkStoreSave(b *testing.B) {
	n := newNode(b)
	for _, size := range []int{300 << 10, redirect.MaxStored} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			value := make([]byte, size)
			b.SetBytes(int64(size))
			for b.Loop() {
				if err := n.r.Store().Save(value); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package redirect_test

import (
	"os"
	"testing"
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

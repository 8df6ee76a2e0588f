package redirect

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// table lays out the entries of a legacy table as the kernel does.
type table struct {
	legacyTable
	entries []byte
}

// add appends an entry, with a target or a standard one with a verdict, and returns where it is.
func (b *table) add(target string, data []byte) int {
	at := len(b.entries)
	e := make([]byte, b.entry+targetHead, b.entry+targetHead+len(data))
	copy(e[b.entry+2:], target)
	e = append(e, data...)
	binary.NativeEndian.PutUint16(e[b.offsets:], uint16(b.entry))
	binary.NativeEndian.PutUint16(e[b.offsets+2:], uint16(len(e)))
	b.entries = append(b.entries, e...)
	return at
}

func (b *table) verdict(v int) int {
	return b.add("", binary.NativeEndian.AppendUint32(nil, uint32(int32(v))))
}

// TestALargeLegacyTableIsReadInOneGo has chains of which each jumps to the one before: nothing may be looked at again for each.
func TestALargeLegacyTableIsReadInOneGo(t *testing.T) {
	const chains = 20_000
	for _, target := range []string{"REDIRECT", "MASQUERADE"} {
		b := &table{legacyTable: legacyTables[0]}
		b.verdict(-2) // of other hooks
		output := b.verdict(0)
		policy := b.verdict(-2)
		last := 0
		for n := range chains {
			name := make([]byte, 32)
			copy(name, fmt.Sprintf("CHAIN-%d", n))
			b.add("ERROR", name)
			if n == 0 {
				last = b.add(target, make([]byte, 8))
			} else {
				last = b.verdict(last)
			}
			b.verdict(-5)
		}
		b.add("ERROR", make([]byte, 32))
		binary.NativeEndian.PutUint32(b.entries[output+b.entry+targetHead:], uint32(last))
		want := ForeignRule{}
		if target == "REDIRECT" {
			want = ForeignRule{"redirect", "iptables table nat, chain CHAIN-0, target REDIRECT"}
		}
		if got := b.find(b.entries, uint32(output), uint32(policy)); got != want {
			t.Errorf("with target %s: %q, want %q", target, got, want)
		}
	}
}

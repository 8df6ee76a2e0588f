package nodeproxy

import "testing"

func TestMemoryIsGivenBackOnceAfterABurst(t *testing.T) {
	const mib = 1 << 20
	var r reclaimer
	allocated := uint64(0)
	for i, look := range []struct {
		more uint64
		want bool
	}{
		{20 * mib, false}, // the start
		{mib, true},       // over
		{mib, false},      // quiet, and not worth it
		{40 * mib, false}, // a burst
		{30 * mib, false},
		{mib, true}, // over
		{mib, false},
		{0, false},
		{mib, false}, {mib, false},
		{mib, true},     // little by little
		{4 * mib, true}, // much, and always the same
		{4 * mib, true},
	} {
		allocated += look.more
		if got := r.due(allocated); got != look.want {
			t.Errorf("look %d, after %d MiB more: due %v, want %v", i, look.more/mib, got, look.want)
		}
	}
}

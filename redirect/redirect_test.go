package redirect

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
)

func TestProbe(t *testing.T) {
	for _, f := range Probe() {
		if f.Err != nil {
			var ve *ebpf.VerifierError
			if errors.As(f.Err, &ve) {
				t.Errorf("%s: %+v", f.Name, ve)
				continue
			}
			t.Errorf("%s: %v", f.Name, f.Err)
		}
	}
}

package redirect

import (
	"bytes"
	"encoding/binary"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"nodeproxy.io/tests/netlab"
)

// arrival is struct bpf_sk_lookup (linux/bpf.h).
type arrival struct {
	_                            uint64
	Family, Protocol, RemoteIPv4 uint32
	_                            [4]uint32
	_, LocalIPv4                 uint32
	_                            [4]uint32
	LocalPort, IngressIfindex    uint32
	_                            uint32
}

func TestTheGuardKnowsTheNamespaceOfEachOfManyRunsAtOnce(t *testing.T) {
	netlab.Lacks(t, netlab.Missing()...)
	spec, err := loadInbound()
	if err != nil {
		t.Fatal(err)
	}
	var obj inboundObjects
	if err := spec.LoadAndAssign(&obj, nil); err != nil {
		t.Fatal(err)
	}
	defer obj.Close()
	if err := obj.Guard.Put(uint32(0), obj.Lookup); err != nil {
		t.Fatal(err)
	}
	var runs sync.WaitGroup
	for i, cookie := range []uint64{1, 0xffff, 0x10000, 0x10001, 0xffff0000, 0xffffffff} {
		const port = 80
		guarded := i%2 == 0
		if guarded {
			key := outboundRuleKey{Netns: cookie, Port: port}
			if err := obj.Rules.Put(key, outboundRule{Action: uint32(outboundRuleActionRULE_STRICT)}); err != nil {
				t.Fatal(err)
			}
		}
		entry, err := loadEntry(callGuard(cookie, obj.Places, obj.Guard)) // test runs have no ingress_ifindex
		if err != nil {
			t.Fatal(err)
		}
		defer entry.Close()
		var in bytes.Buffer
		if err := binary.Write(&in, binary.NativeEndian, arrival{Family: unix.AF_INET, Protocol: unix.IPPROTO_TCP, LocalPort: port}); err != nil {
			t.Fatal(err)
		}
		runs.Go(func() {
			want := uint32(skPass)
			if guarded {
				want = skDrop
			}
			for range 1000 {
				got, err := entry.Run(&ebpf.RunOptions{Context: in.Bytes()})
				if err != nil || got != want {
					t.Errorf("in namespace %#x it returns %d, want %d (%v)", cookie, got, want, err)
					return
				}
			}
		})
	}
	runs.Wait()
	if _, err := newEntry(1<<32, obj.Places, obj.Guard); err == nil {
		t.Error("a namespace is guarded whose cookie does not fit")
	}
}

package workload

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestWhatIsServedNoMoreIsCarriedOnForAWhileAndThenForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &Workload{ID: 7, Service: "api"}
		key := servedKey{1, netip.MustParseAddrPort("10.0.0.1:21000")}
		s := &served{Served: Served{Service: "api", Workloads: []*Workload{w}}}
		f := former{workloads: make(map[uint32]formerWorkload), served: make(map[servedKey]formerServed)}
		last := &view{byID: map[uint32]*Workload{7: w}, callers: map[uint32][]string{7: {"api-1"}}, served: map[servedKey]*served{key: s}}
		retire := func() {
			next := &view{byID: make(map[uint32]*Workload), callers: make(map[uint32][]string)}
			f.retire(last, next)
			last = next
		}
		retire()
		for range 3 { // whatever else changes meanwhile
			if last.byID[7] != w || !slices.Equal(last.callers[7], []string{"api-1"}) || last.former[key] != s {
				t.Errorf("of what was served a moment ago there is %+v", last)
			}
			time.Sleep(grace / 3)
			retire()
		}
		time.Sleep(time.Nanosecond)
		for range 2 {
			retire()
			if len(last.byID) > 0 || len(last.callers) > 0 || len(last.former) > 0 {
				t.Errorf("after %s there remains %+v", grace, last)
			}
		}
		if len(f.workloads) > 0 || len(f.served) > 0 {
			t.Errorf("what is forgotten is kept as %+v", f)
		}
	})
}

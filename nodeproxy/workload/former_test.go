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

func TestAWorkloadIsListedUntilItsHooksAreDetached(t *testing.T) {
	gone := &entry{Workload: Workload{ID: 7, Cgroup: "/cg/web", Service: "web"}, cgroup: 70}
	m := &Manager{leaving: []*entry{gone}}
	if all := m.states(); len(all) != 1 || all[0].Workload.Cgroup != "/cg/web" || all[0].State != "leaving" {
		t.Errorf("what is un-enrolled and still redirected is listed as %+v", all)
	}
	again := &entry{Workload: Workload{Cgroup: "/cg/web", Service: "shop"}, cgroup: 70}
	m.workloads = map[string]*entry{"/cg/web": again}
	if all := m.states(); len(all) != 1 || all[0].Workload.Service != "shop" || all[0].State == "leaving" {
		t.Errorf("a workload that is enrolled again is listed as %+v", all)
	}
	m.workloads, m.leaving = nil, nil
	if all := m.states(); len(all) != 0 {
		t.Errorf("once detached it is listed as %+v", all)
	}
}

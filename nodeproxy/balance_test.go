package nodeproxy

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// pick is that of a caller which configures nothing, with one target.
func pick(b *balancer, list, tried []*catalog.Instance) (*catalog.Instance, func()) {
	_, inst, done := b.pick([]*catalog.Target{{Service: "s", Instances: list}}, tried, call{})
	return inst, done
}

func many(n int) []*catalog.Instance {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprintf("i-%02d", i)
	}
	return instances(ids...)
}

func source(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}) }

func TestRoundRobinIsFair(t *testing.T) {
	b := newBalancer(false, new(endings))
	targets := []*catalog.Target{{Service: "s", Instances: many(7)}}
	var order []string
	for range 21 {
		_, inst, done := b.pick(targets, nil, call{balance: catalog.RoundRobin})
		order = append(order, inst.ID)
		done()
	}
	if !slices.Equal(order[:7], order[7:14]) || !slices.Equal(order[:7], order[14:]) || len(slices.Compact(slices.Sorted(slices.Values(order)))) != 7 {
		t.Errorf("the turns are %v", order)
	}
}

func TestRandomReachesAllAboutEqually(t *testing.T) {
	b := newBalancer(false, new(endings))
	targets := []*catalog.Target{{Service: "s", Instances: many(4)}}
	got := map[string]int{}
	for range 4000 {
		_, inst, _ := b.pick(targets, nil, call{balance: catalog.Random}) // all stay busy: least_request would even them out
		got[inst.ID]++
	}
	for id, n := range got {
		if math.Abs(float64(n)-1000) > 200 { // seven standard deviations
			t.Errorf("%s was drawn %d times of 4000", id, n)
		}
	}
	if len(got) != 4 {
		t.Errorf("drawn: %v", got)
	}
}

// hashed is where each source goes.
func hashed(b *balancer, list []*catalog.Instance, sources int) []string {
	to := make([]string, sources)
	for i := range to {
		_, inst, done := b.pick([]*catalog.Target{{Service: "s", Instances: list}}, nil, call{balance: catalog.SourceHash, source: source(i)})
		to[i] = inst.ID
		done()
	}
	return to
}

func TestASourceStaysWithItsInstance(t *testing.T) {
	list := many(10)
	first := hashed(newBalancer(false, new(endings)), list, 5000)
	slices.Reverse(list)
	if again := hashed(newBalancer(false, new(endings)), list, 5000); !slices.Equal(first, again) {
		t.Error("another proxy, or another order, sends a source elsewhere")
	}
	load := map[string]int{}
	for _, id := range first {
		load[id]++
	}
	for id, n := range load {
		if math.Abs(float64(n)-500) > 150 { // seven standard deviations
			t.Errorf("%s has %d of 5000 sources", id, n)
		}
	}
}

func TestOnlySourcesOfTheInstanceThatGoesMove(t *testing.T) {
	list := many(10)
	before := hashed(newBalancer(false, new(endings)), list, 5000)
	gone := list[3].ID
	after := hashed(newBalancer(false, new(endings)), slices.Delete(slices.Clone(list), 3, 4), 5000)
	for i := range before {
		if before[i] != after[i] && before[i] != gone {
			t.Fatalf("source %d moved from %s to %s when %s went", i, before[i], after[i], gone)
		}
		if before[i] == gone && after[i] == gone {
			t.Fatalf("source %d is still with %s", i, gone)
		}
	}
}

func TestAnIPv4SourceIsTheSameV4Mapped(t *testing.T) {
	list := many(10)
	for i := range 50 {
		if rendezvous(list, source(i)) != rendezvous(list, netip.AddrFrom16(source(i).As16())) {
			t.Fatalf("source %d goes to two instances", i)
		}
	}
}

func TestFailoverIsForWhenNothingBetterIsLeft(t *testing.T) {
	b := newBalancer(true, new(endings))
	primary, second, third := instances("p"), instances("s"), instances("t")
	second[0].Node, third[0].Node, third[0].Local = "m", "o", true
	targets := []*catalog.Target{
		{Service: "a", Instances: primary}, {Service: "a", Subset: "x", Instances: second, Unreachable: "for a reason"}, {Service: "b", Instances: third},
	}
	expect := func(want string, tried ...*catalog.Instance) {
		t.Helper()
		target, inst, done := b.pick(targets, tried, call{})
		switch {
		case inst == nil && want == "":
		case inst == nil, inst.ID != want:
			t.Errorf("chose %v of %v, wanted %q", inst, target, want)
		default:
			done()
		}
	}
	expect("p") // although the other is local
	expect("t", primary[0])
	primary[0].Healthy = false
	expect("t")
	primary[0].Healthy = true
	b.failed(primary[0], primary, call{}, errors.New("refused"))
	expect("t")
	b.failed(third[0], third, call{}, errors.New("refused"))
	expect("p") // ejected, but nothing else is left
	expect("t", primary[0])
	expect("", primary[0], third[0])
}

func TestPassiveHealthCheckOfACaller(t *testing.T) {
	now := time.Unix(1000, 0)
	b := newBalancer(false, new(endings))
	b.now = func() time.Time { return now }
	list := many(4)
	c := call{caller: "web", ejection: &catalog.Ejection{Failures: 3, Base: 10 * time.Second, Interval: 4 * time.Second, Percent: 50}}
	eject := func(inst *catalog.Instance) (d time.Duration) {
		for range 3 {
			if d != 0 {
				t.Fatalf("%s is ejected before 3 failures", inst.ID)
			}
			d = b.failed(inst, list, c, errors.New("refused"))
		}
		return d
	}
	if d := eject(list[0]); d != 12*time.Second { // 10 s, then at the next multiple of 4
		t.Errorf("ejected for %s", d)
	}
	if b.now().Before(b.until(list[0], call{})) {
		t.Error("ejected for callers that configure nothing")
	}
	if d := eject(list[1]); d == 0 {
		t.Error("a second of four is not ejected at 50 %")
	}
	if d := eject(list[2]); d != 0 {
		t.Error("a third of four is ejected at 50 %")
	}
	now = now.Add(12 * time.Second)
	if d := eject(list[0]); d != 20*time.Second {
		t.Errorf("ejected a second time for %s", d)
	}
	now = now.Add(20 * time.Second)
	b.failed(list[0], list, c, errors.New("refused"))
	b.failed(list[0], list, c, errors.New("refused"))
	b.succeeded(list[0], c)
	if d := b.failed(list[0], list, c, errors.New("refused")); d != 0 {
		t.Error("failures count although one connection succeeded between")
	}
}

func TestOneInstanceMayAlwaysBeEjected(t *testing.T) {
	b := newBalancer(false, new(endings))
	list := many(2)
	c := call{caller: "web", ejection: &catalog.Ejection{Failures: 1, Base: time.Second, Percent: 10}}
	if b.failed(list[0], list, c, errors.New("refused")) == 0 {
		t.Error("the first is not ejected at 10 %")
	}
	if b.failed(list[1], list, c, errors.New("refused")) != 0 {
		t.Error("both are ejected at 10 %")
	}
}

func TestAGatewayFailsForOneServiceAlone(t *testing.T) {
	b := newBalancer(false, new(endings))
	at := func(service string) []*catalog.Target {
		inst := instances("gateway")[0]
		inst.Service, inst.Gateway = service, true
		return []*catalog.Target{{Service: service, Instances: []*catalog.Instance{inst}}}
	}
	api, db := at("api"), at("db")
	if b.failed(api[0].Instances[0], api[0].Instances, call{}, errors.New("the gateway knows no such SNI")) == 0 {
		t.Error("it is not ejected for the service that it fails for")
	}
	if why := b.why(db[0].Instances[0]); why != "" {
		t.Errorf("it is ejected for another service too: %s", why)
	}
}

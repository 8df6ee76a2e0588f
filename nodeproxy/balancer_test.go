package nodeproxy

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

func instances(ids ...string) []*catalog.Instance {
	var list []*catalog.Instance
	for i, id := range ids {
		list = append(list, &catalog.Instance{ID: id, Node: "n", Healthy: true, Mesh: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(i+1))})
	}
	return list
}

func TestTheLessBusyOfTwoIsChosen(t *testing.T) {
	b := newBalancer(false, new(endings))
	two := instances("a", "b")
	for range 50 {
		if inst, _ := pick(b, two, nil); inst == nil {
			t.Fatal("none chosen")
		}
	}
	if busy := b.active; busy[place{node: "n", id: "a"}] != 25 || busy[place{node: "n", id: "b"}] != 25 {
		t.Errorf("50 connections are spread %v", busy)
	}
}

func TestEveryInstanceIsDrawn(t *testing.T) {
	b := newBalancer(false, new(endings))
	seen := map[string]bool{}
	for range 2000 {
		inst, done := pick(b, instances("a", "b", "c", "d", "e"), nil)
		seen[inst.ID] = true
		done()
		done() // twice is once
	}
	if len(seen) != 5 || len(b.active) != 0 {
		t.Errorf("drawn %v, still active %v", seen, b.active)
	}
}

func TestLocalInstancesGoFirst(t *testing.T) {
	b := newBalancer(true, new(endings))
	list := instances("far", "near", "near-unhealthy")
	list[1].Local, list[2].Local, list[2].Healthy = true, true, false
	for range 50 {
		if inst, _ := pick(b, list, nil); inst.ID != "near" {
			t.Fatalf("%s was chosen", inst.ID)
		}
	}
	if inst, _ := pick(b, list, list[1:2]); inst.ID != "far" {
		t.Errorf("%s was chosen when the local one was tried", inst.ID)
	}
}

func TestEjectionBacksOffAndEnds(t *testing.T) {
	now := time.Unix(1000, 0)
	b := newBalancer(false, new(endings))
	b.now = func() time.Time { return now }
	list := instances("a", "b")
	refused := errors.New("refused")
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		b.failed(list[0], list, call{}, refused)
		b.failed(list[0], list, call{}, refused) // of a connection that was under way: does not count
		if b.why(list[0]) != "refused" {
			t.Fatal("not ejected")
		}
		for range 20 {
			if inst, _ := pick(b, list, nil); inst.ID != "b" {
				t.Fatal("the ejected instance was chosen")
			}
		}
		now = now.Add(want*time.Second - 1)
		if b.why(list[0]) == "" {
			t.Fatalf("the ejection ends before %d s", want)
		}
		now = now.Add(1)
		if b.why(list[0]) != "" {
			t.Fatalf("the ejection does not end after %d s", want)
		}
	}
	b.succeeded(list[0], call{})
	b.failed(list[0], list, call{}, refused)
	if now = now.Add(minEjection); b.why(list[0]) != "" {
		t.Error("success did not reset the back-off")
	}
}

func TestWhereAllAreEjectedTheSoonestIsTried(t *testing.T) {
	now := time.Unix(1000, 0)
	b := newBalancer(false, new(endings))
	b.now = func() time.Time { return now }
	list := instances("a", "b")
	b.failed(list[1], list, call{}, errors.New("refused"))
	now = now.Add(time.Millisecond)
	b.failed(list[0], list, call{}, errors.New("refused"))
	if inst, _ := pick(b, list, nil); inst == nil || inst.ID != "b" {
		t.Errorf("got %v", inst)
	}
	if inst, _ := pick(b, list, list); inst != nil {
		t.Errorf("%s was chosen again", inst.ID)
	}
	b.prune(&catalog.Snapshot{})
	if len(b.ejected) != 0 {
		t.Error("instances that are gone are remembered")
	}
}

func TestAnInstanceThatEndsIsChosenOnlyWhenNoOtherIsLeft(t *testing.T) {
	ends := new(endings)
	b := newBalancer(true, ends)
	list := instances("here", "there", "failed")
	list[0].Local, ends.here = true, []string{"here"}
	b.failed(list[2], list, call{}, errors.New("refused"))
	for range 20 {
		if inst, _ := pick(b, list, nil); inst.ID != "there" {
			t.Fatalf("%s was chosen", inst.ID)
		}
	}
	ends.hear(list[1])
	if inst, _ := pick(b, list, list[:1]); inst.ID != "there" {
		t.Errorf("%s was chosen before one that ends", inst.ID)
	}
	ends.heard[placeOf(list[1])] = time.Now().Add(-heardFor)
	if inst, _ := pick(b, list, nil); inst.ID != "there" {
		t.Errorf("%s was chosen: the other is taken for one that ends for ever", inst.ID)
	}
}

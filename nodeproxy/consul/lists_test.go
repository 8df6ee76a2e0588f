package consul

import (
	"fmt"
	"slices"
	"testing"
)

// answered lists what a sorter has asked about, as if all of it had been answered.
func (d *data) answered(lists [][]string) {
	d.asked = lists
	for _, name := range slices.Concat(lists...) {
		d.intentions[name] = nil
	}
}

func neverRefused([]string) bool { return false }

// wantAll asserts that each name of d is asked about exactly once.
func wantAll(t *testing.T, d *data, needed []string, lists [][]string) {
	t.Helper()
	own, others := destinations(d, needed)
	got := slices.Concat(lists...)
	slices.Sort(got)
	if len(got) != len(own)+len(others) || len(slices.Compact(got)) != len(own)+len(others) {
		t.Errorf("%d names are asked about for %d and %d", len(got), len(own), len(others))
	}
}

func TestAChangeOfOneIntentionHasFewNamesLookedUp(t *testing.T) {
	d := sample()
	for i := range 5000 {
		d.register(fmt.Sprintf("service-%d", i), endpoint{})
	}
	s := newSorter()
	first := s.lists(d, nil, true, neverRefused)
	wantAll(t, d, nil, first)
	if len(first) > maxLists {
		t.Errorf("%d questions, which are as many connections", len(first))
	}
	for _, names := range first {
		if len(names) > 3*fewNames {
			t.Errorf("%d names in one question", len(names))
		}
	}
	d.answered(first)

	d.register("another", endpoint{})
	needed := []string{"service-1", "service-2"}
	next := s.lists(d, needed, true, neverRefused)
	wantAll(t, d, needed, next)
	changed := slices.DeleteFunc(next, func(names []string) bool {
		return slices.ContainsFunc(first, func(old []string) bool { return slices.Equal(old, names) })
	})
	if len(changed) != 1 || !slices.Contains(changed[0], "another") {
		t.Errorf("after another service, and workloads of two, %d questions change: want that of the new service", len(changed))
	}
}

func TestWhatMayNotBeReadOfOthersDoesNotConcernThisNodesServices(t *testing.T) {
	d := sample()
	for i := range 300 {
		d.register(fmt.Sprintf("service-%d", i), endpoint{})
	}
	s := newSorter()
	d.answered(s.lists(d, nil, true, neverRefused))
	needed := []string{"service-7", "unheard-of"}
	isRefused := func(names []string) bool { return len(names) > 2 && slices.Contains(names, "service-7") }
	lists := s.lists(d, needed, true, isRefused)
	wantAll(t, d, needed, lists)
	if !slices.Equal(lists[0], needed) {
		t.Errorf("asked apart are %v, want %v", lists[0], needed)
	}
	d.answered(lists)
	if again := s.lists(d, needed, true, neverRefused); !slices.Equal(again[0], needed) {
		t.Errorf("later asked apart are %v, want %v still", again[0], needed)
	}
	lists = s.lists(d, nil, true, neverRefused)
	wantAll(t, d, nil, lists)
}

func TestAtTheStartOnlyThisNodesServicesAreAskedAbout(t *testing.T) {
	d := sample()
	d.register("far", endpoint{})
	s := newSorter()
	if lists := s.lists(d, []string{"api"}, false, neverRefused); len(lists) != 1 || !slices.Equal(lists[0], []string{"api", "web"}) {
		t.Errorf("asked about are %v", lists)
	}
}

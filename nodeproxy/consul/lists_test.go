package consul

import (
	"fmt"
	"slices"
	"testing"
)

// wantAll asserts that each name of d is asked about, those of this node's services once in lists of their own, and once at most elsewhere.
func wantAll(t *testing.T, d *data, needed []string, lists []list) {
	t.Helper()
	own, others := destinations(d, needed)
	apart, rest := make(map[string]int), make(map[string]int)
	for _, l := range lists {
		for _, name := range l.names {
			if l.own {
				apart[name]++
			} else {
				rest[name]++
			}
		}
	}
	for name := range own {
		if apart[name] != 1 || rest[name] > 1 {
			t.Errorf("%s is asked about %d times apart and %d times with others", name, apart[name], rest[name])
		}
		delete(apart, name)
		delete(rest, name)
	}
	for name := range others {
		if rest[name] != 1 {
			t.Errorf("%s is asked about %d times", name, rest[name])
		}
		delete(rest, name)
	}
	if len(apart) > 0 || len(rest) > 0 {
		t.Errorf("asked about are %v and %v, too", apart, rest)
	}
}

// changed are the lists that were not there before.
func changed(before, now []list) []list {
	return slices.DeleteFunc(slices.Clone(now), func(l list) bool {
		return slices.ContainsFunc(before, func(old list) bool { return old.own == l.own && slices.Equal(old.names, l.names) })
	})
}

func TestAChangeOfOneIntentionHasFewNamesLookedUp(t *testing.T) {
	d := sample()
	for i := range 5000 {
		d.register(fmt.Sprintf("service-%d", i), endpoint{})
	}
	var needed []string
	for i := range 250 {
		needed = append(needed, fmt.Sprintf("service-%d", i))
	}
	s := newSorter()
	first := s.lists(d, needed, true)
	wantAll(t, d, needed, first)
	if len(first) > maxLists+maxOwn {
		t.Errorf("%d questions, which are as many connections", len(first))
	}
	for _, l := range first {
		if few := map[bool]int{false: fewNames, true: fewOwn}[l.own]; len(l.names) > 3*few {
			t.Errorf("%d names in one question, own: %v", len(l.names), l.own)
		}
	}
}

func TestAnEnrolmentHasNoIntentionsOfOthersLookedUp(t *testing.T) {
	d := sample()
	for i := range 5000 {
		d.register(fmt.Sprintf("service-%d", i), endpoint{})
	}
	s := newSorter()
	first := s.lists(d, nil, true)
	wantAll(t, d, nil, first)

	needed := []string{"service-1", "service-2", "unheard-of"}
	second := s.lists(d, needed, true)
	wantAll(t, d, needed, second)
	if now := changed(first, second); len(now) != 1 || !now[0].own {
		t.Errorf("with workloads of three services there are %v anew", now)
	}
	d.register("unheard-of", endpoint{}) // its sidecar is registered
	third := s.lists(d, needed, true)
	wantAll(t, d, needed, third)
	if now := changed(second, third); len(now) != 0 {
		t.Errorf("with a sidecar of this node there are %v anew", now)
	}
	d.register("another", endpoint{})
	fourth := s.lists(d, needed, true)
	wantAll(t, d, needed, fourth)
	if now := changed(third, fourth); len(now) != 1 || now[0].own || !slices.Contains(now[0].names, "another") {
		t.Errorf("after another service there are %v anew", now)
	}
	wantAll(t, d, nil, s.lists(d, nil, true))
}

func TestAtTheStartOnlyThisNodesServicesAreAskedAbout(t *testing.T) {
	d := sample()
	d.register("far", endpoint{})
	s := newSorter()
	if lists := s.lists(d, []string{"api"}, false); len(lists) != 1 || !slices.Equal(lists[0].names, []string{"api", "web"}) || !lists[0].own {
		t.Errorf("asked about are %v", lists)
	}
}

package redirect_test

import (
	"net/netip"
	"slices"
	"testing"
)

func TestAddressesThatComeAndGoAreSeenAtOnce(t *testing.T) {
	p := newNode(t).pod()
	added := netip.MustParseAddr("10.77.0.1")
	want := func(what string, ip netip.Addr, there bool) {
		t.Helper()
		for range 2 { // the second is what is remembered
			all, err := p.ns.Addresses()
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(all, ip) != there {
				t.Errorf("%s: %s, of which %s is to be one: %t", what, all, ip, there)
			}
		}
	}
	want("at first", p.v4, true)
	want("at first", added, false)
	if err := p.netns.Address("eth0", netip.PrefixFrom(added, 24)); err != nil {
		t.Fatal(err)
	}
	want("after it was added", added, true)
	for i := range 2000 { // more than the kernel has room to tell of
		if err := p.netns.Address("eth0", netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 78, byte(i >> 8), byte(i)}), 32)); err != nil {
			t.Fatal(err)
		}
	}
	want("after many were added", netip.AddrFrom4([4]byte{10, 78, 1999 >> 8, 1999 & 0xff}), true)
	if err := p.netns.Remove("eth0"); err != nil {
		t.Fatal(err)
	}
	want("after their link was removed", added, false)
	want("after their link was removed", p.v6, false)
}

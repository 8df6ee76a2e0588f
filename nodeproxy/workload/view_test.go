package workload

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestTheNodeOwnsItsAddressesThoughNoWorkloadIsInItsNamespace(t *testing.T) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil || len(addrs) == 0 {
		t.Fatalf("addresses of the node: %v, %v", addrs, err)
	}
	m := &Manager{log: slog.New(slog.DiscardHandler)}
	m.watchHost()
	m.view.Store(m.assign())
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		if !m.Owns(ip.Unmap()) {
			t.Errorf("%s is not the node's own", ip)
		}
	}
	if stranger := netip.MustParseAddr("203.0.113.77"); m.Owns(stranger) {
		t.Errorf("%s is the node's own", stranger)
	}
}

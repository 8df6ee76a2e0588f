package consul

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// BenchmarkRestate is what a changed intention costs where 5,000 services have two each, beside the whole snapshot.
func BenchmarkRestate(b *testing.B) {
	d := sample()
	address := netip.MustParseAddr("10.64.0.0")
	for i := range 5000 {
		name := fmt.Sprintf("service-%d", i)
		for n := range 4 {
			address = address.Next()
			id := fmt.Sprintf("%s-%d", name, n)
			at := place{address.String(), 21000}
			d.register(name, endpoint{node: "node-9", nodeAddress: "192.0.2.9", id: id, proxyID: id + sidecarSuffix, mesh: at, app: place{at.host, 8080}, healthy: true})
		}
		d.intend(
			intention{SourceName: "web", DestinationName: name, Action: "allow"},
			intention{SourceName: "api", DestinationName: name, Action: "deny"},
		)
	}
	made := builderOf(d)
	last, err := made.build(1, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("intentions", func(b *testing.B) {
		for b.Loop() {
			if snap, err := made.restate(d, last, 2, time.Now()); snap == nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			if _, err := builderOf(d).build(2, time.Now()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

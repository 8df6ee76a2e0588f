package consul

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/policy"
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
		for n := 0; b.Loop(); n++ {
			d.intentions = maps.Clone(d.intentions)
			d.intentions["service-7"] = slices.Clone(d.intentions["service-7"])
			d.intentions["service-7"][0].Action = policy.Action(n % 2)
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

func TestChangedIntentionsMakeThePolicyThatAllOfThemMake(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	d := sample()
	names := []string{"web", "api", "db"}
	for _, name := range names {
		address := fmt.Sprintf("10.64.0.%d", len(d.services)+1)
		d.register(name, endpoint{node: "node-9", nodeAddress: "192.0.2.9", id: name, proxyID: name + sidecarSuffix, mesh: place{address, 21000}, app: place{address, 8080}, healthy: true})
	}
	var ofAll []intention
	made := builderOf(d)
	last, err := made.build(1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	restated := 0
	for generation := uint64(2); generation < 500; generation++ {
		next := *d
		next.intentions = maps.Clone(d.intentions)
		d = &next
		if random.IntN(10) == 0 {
			ofAll = []intention{{SourceName: "*", DestinationName: "*", Action: []api.IntentionAction{"allow", "deny"}[random.IntN(2)]}}[random.IntN(2):]
		}
		for _, name := range names {
			if random.IntN(3) > 0 {
				continue
			}
			delete(d.intentions, name)
			if random.IntN(10) == 0 {
				continue // as if it had not been read
			}
			list := slices.Clone(ofAll)
			for _, source := range append(names, "*") {
				if random.IntN(2) == 0 {
					in := intention{SourceName: source, DestinationName: name, Action: []api.IntentionAction{"allow", "deny"}[random.IntN(2)]}
					if random.IntN(20) == 0 {
						in.Permissions = []json.RawMessage{[]byte("{}")}
					}
					list = append(list, in)
				}
			}
			d.intentions[name] = rulesOf(name, list)
		}
		want, err := builderOf(d).build(generation, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		snap, err := made.restate(d, last, generation, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if snap == nil { // what is reported differs
			if random.IntN(2) == 0 {
				continue // the snapshot that is made for it may have to wait
			}
			made = builderOf(d)
			if last, err = made.build(generation, time.Now()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		last = snap
		restated++
		if got, want := last.Policy.Intentions(), want.Policy.Intentions(); !slices.Equal(got, want) {
			t.Fatalf("in generation %d it has %+v, want %+v", generation, got, want)
		}
	}
	if restated < 100 {
		t.Errorf("%d policies were restated", restated)
	}
}

package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestAPolicyWithOtherIntentionsIsWhatIsCompiledOfAll(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	names := []string{"*", "api", "web", "db"}
	some := func(destination string) (list []Intention) {
		for _, source := range names {
			if random.IntN(2) == 0 {
				in := Intention{Source: source, Destination: destination, Action: Action(random.IntN(2)), JWT: random.IntN(4) == 0, Origin: fmt.Sprint(random.IntN(9))}
				if random.IntN(4) == 0 {
					in.SourcePeer, in.SourceDomain = "east", "east.consul"
				}
				list = append(list, in)
			}
		}
		return list
	}
	byDestination := make(map[string][]Intention)
	p := compile(t, Deny)
	for range 1000 {
		changed := make(map[string][]Intention)
		for range 1 + random.IntN(2) {
			destination := names[random.IntN(len(names))]
			changed[destination] = some(destination)
			byDestination[destination] = changed[destination]
		}
		before, had := p, p.Intentions()
		next, err := p.With(p.Generation()+1, changed)
		if err != nil {
			t.Fatal(err)
		}
		var all []Intention
		for _, list := range byDestination {
			all = append(all, list...)
		}
		want := compile(t, Deny, all...)
		if p = next; !p.IsOf(Deny, mesh, map[string]bool{"http": true}, all) || !slices.Equal(p.Intentions(), want.Intentions()) || p.Len() != len(all) {
			t.Fatalf("it has %+v, want %+v", p.Intentions(), want.Intentions())
		}
		if !slices.Equal(before.Intentions(), had) {
			t.Fatalf("the policy before has %+v now, and had %+v", before.Intentions(), had)
		}
		for _, domain := range []string{mesh.TrustDomain, "east.consul"} {
			for _, source := range names[1:] {
				for _, destination := range names[1:] {
					src := service(source)
					src.TrustDomain = domain
					is, should := p.Decide(src, destination), want.Decide(src, destination)
					if is.Allowed != should.Allowed || is.Why != should.Why || (is.Intention == nil) != (should.Intention == nil) || is.Intention != nil && *is.Intention != *should.Intention {
						t.Fatalf("%s of %s => %s: %+v, want %+v", source, domain, destination, is, should)
					}
				}
			}
		}
	}
	twice := []Intention{{Source: "web", Destination: "api", Origin: "a"}, {Source: "web", Destination: "api", Origin: "b"}}
	if _, err := p.With(9, map[string][]Intention{"api": twice}); err == nil {
		t.Error("an intention that is defined twice is no error")
	}
}

func BenchmarkWith(b *testing.B) {
	p := tenThousand(b)
	in := Intention{Source: "source-5", Destination: "destination-5", Action: Deny}
	b.Run("one of ten thousand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := p.With(2, map[string][]Intention{in.Destination: {in}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	all := p.Intentions()
	b.Run("compiled whole", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Compile(2, Deny, mesh, nil, all); err != nil {
				b.Fatal(err)
			}
		}
	})
}

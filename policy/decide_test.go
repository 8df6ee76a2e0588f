package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

var mesh = Identity{TrustDomain: td}

func service(name string) Identity {
	return Identity{TrustDomain: td, Namespace: "default", Datacenter: "dc1", Service: name}
}

func compile(t testing.TB, def Action, intentions ...Intention) *Policy {
	t.Helper()
	p, err := Compile(7, def, mesh, map[string]bool{"http": true}, intentions)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPrecedence(t *testing.T) {
	all := []Intention{
		{Source: "*", Destination: "*", Action: Allow, Origin: "5"},
		{Source: "web", Destination: "*", Action: Deny, Origin: "6"},
		{Source: "*", Destination: "api", Action: Deny, Origin: "8"},
		{Source: "web", Destination: "api", Action: Allow, Origin: "9"},
	}
	p := compile(t, Deny, all...)
	for _, c := range []struct {
		src, dst, decides string
		allowed           bool
	}{
		{"web", "api", "9", true},
		{"batch", "api", "8", false},
		{"web", "db", "6", false},
		{"batch", "db", "5", true},
		{"WEB", "db", "5", true},
		{"WEB", "api", "8", false},
	} {
		v := p.Decide(service(c.src), c.dst)
		if v.Intention == nil || v.Intention.Origin != c.decides || v.Allowed != c.allowed || v.Why != ByIntention || v.Generation != 7 {
			t.Errorf("%s => %s: %+v (%v), want the intention of precedence %s, allowed %v", c.src, c.dst, v, v.Intention, c.decides, c.allowed)
		}
	}
	var order []string
	for _, in := range p.Intentions() {
		order = append(order, in.Origin)
	}
	if got := strings.Join(order, " "); got != "9 8 6 5" {
		t.Errorf("Intentions() in order %s", got)
	}
}

func TestWhatCannotBeCheckedIsDenied(t *testing.T) {
	p := compile(t, Allow,
		Intention{Source: "perm", Destination: "api", Action: Allow, Permissions: true},
		Intention{Source: "jwt", Destination: "http", Action: Allow, JWT: true},
		Intention{Source: "jwt", Destination: "tcp", Action: Allow, JWT: true},
		Intention{Source: "any", Destination: "*", Action: Allow, JWT: true},
		Intention{Source: "peered", Destination: "api", Action: Deny, SourcePeer: "east"},
		Intention{Source: "other", Destination: "api", Action: Deny, SourceNamespace: "ns2"},
		Intention{Source: "part", Destination: "api", Action: Deny, SourcePartition: "p2"},
	)
	inNS2 := service("other")
	inNS2.Namespace = "ns2"
	foreign := service("web")
	foreign.TrustDomain = "other.consul"
	partition := service("part")
	partition.Partition = "p2"
	for _, c := range []struct {
		src     Identity
		dst     string
		allowed bool
		why     Why
	}{
		{service("perm"), "api", false, ByPermissions},
		{service("jwt"), "http", false, ByJWT},
		{service("jwt"), "tcp", true, ByIntention},
		{service("any"), "http", false, ByJWT},
		{service("any"), "tcp", true, ByIntention},
		{service("peered"), "api", true, ByDefault},
		{service("other"), "api", true, ByDefault},
		{inNS2, "api", false, ByIntention},
		{service("part"), "api", true, ByDefault},
		{partition, "api", false, ByForeignPartition},
		{foreign, "api", false, ByForeignDomain},
		{Identity{}, "api", false, ByForeignDomain},
		{service(""), "api", false, ByNoName},
		{service("*"), "api", false, ByNoName},
		{service("web"), "", false, ByNoName},
		{service("web"), "*", false, ByNoName},
	} {
		if v := p.Decide(c.src, c.dst); v.Allowed != c.allowed || v.Why != c.why {
			t.Errorf("%+v => %q: %+v, want allowed %v because %q", c.src, c.dst, v, c.allowed, c.why)
		}
	}
}

func TestCompileNamesEveryMistake(t *testing.T) {
	_, err := Compile(1, Deny, mesh, nil, []Intention{
		{Source: "web", Destination: "api", Origin: "a.hcl:1"},
		{Source: "web", Destination: "api", Origin: "b.hcl:2", SourceNamespace: "default"},
		{Source: "", Destination: "api", Origin: "c.hcl:3"},
		{Source: "web", Destination: "", Origin: "d.hcl:4"},
		{Source: "we*", Destination: "api", Origin: "e.hcl:5"},
		{Source: "web", Destination: "a*", Origin: "f.hcl:6"},
		{Source: "web", Destination: "api", SourceNamespace: "*", Origin: "g.hcl:7"},
		{Source: "web", Destination: "api", SourcePeer: "east", Origin: "peers-are-not-duplicates:8"},
	})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"a.hcl:1", "b.hcl:2", "c.hcl:3", "d.hcl:4", "e.hcl:5", "f.hcl:6", "g.hcl:7"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "peers-are") {
		t.Errorf("error names a good intention: %v", err)
	}
}

func TestExplain(t *testing.T) {
	p := compile(t, Deny,
		Intention{Source: "*", Destination: "*", Action: Deny, Origin: "all.hcl:1"},
		Intention{Source: "web", Destination: "api", Action: Allow, Origin: "intentions.hcl:3"},
		Intention{Source: "x", Destination: "api", Action: Allow},
	)
	e := p.Explain(service("web"), "api")
	if !e.Allowed || e.Intention.String() != "web => api (allow), intentions.hcl:3" || !strings.Contains(e.Sentence, e.Intention.String()) {
		t.Errorf("%+v", e)
	}
	if len(e.Considered) != 2 || e.Considered[0] != e.Intention || e.Considered[1].Origin != "all.hcl:1" {
		t.Errorf("considered %v", e.Considered)
	}
	foreign := service("web")
	foreign.TrustDomain = "other.consul"
	if e := p.Explain(foreign, "api"); e.Allowed || len(e.Considered) != 0 || e.Sentence != ByForeignDomain.String() {
		t.Errorf("%+v", e)
	}
	if e := compile(t, Deny).Explain(service("a"), "b"); e.Allowed || !strings.HasSuffix(e.Sentence, "deny") {
		t.Errorf("%+v", e)
	}
}

// naive is the oracle: the longest way to say what Decide does.
func naive(def Action, intentions []Intention, src, dst string) (bool, *Intention) {
	for _, pair := range [][2]string{{src, dst}, {Wildcard, dst}, {src, Wildcard}, {Wildcard, Wildcard}} {
		for i, in := range intentions {
			if in.Source == pair[0] && in.Destination == pair[1] && in.SourcePeer == "" && in.SourcePartition == "" && in.SourceNamespace == "" {
				return in.Action == Allow && !in.Permissions && (!in.JWT || dst != "http"), &intentions[i]
			}
		}
	}
	return def == Allow, nil
}

func TestDecideEqualsTheNaiveMatcher(t *testing.T) {
	names := []string{"web", "Web", "api", "db", "http", "cache", "we", "w", Wildcard}
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 2000 {
		intentions := randomIntentions(rng, names)
		def := Action(rng.IntN(2))
		p := compile(t, def, intentions...)
		for _, src := range names[:len(names)-1] {
			for _, dst := range names[:len(names)-1] {
				allowed, in := naive(def, intentions, src, dst)
				v := p.Decide(service(src), dst)
				if v.Allowed != allowed || (v.Intention == nil) != (in == nil) || in != nil && *v.Intention != *in {
					t.Fatalf("round %d, %s => %s: %+v, the oracle says %v by %v, of %v", round, src, dst, v, allowed, in, intentions)
				}
			}
		}
	}
}

func randomIntentions(rng *rand.Rand, names []string) []Intention {
	var list []Intention
	for range rng.IntN(30) {
		in := Intention{
			Source: names[rng.IntN(len(names))], Destination: names[rng.IntN(len(names))], Action: Action(rng.IntN(2)),
			Permissions: rng.IntN(8) == 0, JWT: rng.IntN(8) == 0,
		}
		switch rng.IntN(10) {
		case 0:
			in.SourcePeer = "east"
		case 1:
			in.SourceNamespace = "ns2"
		case 2:
			in.SourcePartition = "p2"
		}
		duplicate := func(o Intention) bool {
			return o.Source == in.Source && o.Destination == in.Destination && o.SourcePeer == in.SourcePeer &&
				o.SourceNamespace == in.SourceNamespace && o.SourcePartition == in.SourcePartition
		}
		if !slices.ContainsFunc(list, duplicate) {
			in.Origin = fmt.Sprint("random:", len(list))
			list = append(list, in)
		}
	}
	return list
}

func tenThousand(t testing.TB) *Policy {
	intentions := []Intention{{Source: "*", Destination: "*"}}
	for i := range 9999 {
		intentions = append(intentions, Intention{Source: fmt.Sprint("source-", i), Destination: fmt.Sprint("destination-", i%100), Action: Allow})
	}
	return compile(t, Deny, intentions...)
}

func TestDecideDoesNotAllocate(t *testing.T) {
	p := tenThousand(t)
	for _, c := range []struct{ src, dst string }{{"source-5", "destination-5"}, {"nobody", "nowhere"}} {
		src := service(c.src)
		if n := testing.AllocsPerRun(100, func() { p.Decide(src, c.dst) }); n != 0 {
			t.Errorf("%s => %s: %v allocations", c.src, c.dst, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	p := tenThousand(b)
	for _, c := range []struct{ name, src, dst string }{{"exact", "source-5", "destination-5"}, {"wildcard", "nobody", "nowhere"}} {
		src := service(c.src)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(src, c.dst)
			}
		})
	}
}

func TestAPolicyIsOfWhatItWasCompiledOf(t *testing.T) {
	intentions := []Intention{
		{Source: "*", Destination: "*", Action: Allow},
		{Source: "web", Destination: "api", Action: Allow, Origin: "a"},
		{Source: "batch", Destination: "api", JWT: true},
	}
	p := compile(t, Deny, intentions...)
	http := map[string]bool{"http": true}
	slices.Reverse(intentions)
	if !p.IsOf(Deny, mesh, http, intentions) {
		t.Error("it is not of the same intentions in another order")
	}
	changed := func(change func(all []Intention)) []Intention {
		all := slices.Clone(intentions)
		change(all)
		return all
	}
	for what, is := range map[string]bool{
		"another default":      p.IsOf(Allow, mesh, http, intentions),
		"another mesh":         p.IsOf(Deny, Identity{TrustDomain: "other"}, http, intentions),
		"other protocols":      p.IsOf(Deny, mesh, nil, intentions),
		"one intention less":   p.IsOf(Deny, mesh, http, intentions[1:]),
		"one action changed":   p.IsOf(Deny, mesh, http, changed(func(all []Intention) { all[1].Action = Deny })),
		"one origin changed":   p.IsOf(Deny, mesh, http, changed(func(all []Intention) { all[1].Origin = "b" })),
		"one source exchanged": p.IsOf(Deny, mesh, http, changed(func(all []Intention) { all[0].Source = "cron" })),
	} {
		if is {
			t.Errorf("with %s it is still of them", what)
		}
	}
}

func TestAPeersSourcesMatchTheIntentionsThatNameIt(t *testing.T) {
	east := func(name string) Identity {
		id := service(name)
		id.TrustDomain = "east.consul"
		return id
	}
	west := east("web")
	west.TrustDomain = "west.consul"
	p := compile(t, Allow,
		Intention{Source: "web", Destination: "api", Action: Allow, SourcePeer: "east", SourceDomain: "east.consul", Origin: "east"},
		Intention{Source: "*", Destination: "api", Action: Deny, SourcePeer: "east", SourceDomain: "east.consul", Origin: "all of east"},
		Intention{Source: "web", Destination: "api", Action: Deny, Origin: "ours"},
		Intention{Source: "*", Destination: "db", Action: Allow, Origin: "all of ours"},
		Intention{Source: "web", Destination: "*", Action: Deny, SourcePeer: "west", Origin: "unknown domain"},
		Intention{Source: "thief", Destination: "api", Action: Deny, SourcePeer: "thief", SourceDomain: mesh.TrustDomain, Origin: "our own domain"},
	)
	for _, c := range []struct {
		src     Identity
		dst     string
		allowed bool
		origin  string
	}{
		{east("web"), "api", true, "east"},
		{east("batch"), "api", false, "all of east"},
		{east("web"), "db", true, ""}, // the default, and not what is written for ours
		{service("web"), "api", false, "ours"},
		{service("batch"), "api", true, ""},
		{service("thief"), "api", true, ""},
		{west, "api", false, ""},
	} {
		v := p.Decide(c.src, c.dst)
		origin := ""
		if v.Intention != nil {
			origin = v.Intention.Origin
		}
		if v.Allowed != c.allowed || origin != c.origin {
			t.Errorf("%s => %s: %+v by %q, want %v by %q", c.src, c.dst, v, origin, c.allowed, c.origin)
		}
	}
}

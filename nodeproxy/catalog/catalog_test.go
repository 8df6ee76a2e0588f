package catalog

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/policy"
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func compiled(t *testing.T) *policy.Policy {
	t.Helper()
	p, err := policy.Compile(1, policy.Deny, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sample is a good snapshot of two services, not yet given to New.
func sample(t *testing.T) Snapshot {
	return Snapshot{
		TrustDomain: "x.consul", Datacenter: "dc1", Policy: compiled(t),
		Services: map[string]*Service{
			"web": {Name: "web", Virtual: []netip.Addr{ip("240.0.0.1")}, Instances: []*Instance{
				{ID: "web-2", Service: "web", Local: true, Address: at("10.0.0.1:80"), Mesh: at("10.0.0.1:21500")},
				{ID: "web-1", Service: "web", Local: true},
			}},
			"api": {Name: "api", Virtual: []netip.Addr{ip("240.0.0.2"), ip("fd00::2")}, Instances: []*Instance{
				{ID: "api-1", Service: "api", Address: at("10.0.0.2:80"), Mesh: at("10.0.0.2:21500")},
				{ID: "api-6", Service: "api", Local: true, Address: at("[fd01::2]:80"), Mesh: at("[fd01::2]:21500")},
			}},
		},
	}
}

func TestResolve(t *testing.T) {
	s, err := New(sample(t))
	if err != nil {
		t.Fatal(err)
	}
	for to, want := range map[string]string{
		"240.0.0.1:80":         "web",
		"240.0.0.1:1":          "web",
		"[::ffff:240.0.0.2]:9": "api",
		"[fd00::2]:9":          "api",
		"10.0.0.2:80":          "api api-1",
		"[::ffff:10.0.0.2]:80": "api api-1",
		"[fd01::2]:80":         "api api-6",
		"10.0.0.2:81":          "",
		"10.0.0.2:21500":       "", // mTLS is spoken there: never redirected
		"240.0.0.3:80":         "",
		"[fd00::1]:80":         "",
		"0.0.0.0:0":            "", // where instances without an address are
	} {
		d, ok := s.Resolve(at(to))
		got := ""
		if ok {
			got = d.Service.Name
		}
		if d.Instance != nil {
			got += " " + d.Instance.ID
		}
		if got != want || ok != (want != "") {
			t.Errorf("Resolve(%s) = %q, %v; want %q", to, got, ok, want)
		}
	}
	for to, want := range map[string]string{"10.0.0.2:21500": "api-1", "[::ffff:10.0.0.2]:21500": "api-1", "[fd01::2]:21500": "api-6", "10.0.0.2:80": "", "0.0.0.0:0": ""} {
		inst, ok := s.InstanceByMesh(at(to))
		if ok != (want != "") || ok && inst.ID != want {
			t.Errorf("InstanceByMesh(%s) = %+v, %v; want %q", to, inst, ok, want)
		}
	}
	var local []string
	for _, inst := range s.LocalInstances() {
		local = append(local, inst.ID)
	}
	if got := strings.Join(local, " "); got != "api-6 web-1 web-2" {
		t.Errorf("LocalInstances() = %s", got)
	}
	if got := s.Identity("web").String(); got != "spiffe://x.consul/ns/default/dc/dc1/svc/web" {
		t.Errorf("Identity(web) = %s", got)
	}
}

func TestNewRefusesWhatIsAmbiguous(t *testing.T) {
	for _, c := range []struct {
		what  string
		spoil func(*Snapshot)
		want  []string
	}{
		{"a virtual IP of two services", func(s *Snapshot) { s.Services["web"].Virtual[0] = ip("240.0.0.2") }, []string{"virtual IP 240.0.0.2", `"web"`, `"api"`}},
		{"an address of two instances", func(s *Snapshot) { s.Services["web"].Instances[1].Address = at("10.0.0.2:80") }, []string{"10.0.0.2:80", `"web-1"`, `"api-1"`}},
		{"a mesh address of two instances", func(s *Snapshot) { s.Services["web"].Instances[1].Mesh = at("10.0.0.2:21500") }, []string{"10.0.0.2:21500", `"web-1"`, `"api-1"`}},
		{"an instance at a virtual IP", func(s *Snapshot) { s.Services["web"].Instances[0].Address = at("240.0.0.2:5") }, []string{`"web-2"`, "240.0.0.2", `"api"`}},
		{"a service under another name", func(s *Snapshot) { s.Services["web"].Name = "wob" }, []string{`"wob"`, `"web"`}},
		{"an instance of another service", func(s *Snapshot) { s.Services["web"].Instances[0].Service = "api" }, []string{`"web-2"`, `"api"`, `"web"`}},
		{"no policy", func(s *Snapshot) { s.Policy = nil }, []string{"no policy"}},
	} {
		s := sample(t)
		c.spoil(&s)
		snap, err := New(s)
		if err == nil || snap != nil {
			t.Errorf("%s: no error", c.what)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error does not name %s: %v", c.what, want, err)
			}
		}
	}
}

func TestReasonOfFindsTheRefusal(t *testing.T) {
	r := &Refusal{Reason: ReasonCapacity}
	if got := ReasonOf(fmt.Errorf("dial api: %w", r), ReasonConnectFailed); got != ReasonCapacity {
		t.Errorf("ReasonOf = %s", got)
	}
	if got := ReasonOf(errors.New("x"), ReasonConnectFailed); got != ReasonConnectFailed {
		t.Errorf("ReasonOf without a Refusal = %s", got)
	}
	if r.Error() != ReasonCapacity.Sentence() || r.Error() == "" {
		t.Errorf("a Refusal without an error says %q", r.Error())
	}
}

func TestCanariesAreAtTheEndOfTheRangesAndBelongToNobody(t *testing.T) {
	s := sample(t)
	s.VirtualRanges = []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("fd00::/126"), netip.MustParsePrefix("240.0.0.0/30"), netip.MustParsePrefix("240.0.0.2/32"), {}}
	s.Services["api"].Virtual = []netip.Addr{ip("240.0.0.2"), ip("fd00::3")}
	snap, err := New(s)
	if err != nil {
		t.Fatal(err)
	}
	// 255.255.255.255 is broadcast, fd00::3 and 240.0.0.2 are the api's
	if got, want := fmt.Sprint(snap.Canaries()), "[255.255.255.254 fd00::2 240.0.0.3]"; got != want {
		t.Errorf("canaries %s, want %s", got, want)
	}
	for _, canary := range snap.Canaries() {
		if to, ok := snap.Resolve(netip.AddrPortFrom(canary, 1)); ok {
			t.Errorf("%s leads to %s", canary, to.Service.Name)
		}
	}
}

func TestSnapshotsOfOneCatalogAreKnownToBe(t *testing.T) {
	one, err := New(Snapshot{Generation: 1, Policy: &policy.Policy{}})
	other, errOther := New(Snapshot{Generation: 1, Policy: &policy.Policy{}})
	if err != nil || errOther != nil {
		t.Fatal(err, errOther)
	}
	leaves := map[string]*tls.Certificate{"api": {}}
	next := one.WithPolicy(&policy.Policy{}, 2, time.Now())
	last := next.WithLeaves(leaves, 3, time.Now())
	if !next.SameCatalog(one) || !last.SameCatalog(one) {
		t.Error("what WithPolicy and WithLeaves make is taken for another catalog")
	}
	if last.Generation != 3 || last.Policy != next.Policy || last.Leaves["api"] == nil || next.Leaves["api"] != nil {
		t.Errorf("WithLeaves makes %+v of %+v", last, next)
	}
	if one.SameCatalog(other) || next.SameCatalog(other) || one.SameCatalog(nil) || (&Snapshot{}).SameCatalog(&Snapshot{}) {
		t.Error("snapshots that were made one by one are taken for the same")
	}
}

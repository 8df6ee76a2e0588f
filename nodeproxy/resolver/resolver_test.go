package resolver

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestFiltersAreConsuls(t *testing.T) {
	inst := &catalog.Instance{ID: "api-1", Service: "api", Node: "n1", Tags: []string{"blue"}, Meta: map[string]string{"version": "v1", "a.b": "x"}}
	for text, want := range map[string]string{
		"":                               "true",
		"Service.Meta.version == v1":     "true",
		"Service.Meta.version == \"v2\"": "false",
		"Service.Meta.none == v1":        "false",
		"Service.Meta.none != v1":        "true",
		"Service.Meta[\"a.b\"] == x":     "true",
		"blue in Service.Tags":           "true",
		"Service.Tags contains red":      "false",
		"Service.Tags is empty":          "false",
		"Service.ID matches \"^api-\" and not Node.Node == n2": "true",
		"Node.Datacenter == dc1":                               "true",
		"Service.Port == 80":                                   "false",
		"Service.Nothing == v1":                                "error",
		"Checks.Status == x":                                   "error",
		"Service.Meta.version =":                               "error",
		"(":                                                    "error",
	} {
		f, err := ParseFilter(text)
		got := "error"
		if err == nil {
			got = fmt.Sprint(f.Matches(inst, "dc1"))
		}
		if got != want {
			t.Errorf("%q is %s (%v), want %s", text, got, err, want)
		}
	}
}

func entries(all ...*api.ServiceResolverConfigEntry) map[string]*api.ServiceResolverConfigEntry {
	m := make(map[string]*api.ServiceResolverConfigEntry)
	for _, e := range all {
		m[e.Name] = e
	}
	return m
}

func TestChainsAreCompiledAsByConsul(t *testing.T) {
	subsets := map[string]api.ServiceResolverSubset{"v1": {Filter: "Service.Meta.version == v1"}, "v2": {Filter: "Service.Meta.version == v2"}}
	mesh := entries(
		&api.ServiceResolverConfigEntry{Name: "api", DefaultSubset: "v1", Subsets: subsets, LoadBalancer: &api.LoadBalancer{Policy: "maglev"},
			Failover: map[string]api.ServiceResolverFailover{
				"*":  {Service: "spare"},
				"v1": {Targets: []api.ServiceResolverFailoverTarget{{ServiceSubset: "v2"}, {Service: "alias"}, {Service: "spare"}}},
			}},
		&api.ServiceResolverConfigEntry{Name: "alias", Redirect: &api.ServiceResolverRedirect{Service: "api", ServiceSubset: "v2"}},
		&api.ServiceResolverConfigEntry{Name: "twice", Redirect: &api.ServiceResolverRedirect{Service: "plain"}},
		&api.ServiceResolverConfigEntry{Name: "plain", Redirect: &api.ServiceResolverRedirect{Service: "api"}},
		&api.ServiceResolverConfigEntry{Name: "self", Failover: map[string]api.ServiceResolverFailover{"*": {Service: "self"}}},
		&api.ServiceResolverConfigEntry{Name: "pair", DefaultSubset: "v1", Subsets: subsets, Failover: map[string]api.ServiceResolverFailover{"*": {ServiceSubset: "v2"}}},
		&api.ServiceResolverConfigEntry{Name: "a", Redirect: &api.ServiceResolverRedirect{Service: "b"}},
		&api.ServiceResolverConfigEntry{Name: "b", Redirect: &api.ServiceResolverRedirect{Service: "a"}},
		&api.ServiceResolverConfigEntry{Name: "lost", Redirect: &api.ServiceResolverRedirect{Service: "api", ServiceSubset: "v3"}},
	)
	for service, want := range map[string]string{
		"api":   "v1.api v2.api spare source_hash",
		"alias": "v2.api spare source_hash",
		"twice": "v1.api v2.api spare source_hash",
		"pair":  "v1.pair v2.pair ",
		"self":  "self ",
		"other": "other ",
		"a":     "error: circle", "lost": "error: no subset \"v3\"",
	} {
		c, err := Compile(service, mesh)
		if part, isError := strings.CutPrefix(want, "error: "); isError {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %v, want an error with %q", service, err, part)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", service, err)
			continue
		}
		got := ""
		for _, x := range c.Targets {
			got += (&catalog.Target{Service: x.Service, Subset: x.Subset}).String() + " "
			if x.Subset != "" && x.Filter != subsets[x.Subset].Filter {
				t.Errorf("%s: the filter of %s is %q", service, x.Subset, x.Filter)
			}
		}
		if got += string(c.Balance); got != want {
			t.Errorf("%s is %q, want %q", service, got, want)
		}
	}
}

func TestWhatCannotBeHonouredIsAFaultOfItsKey(t *testing.T) {
	for _, c := range []struct {
		entry api.ServiceResolverConfigEntry
		want  string
	}{
		{api.ServiceResolverConfigEntry{Redirect: &api.ServiceResolverRedirect{Service: "x", Datacenter: "dc2"}}, `[Redirect] Redirect: datacenter "dc2": the only one here is "dc1"`},
		{api.ServiceResolverConfigEntry{Redirect: &api.ServiceResolverRedirect{Service: "x", Peer: "p"}}, `[Redirect] Redirect: peer "p": there is none here`},
		{api.ServiceResolverConfigEntry{Redirect: &api.ServiceResolverRedirect{Service: "x", Namespace: "prod"}}, `[Redirect] Redirect: namespace "prod": there is none here`},
		{api.ServiceResolverConfigEntry{Redirect: &api.ServiceResolverRedirect{}}, `[Redirect] Redirect leads nowhere`},
		{api.ServiceResolverConfigEntry{Failover: map[string]api.ServiceResolverFailover{"*": {Datacenters: []string{"dc2"}}}}, `[Failover *] Failover *: datacenter "dc2"`},
		{api.ServiceResolverConfigEntry{Failover: map[string]api.ServiceResolverFailover{"*": {Service: "x", SamenessGroup: "g"}}}, `[Failover *] Failover *: sameness group "g"`},
		{api.ServiceResolverConfigEntry{Failover: map[string]api.ServiceResolverFailover{"v9": {Service: "x"}}}, `[Failover v9] Failover "v9": it is neither`},
		{api.ServiceResolverConfigEntry{Failover: map[string]api.ServiceResolverFailover{"*": {}}}, `leads nowhere`},
		{api.ServiceResolverConfigEntry{DefaultSubset: "v9"}, `[DefaultSubset] DefaultSubset "v9" is none`},
		{api.ServiceResolverConfigEntry{Subsets: map[string]api.ServiceResolverSubset{"v1": {Filter: "("}}}, `[Subsets v1 Filter] filter of subset "v1"`},
		{api.ServiceResolverConfigEntry{LoadBalancer: &api.LoadBalancer{Policy: "fair"}}, `[LoadBalancer Policy] LoadBalancer policy "fair"`},
		{api.ServiceResolverConfigEntry{ConnectTimeout: -time.Second}, `[ConnectTimeout] ConnectTimeout is negative`},
		{api.ServiceResolverConfigEntry{PrioritizeByLocality: &api.ServiceResolverPrioritizeByLocality{Mode: "failover"}}, `[PrioritizeByLocality]`},
	} {
		faults := Check(&c.entry, "dc1")
		if len(faults) != 1 {
			t.Errorf("want %s, got %v", c.want, faults)
			continue
		}
		if got := fmt.Sprintf("%v %s", faults[0].Path, faults[0].Err); !strings.Contains(got, c.want) {
			t.Errorf("%s, want %s", got, c.want)
		}
	}
	good := api.ServiceResolverConfigEntry{Failover: map[string]api.ServiceResolverFailover{"*": {Service: "x", Datacenters: []string{"dc1"}}}}
	if faults := Check(&good, "dc1"); len(faults) > 0 {
		t.Error(faults)
	}
}

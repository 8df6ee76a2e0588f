package workload

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
	"nodeproxy.io/redirect"
)

// callOf is a snapshot in which web calls api, whose resolver leads to a route.
func callOf(calls *catalog.Calls, route func(api *catalog.Service) *catalog.Route) (*catalog.Snapshot, *catalog.Service) {
	api := &catalog.Service{Name: "api", Instances: []*catalog.Instance{
		{ID: "api-1", Service: "api", Node: "n1", Healthy: true, Local: true, Mesh: netip.MustParseAddrPort("10.0.0.1:21000")},
		{ID: "api-2", Service: "api", Node: "n2", Healthy: true, Mesh: netip.MustParseAddrPort("10.0.0.2:21000")},
	}}
	if route != nil {
		api.Chain = route(api)
	}
	return &catalog.Snapshot{Services: map[string]*catalog.Service{"api": api}, Calls: map[string]*catalog.Calls{"web": calls}}, api
}

func TestWhatOnlyTheProxyCanHonourIsNotGranted(t *testing.T) {
	plain := func(api *catalog.Service, balance catalog.Balance, before ...*catalog.Target) *catalog.Route {
		return &catalog.Route{Balance: balance, Targets: append(before, &catalog.Target{Service: "api", Instances: api.Instances},
			&catalog.Target{Service: "spare", Instances: []*catalog.Instance{{ID: "spare-1", Service: "spare"}}})}
	}
	for name, c := range map[string]struct {
		calls             *catalog.Calls
		route             func(api *catalog.Service) *catalog.Route
		virtual, instance string // why not, "" when it may be granted
	}{
		"no configuration":          {},
		"a failover that is unused": {route: func(api *catalog.Service) *catalog.Route { return plain(api, catalog.LeastRequest) }},
		"random":                    {route: func(api *catalog.Service) *catalog.Route { return plain(api, catalog.Random) }},
		"round robin":               {route: func(api *catalog.Service) *catalog.Route { return plain(api, catalog.RoundRobin) }, virtual: "round_robin"},
		"source hash":               {route: func(api *catalog.Service) *catalog.Route { return plain(api, catalog.SourceHash) }, virtual: "source_hash"},
		"a redirect": {route: func(api *catalog.Service) *catalog.Route {
			return plain(api, "", &catalog.Target{Service: "v2", Instances: api.Instances})
		}, virtual: "leads to v2"},
		"a subset of all instances": {route: func(api *catalog.Service) *catalog.Route {
			return plain(api, "", &catalog.Target{Service: "api", Subset: "a", Instances: api.Instances})
		}, virtual: "leads to a.api"},
		"fewer of its own instances": {route: func(api *catalog.Service) *catalog.Route {
			return plain(api, "", &catalog.Target{Service: "api", Instances: api.Instances[:1]})
		}, virtual: "leads to api"},
		"another datacenter": {route: func(api *catalog.Service) *catalog.Route {
			return plain(api, "", &catalog.Target{Service: "api", Datacenter: "dc2", Instances: api.Instances})
		}, virtual: "leads to api.dc2"},
		"a failover in use": {route: func(api *catalog.Service) *catalog.Route {
			for _, inst := range api.Instances {
				inst.Healthy = false
			}
			r := plain(api, "")
			r.Targets[1].Instances[0].Healthy, r.Targets[1].Instances[0].Mesh = true, netip.MustParseAddrPort("10.0.0.3:21000")
			return r
		}, virtual: "leads to spare"},
		"MaxConnections of the caller":     {calls: &catalog.Calls{Defaults: catalog.CallConfig{MaxConnections: 3}}, virtual: "MaxConnections", instance: "MaxConnections"},
		"MaxConnections to it":             {calls: &catalog.Calls{Overrides: map[string]catalog.CallConfig{"api": {MaxConnections: 3}}}, virtual: "MaxConnections", instance: "MaxConnections"},
		"MaxConnections to another":        {calls: &catalog.Calls{Overrides: map[string]catalog.CallConfig{"db": {MaxConnections: 3}}}},
		"PassiveHealthCheck of the caller": {calls: &catalog.Calls{Defaults: catalog.CallConfig{Ejection: &catalog.Ejection{Failures: 1}}}, virtual: "PassiveHealthCheck", instance: "PassiveHealthCheck"},
	} {
		t.Run(name, func(t *testing.T) {
			snap, api := callOf(c.calls, c.route)
			check := func(to catalog.Destination, want string) {
				if why := proxied(snap, "web", to); (want == "") != (why == "") || !strings.Contains(why, want) {
					t.Errorf("to %+v: %q, want %q", to, why, want)
				}
			}
			check(catalog.Destination{Service: api}, c.virtual)
			check(catalog.Destination{Service: api, Instance: api.Instances[0]}, c.instance)
			if why := proxied(snap, "other", catalog.Destination{Service: api, Instance: api.Instances[0]}); why != "" {
				t.Errorf("for another caller: %q", why)
			}
		})
	}
}

func TestTheAddressOfAnUpstreamIsNotGrantedToItsWorkload(t *testing.T) {
	up := &catalog.Upstream{At: netip.MustParseAddrPort("240.0.0.1:5000"), Name: "db"}
	v := &view{snap: &catalog.Snapshot{Upstreams: map[string][]*catalog.Upstream{"web-1": {up}}}, callers: map[uint32][]string{7: {"web-1"}, 8: {"other-1"}}}
	for at, want := range map[string]bool{"240.0.0.1:5000": true, "240.0.0.1:0": true, "240.0.0.1:5001": false, "240.0.0.2:0": false} {
		if got := v.isUpstream(7, netip.MustParseAddrPort(at)); got != want {
			t.Errorf("%s is an upstream of the workload: %t", at, got)
		}
		if v.isUpstream(8, netip.MustParseAddrPort(at)) {
			t.Errorf("%s is an upstream of another workload", at)
		}
	}
}

func TestAGrantLastsAsLongAsBothCertificates(t *testing.T) {
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	leaf := func(from, until time.Duration) *tls.Certificate {
		return &tls.Certificate{Leaf: &x509.Certificate{NotBefore: now.Add(from), NotAfter: now.Add(until)}}
	}
	snap := &catalog.Snapshot{Leaves: map[string]*tls.Certificate{
		"short": leaf(-time.Hour, time.Hour), "long": leaf(-time.Hour, 2*time.Hour), "expired": leaf(-time.Hour, -time.Second), "early": leaf(time.Minute, time.Hour),
	}}
	for _, c := range []struct {
		source, destination string
		want                time.Duration // 0: no grant
	}{
		{"short", "long", time.Hour}, {"long", "short", time.Hour}, {"long", "long", 2 * time.Hour}, {"expired", "long", 0}, {"long", "expired", 0},
		{"early", "long", 0}, {"long", "early", 0}, {"none", "long", 0}, {"long", "none", 0},
	} {
		m, at := managerOf(&reluctant{}), netip.MustParseAddrPort("10.0.0.1:8080")
		from, to := &space{Namespace: &redirect.Namespace{Cookie: 1}}, &space{Namespace: &redirect.Namespace{Cookie: 2}}
		inst := &catalog.Instance{ID: "i", Service: c.destination, Local: true, Healthy: true, Address: at, Mesh: at}
		snap.Services = map[string]*catalog.Service{c.destination: {Name: c.destination, Instances: []*catalog.Instance{inst}}}
		m.direct.policy = &catalog.Snapshot{TrustDomain: "x.consul", Policy: p}
		m.direct.routes[routeKey{1, 2, at}] = &route{source: netip.MustParseAddr("10.0.0.2")}
		grants := m.grantsOf(&view{snap: snap}, &entry{Workload: Workload{ID: 7, Service: c.source}}, from, []target{
			{served: &served{Served: Served{Service: c.destination, Instance: "i"}, instance: inst, space: to}, address: at},
		})
		if (len(grants) == 1) != (c.want > 0) || len(grants) > 0 && !grants[0].NotAfter.Equal(now.Add(c.want)) {
			t.Errorf("from %s to %s: %+v; want one until %v from now", c.source, c.destination, grants, c.want)
		}
	}
}

// reluctant is a kernel whose first attempts to destroy a connection fail, as no real one does when it is told to.
type reluctant struct {
	live     []redirect.Granted
	failures int
}

func (k *reluctant) SetGrants([]redirect.Grant) error     { return nil }
func (k *reluctant) Granted() ([]redirect.Granted, error) { return slices.Clone(k.live), nil }
func (k *reluctant) Ended() ([]redirect.Granted, error)   { return nil, nil }

func (k *reluctant) Destroy(g redirect.Granted) error {
	if k.failures > 0 {
		k.failures--
		return errors.New("no memory")
	}
	k.live = slices.DeleteFunc(k.live, func(other redirect.Granted) bool { return other.Cookie == g.Cookie })
	return nil
}

func (k *reluctant) cookies() (all []uint64) {
	for _, g := range k.live {
		all = append(all, g.Cookie)
	}
	return all
}

// told collects what a Handler is told of direct connections.
type told struct {
	Handler
	all []DirectConnection
}

func (h *told) Direct(c DirectConnection) { h.all = append(h.all, c) }

func managerOf(k *reluctant) *Manager {
	m := &Manager{pen: newPen(), direct: newDirect(Config{}, k), log: slog.New(slog.DiscardHandler), ready: make(chan struct{})}
	close(m.ready)
	return m
}

func TestWhatWasDeniedWhileNoDaemonRanIsEndedAtALaterReconciliationIfNotAtTheFirst(t *testing.T) {
	k := &reluctant{live: []redirect.Granted{{Cookie: 1, Opened: time.Now(), Accepted: true}}, failures: 4}
	m, h := managerOf(k), &told{}
	for range 5 {
		m.settleDirect(h)
	}
	if len(k.live) > 0 {
		t.Errorf("%d failures later %v are live", 4-k.failures, k.cookies())
	}
	if len(h.all) != 1 || h.all[0].ID != 1 || h.all[0].Stage != DirectOpened {
		t.Errorf("told of it: %+v; want its opening once", h.all)
	}
	k.live = []redirect.Granted{{Cookie: 2, Opened: time.Now(), Accepted: true}}
	m.settleDirect(h)
	if len(k.live) != 1 {
		t.Error("a connection of this daemon's is ended as if it were an earlier one's")
	}
}

func TestAStrangersConnectionIsEndedWithoutAnEvent(t *testing.T) {
	k := &reluctant{failures: 1, live: []redirect.Granted{
		{Cookie: 1, Muzzled: true},
		{Cookie: 2, Opened: time.Now()},
		{Cookie: 3, Opened: time.Now(), Accepted: true},
		{Cookie: 4},
	}}
	m := managerOf(k)
	if err := m.reapDirect(&told{}); err == nil {
		t.Error("a failure is not told")
	}
	if err := m.reapDirect(&told{}); err != nil {
		t.Error(err)
	}
	if !slices.Equal(k.cookies(), []uint64{3, 4}) {
		t.Errorf("%v are live; want 3, which a workload has accepted, and 4, which nobody has yet", k.cookies())
	}
}

func TestAStrangersConnectionIsEndedWhenTheNextDaemonStarts(t *testing.T) {
	p, err := policy.Compile(1, policy.Allow, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("10.0.0.1:8080")
	k := &reluctant{failures: 1, live: []redirect.Granted{
		{Cookie: 1, Workload: 7, To: 5, Destination: at, Muzzled: true},
		{Cookie: 2, Workload: 7, To: 5, Destination: at, Opened: time.Now(), Accepted: true},
	}}
	m := managerOf(k)
	m.direct.policy = &catalog.Snapshot{TrustDomain: "x.consul", Policy: p}
	m.direct.remember(7, owner{service: "web"})
	m.direct.places[place{5, at}] = &served{Served: Served{Service: "api", Instance: "api-1"}}
	for range 2 {
		m.settleDirect(&told{})
	}
	if !slices.Equal(k.cookies(), []uint64{2}) {
		t.Errorf("%v are live; want 2, which a workload has accepted and the policy allows", k.cookies())
	}
}

package consul_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	lab "nodeproxy.io/tests/consul"
)

func TestConnectionsDoNotGrowWithChains(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	const services = 100
	w := newWorld(t, lab.Config{})
	name := func(i int) string { return fmt.Sprintf("service-%03d", i) }
	w.must(w.agent.Register(w.ctx(), lab.Service("spare", "spare-1", "10.2.0.2", 8080)))
	for i := range services {
		w.must(w.agent.Register(w.ctx(), lab.Service(name(i), name(i)+"-1", fmt.Sprintf("10.1.%d.2", i), 8080)))
		w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": name(i), "DefaultSubset": "v1",
			"Subsets":  map[string]any{"v1": map[string]any{"Filter": fmt.Sprintf("Service.Meta.version != v%d", i)}},
			"Failover": map[string]any{"*": map[string]any{"Service": "spare"}}}))
	}
	w.run(name(0))
	w.await("all chains are there", func(s *catalog.Snapshot) error {
		for i := range services {
			svc := s.Services[name(i)]
			if svc == nil || svc.Chain == nil {
				return fmt.Errorf("%s has no chain", name(i))
			}
			if got := svc.Chain.Targets; len(got) != 2 || got[0].String() != "v1."+name(i) || got[1].String() != "spare" || len(got[0].Instances) != 1 || len(got[1].Instances) != 1 {
				return fmt.Errorf("the targets of %s are %v", name(i), got)
			}
		}
		return nil
	})
	w.source.Called(name(7))
	w.must(w.agent.Deregister(w.ctx(), "spare-1"))
	began := time.Now()
	w.await("the failover of a called service is seen to go", func(s *catalog.Snapshot) error {
		if n := len(s.Services[name(7)].Chain.Targets[1].Instances); n != 0 {
			return fmt.Errorf("it has %d instances", n)
		}
		return nil
	})
	t.Logf("seen after %s", time.Since(began))
	w.front.Lock()
	defer w.front.Unlock()
	t.Logf("at most %d connections, statuses %v", w.front.Most, w.front.Statuses)
	if w.front.Most > 24 {
		t.Errorf("%d connections at once", w.front.Most)
	}
	if n := w.front.Statuses[http.StatusTooManyRequests]; n > 0 {
		t.Errorf("%d answers were 429", n)
	}
}

func TestAResolverAndItsChainAreInForceInOneStep(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run()
	w.await("api is healthy", func(s *catalog.Snapshot) error {
		if svc := s.Services["api"]; svc == nil || !svc.Route().Preferred().Usable() {
			return errors.New("it is not")
		}
		return nil
	})
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "DefaultSubset": "all",
		"Subsets": map[string]any{"all": map[string]any{"Filter": "Service.Port != 1"}}}))
	w.await("the subset is in force", func(s *catalog.Snapshot) error {
		if c := s.Services["api"].Chain; c == nil || c.Targets[0].Subset != "all" {
			return fmt.Errorf("the chain is %+v", c)
		}
		return nil
	})
	w.must(w.agent.Remove(w.ctx(), "service-resolver", "api"))
	w.await("it is gone", func(s *catalog.Snapshot) error {
		if s.Services["api"].Chain != nil {
			return errors.New("it is not")
		}
		return nil
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	healthy := false
	for _, s := range w.all {
		svc := s.Services["api"]
		if svc == nil {
			continue
		}
		usable := svc.Route().Preferred().Usable()
		healthy = healthy || usable
		if healthy && !usable {
			t.Errorf("in generation %d calls to api go nowhere: %+v", s.Generation, svc.Route().Preferred())
		}
	}
}

func TestAnUnreadableChainLeavesTheLastOneInForce(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": "alias", "Redirect": map[string]any{"Service": "api"}}))
	w.run()
	redirected := func(s *catalog.Snapshot) error {
		if svc := s.Services["alias"]; svc == nil || len(svc.Virtual) != 1 || svc.Chain.Preferred().Service != "api" || !svc.Chain.Preferred().Usable() {
			return fmt.Errorf("alias is %+v", svc)
		}
		return nil
	}
	w.await("alias is redirected", redirected)
	w.front.Fail(http.StatusInternalServerError, func(r *http.Request) bool { return r.URL.Path == "/v1/discovery-chain/alias" })
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": "other", "Redirect": map[string]any{"Service": "api"}}))
	w.await("another chain is there", func(s *catalog.Snapshot) error {
		if s.Services["other"] == nil {
			return errors.New("it is not")
		}
		return redirected(s)
	})
	w.awaitHealth("what is not answered", func(h catalog.Health) bool { return h.Err != nil })
	w.front.Fail(0, nil)
	w.awaitHealth("that all is answered", func(h catalog.Health) bool { return h.Err == nil })
}

func TestAVirtualIPAssignedByHandCountsInsideVirtualCIDRs(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.config.VirtualCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-resolver", "Name": "api", "ConnectTimeout": "1s"}))
	w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/internal/service-virtual-ip", map[string]any{"Service": "api", "ManualVIPs": []string{"10.96.0.7", "10.97.0.7"}}, nil))
	w.run()
	w.await("the address counts", func(s *catalog.Snapshot) error {
		if to, ok := s.Resolve(netip.MustParseAddrPort("10.96.0.7:1")); !ok || to.Name() != "api" {
			return fmt.Errorf("it is %+v", to)
		}
		if to, ok := s.Resolve(netip.MustParseAddrPort("10.97.0.7:1")); ok {
			t.Fatalf("one outside is %+v", to)
		}
		for _, p := range s.Problems {
			if p.Service == "api" && p.Kind == "refused" {
				return nil
			}
		}
		return errors.New("the one outside is not reported")
	})
}

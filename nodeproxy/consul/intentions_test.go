package consul_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	lab "nodeproxy.io/tests/consul"
)

func TestAChangeOfAnIntentionChangesNothingElse(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "allow"}))
	w.run("api")
	w.await("api is served", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil || s.Services["api"] == nil || s.Policy.Len() != 1 {
			return errors.New("it is not")
		}
		return nil
	})
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("web is denied", denied("web", "api"))
	w.mu.Lock()
	defer w.mu.Unlock()
	first := slices.IndexFunc(w.all, func(s *catalog.Snapshot) bool { return denied("web", "api")(s) == nil })
	if first < 1 || !w.all[first].SameCatalog(w.all[first-1]) {
		t.Errorf("snapshot %d of %d is made anew", first, len(w.all))
	}
}

func TestIntentionsAndServicesThatChangeAtOnceAreAllApplied(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("api")
	w.await("api is there", func(s *catalog.Snapshot) error {
		if s.Services["api"] == nil {
			return errors.New("it is not")
		}
		return nil
	})
	const rounds = 30
	ctx := w.ctx()
	var writers sync.WaitGroup
	errs := make(chan error, 2)
	writers.Go(func() {
		errs <- each(ctx, rounds, func(i int) error {
			return w.agent.Register(ctx, lab.Service(fmt.Sprintf("new-%d", i), fmt.Sprintf("new-%d-1", i), fmt.Sprintf("10.1.3.%d", i+1), 8080))
		})
	})
	writers.Go(func() {
		errs <- each(ctx, rounds, func(i int) error {
			action := map[string]string{fmt.Sprintf("caller-%d", i): "deny", "web": []string{"allow", "deny"}[i%2]}
			return w.agent.Intentions(ctx, "api", action)
		})
	})
	writers.Wait()
	w.must(errors.Join(<-errs, <-errs))
	w.await("all is as written last", func(s *catalog.Snapshot) error {
		for i := range rounds {
			if svc := s.Services[fmt.Sprintf("new-%d", i)]; svc == nil || len(svc.Instances) != 1 {
				return fmt.Errorf("new-%d is not there", i)
			}
		}
		if s.Policy.Len() != 2 {
			return fmt.Errorf("%d intentions", s.Policy.Len())
		}
		return errors.Join(denied("web", "api")(s), denied(fmt.Sprintf("caller-%d", rounds-1), "api")(s))
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, s := range w.all[1:] {
		if before := w.all[i]; s.Policy.Generation() < before.Policy.Generation() || s.Policy.Generation() > s.Generation {
			t.Errorf("policy %d of snapshot %d comes after policy %d of snapshot %d", s.Policy.Generation(), s.Generation, before.Policy.Generation(), before.Generation)
		}
		if have, had := count(s), count(w.all[i]); have < had {
			t.Errorf("snapshot %d has %d services, the one before it %d", s.Generation, have, had)
		}
	}
}

// each calls f for 0 to n-1 until it fails.
func each(ctx context.Context, n int, f func(int) error) error {
	for i := range n {
		if err := f(i); err != nil || ctx.Err() != nil {
			return errors.Join(err, context.Cause(ctx))
		}
	}
	return nil
}

func count(s *catalog.Snapshot) int { return len(s.Services) }

func TestOneServiceThatMayNotBeReadDoesNotKeepTheIntentionsOfThisNodesOwnBack(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "secret", "ID": "secret-1", "Address": "10.1.2.4", "Port": 1, "Connect": map[string]any{"Native": true}}))
	w.front.Spoil = func(rw http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != "/v1/connect/intentions/match" || !slices.Contains(req.URL.Query()["name"], "hidden") {
			return false
		}
		http.Error(rw, "Permission denied", http.StatusForbidden)
		return true
	}
	w.run()
	w.await("there is one", func(*catalog.Snapshot) error { return nil })
	w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/catalog/register", map[string]any{
		"Node": "node-2", "Address": "192.0.2.2", "Service": map[string]any{"Service": "hidden", "ID": "hidden-1", "Address": "10.2.0.2", "Port": 1, "Connect": map[string]any{"Native": true}},
	}, nil))
	w.awaitHealth("that a list is refused", func(h catalog.Health) bool { return h.Err != nil })
	w.source.Need([]string{"api"})
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("web is denied by the intention", denied("web", "api"))
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "allow"}))
	w.await("web is allowed by the intention", func(s *catalog.Snapshot) error {
		if v := s.Policy.Decide(s.Identity("web"), "api"); !v.Allowed {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
}

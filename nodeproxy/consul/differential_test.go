package consul_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
	lab "nodeproxy.io/tests/consul"
)

// The names of the differential: what Consul takes for one, and what only looks like another.
var differential = []string{
	"web", "api", "API-v2", "pay.ments", "pay-ments", "payments", "a", "web-sidecar", "Batch", "x_1", "web.api", "0db", "cache.v1.2", "MiXed-Case.1",
}

// strangers are sources that are no services, variants of case among them.
var strangers = []string{"Web", "WEB", "nobody", "batch", "api-v2", "mixed-case.1", "pay", "we"}

const (
	differentialRounds  = 5
	differentialPairs   = 1000 // of each round, in each of the two worlds: 10,000
	differentialWorkers = 8    // of 200 connections that an agent takes
)

func TestVerdictsAreConsuls(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: 10,000 pairs are asked of a real agent")
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d repeats this run", seed)
	for _, c := range []struct {
		name string
		cfg  lab.Config
	}{
		{"by default everything is allowed", lab.Config{}},
		{"by default everything is denied", lab.Config{HCL: lab.WithACLs, Token: lab.Management}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.cfg)
			if c.cfg.Token != "" {
				w.config.TokenFile = filepath.Join(w.lab.Dir(), "token")
				w.must(os.WriteFile(w.config.TokenFile, []byte(c.cfg.Token), 0o600))
			}
			for i, name := range differential {
				w.must(w.agent.Register(w.ctx(), lab.Service(name, fmt.Sprintf("instance-%d", i), fmt.Sprintf("10.1.2.%d", i+1), 8080)))
			}
			w.run(differential...)
			w.await("every service is there", func(s *catalog.Snapshot) error {
				for _, name := range differential {
					if s.Services[name] == nil {
						return fmt.Errorf("%s is not", name)
					}
				}
				return nil
			})
			random := rand.New(rand.NewPCG(seed, 0))
			for round := range differentialRounds {
				snap, renamed := w.writeIntentions(random, round)
				w.compare(snap, renamed, random)
			}
		})
	}
}

// writeIntentions replaces all intentions by random ones. It returns the first snapshot that has them, and the destinations
// whose entry has a name of another case.
func (w *world) writeIntentions(random *rand.Rand, round int) (_ *catalog.Snapshot, renamed map[string]bool) {
	w.t.Helper()
	renamed = make(map[string]bool)
	sources := slices.Concat([]string{"*", "*", "*"}, differential, strangers)
	for _, destination := range append([]string{"*"}, differential...) {
		_ = w.agent.Remove(w.ctx(), "service-intentions", destination)
		actions := make(map[string]string)
		for range random.IntN(6) {
			actions[sources[random.IntN(len(sources))]] = []string{"allow", "deny"}[random.IntN(2)]
		}
		if len(actions) == 0 {
			continue
		}
		name := destination
		if destination != differential[0] && random.IntN(4) == 0 {
			name = strings.ToUpper(destination)
		}
		renamed[destination] = name != destination
		w.must(w.agent.Intentions(w.ctx(), name, actions))
	}
	// Those of all services come in one answer: the one that has the last write has the others.
	marker := differential[0]
	actions := map[string]string{"round-" + strconv.Itoa(round): []string{"deny", "allow"}[round%2]}
	for source, action := range w.written(marker) {
		if !strings.HasPrefix(source, "round-") {
			actions[source] = action
		}
	}
	w.must(w.agent.Intentions(w.ctx(), marker, actions))
	snap := w.await(fmt.Sprintf("round %d is in force", round), func(s *catalog.Snapshot) error {
		for _, in := range s.Policy.Intentions() {
			if in.Source == "round-"+strconv.Itoa(round) {
				return nil
			}
		}
		return errors.New("it is not")
	})
	return snap, renamed
}

// written are the actions of a destination's entry, by source.
func (w *world) written(destination string) map[string]string {
	var entry struct {
		Sources []struct{ Name, Action string }
	}
	_ = w.agent.Do(w.ctx(), http.MethodGet, "/v1/config/service-intentions/"+destination, nil, &entry) // there may be none
	actions := make(map[string]string)
	for _, s := range entry.Sources {
		actions[s.Name] = s.Action
	}
	return actions
}

// compare asks Consul about random pairs and compares its verdicts with those of a snapshot. The check does not find an entry
// whose name is of another case; authorize does, and so do Consul's proxies.
func (w *world) compare(snap *catalog.Snapshot, renamed map[string]bool, random *rand.Rand) {
	w.t.Helper()
	sources := slices.Concat(differential, strangers)
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Minute)
	defer cancel()
	pairs := make(chan [2]string)
	var asking sync.WaitGroup
	for range differentialWorkers {
		asking.Go(func() {
			for pair := range pairs {
				if w.t.Failed() {
					continue
				}
				source, destination := snap.Identity(pair[0]), pair[1]
				ours := snap.Policy.Decide(source, destination)
				checked, authorized, err := w.oracle(ctx, source, destination)
				if err != nil || checked != ours.Allowed && !renamed[destination] || authorized != ours.Allowed {
					w.t.Errorf("%s => %s: check says %v, authorize %v, the policy %v by %v; %v\nintentions of %s: %v\nof *: %v", pair[0], destination,
						checked, authorized, ours.Allowed, ours.Intention, err, destination, w.written(destination), w.written("*"))
				}
			}
		})
	}
	for range differentialPairs {
		pairs <- [2]string{sources[random.IntN(len(sources))], differential[random.IntN(len(differential))]}
	}
	close(pairs)
	asking.Wait()
}

// oracle is what Consul's two endpoints say of a pair.
func (w *world) oracle(ctx context.Context, source policy.Identity, destination string) (checked, authorized bool, err error) {
	var check struct{ Allowed bool }
	query := url.Values{"source": {source.Service}, "destination": {destination}}
	if err := w.agent.Do(ctx, http.MethodGet, "/v1/connect/intentions/check?"+query.Encode(), nil, &check); err != nil {
		return false, false, err
	}
	var authorize struct{ Authorized bool }
	body := map[string]string{"Target": destination, "ClientCertURI": source.String(), "ClientCertSerial": "01"}
	err = w.agent.Do(ctx, http.MethodPost, "/v1/agent/connect/authorize", body, &authorize)
	return check.Allowed, authorize.Authorized, err
}

// What docs/consul.md lists as stricter than Consul's oracles, each with what they say.
func TestWhereVerdictsAreStricterThanConsuls(t *testing.T) {
	w := newWorld(t, lab.Config{})
	for i, name := range []string{"tcp", "http", "permissions"} {
		w.must(w.agent.Register(w.ctx(), lab.Service(name, name+"-1", fmt.Sprintf("10.1.2.%d", i+1), 8080)))
	}
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-defaults", "Name": "http", "Protocol": "http"}))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-defaults", "Name": "permissions", "Protocol": "http"}))
	w.must(w.agent.Write(w.ctx(), map[string]any{
		"Kind": "jwt-provider", "Name": "idp", "Issuer": "test", "JSONWebKeySet": map[string]any{"Local": map[string]any{"JWKS": "eyJrZXlzIjpbXX0="}},
	}))
	jwt := map[string]any{"Providers": []map[string]any{{"Name": "idp"}}}
	for name, source := range map[string]map[string]any{
		"tcp":         {"Name": "web", "Action": "allow"},
		"http":        {"Name": "web", "Action": "allow"},
		"permissions": {"Name": "web", "Permissions": []map[string]any{{"Action": "allow", "HTTP": map[string]any{"PathPrefix": "/"}}}},
	} {
		entry := map[string]any{"Kind": "service-intentions", "Name": name, "Sources": []map[string]any{source}}
		if name == "http" {
			entry["JWT"] = jwt
		}
		w.must(w.agent.Write(w.ctx(), entry))
	}
	w.run("tcp", "http", "permissions")
	snap := w.await("the intentions are in force", func(s *catalog.Snapshot) error {
		if n := s.Policy.Len(); n != 3 || s.Services["http"] == nil || s.Services["http"].Protocol != "http" {
			return fmt.Errorf("there are %d: %s", n, slices.Sorted(maps.Keys(s.Services)))
		}
		return nil
	})
	web := snap.Identity("web")
	foreign := web
	foreign.TrustDomain = "11111111-2222-3333-4444-555555555555.consul"
	for _, c := range []struct {
		what                string
		source              policy.Identity
		destination         string
		ours, check, author bool
	}{
		{"an ordinary intention", web, "tcp", true, true, true},
		{"a JWT for HTTP", web, "http", false, true, true},
		{"permissions", web, "permissions", false, false, false},
		{"another trust domain", foreign, "tcp", false, true, true},
	} {
		check, author, err := w.oracle(w.ctx(), c.source, c.destination)
		w.must(err)
		if ours := snap.Policy.Decide(c.source, c.destination); ours.Allowed != c.ours || check != c.check || author != c.author {
			t.Errorf("%s: the policy says %v (%s), check %v, authorize %v; want %v, %v, %v", c.what, ours.Allowed, ours.Why, check, author, c.ours, c.check, c.author)
		}
	}
}

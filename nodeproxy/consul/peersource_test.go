package consul_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	lab "nodeproxy.io/tests/consul"
)

// TestAPeerThatClaimsAnothersTrustDomainIsRefusedAlone has the agent's answers say who is peered: first one, then another with the
// same trust domain, to a daemon that knows the first, to one that an earlier one told, and to one that knows nothing.
func TestAPeerThatClaimsAnothersTrustDomainIsRefusedAlone(t *testing.T) {
	w := newWorld(t, lab.Config{})
	peering := func(name string) *api.Peering {
		root, _ := mtlstest.NewRoot(t, func(c *x509.Certificate) { c.URIs = []*url.URL{mtlstest.URI(t, "spiffe://east.consul")} }).PEM(t)
		return &api.Peering{Name: name, State: api.PeeringStateActive, PeerCAPems: []string{root}}
	}
	east, evil := peering("east"), peering("a-liar") // who comes first by name
	var peered atomic.Pointer[[]*api.Peering]
	peered.Store(&[]*api.Peering{east})
	w.front.Change = func(req *http.Request, resp *http.Response) {
		if req.URL.Path != "/v1/peerings" {
			return
		}
		text, err := json.Marshal(peered.Load())
		if err != nil {
			t.Error(err)
		}
		resp.Body = io.NopCloser(bytes.NewReader(text))
		resp.Header.Set("Content-Length", strconv.Itoa(len(text)))
	}
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Write(w.ctx(), map[string]any{"Kind": "service-intentions", "Name": "api", "Sources": []map[string]any{{"Name": "web", "Peer": "east", "Action": "allow"}}}))
	trusts := func(refused string, names ...string) func(*catalog.Snapshot) error {
		return func(s *catalog.Snapshot) error {
			var got []string
			for _, p := range s.Peers {
				got = append(got, p.Name)
			}
			if fmt.Sprint(got) != fmt.Sprint(names) {
				return fmt.Errorf("trusted are %v, and %v should be: %+v", got, names, s.Problems)
			}
			for _, p := range s.Problems {
				if refused != "" && strings.Contains(p.Text, `peer "`+refused+`" has the trust domain "east.consul"`) {
					return nil
				}
			}
			if refused != "" {
				return errors.New(refused + " is not named")
			}
			return nil
		}
	}
	w.run("api")
	w.await("the first is trusted", trusts("", "east"))
	peered.Store(&[]*api.Peering{evil, east})
	told := w.await("the first alone is trusted", trusts("a-liar", "east"))
	w.stop()

	w.last = nil
	w.start(func(s *consul.Source) { w.must(s.Restore(told, time.Now())) }, "api")
	w.await("after a restart the first alone is trusted", trusts("a-liar", "east"))
	w.stop()

	w.last = nil
	w.run("api")
	w.await("to one that knows nothing none is trusted", trusts("a-liar"))
}

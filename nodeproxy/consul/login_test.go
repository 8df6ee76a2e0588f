package consul_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	lab "nodeproxy.io/tests/consul"
)

// TestALoginIsRenewedBeforeItEnds has the servers' answers say that tokens end after seconds.
func TestALoginIsRenewedBeforeItEnds(t *testing.T) {
	w := newWorld(t, lab.Config{HCL: lab.WithACLs, Token: lab.Management})
	issuer, err := lab.NewIssuer()
	w.must(err)
	w.must(w.agent.AuthMethod(w.ctx(), "nodes", issuer))
	w.must(w.agent.Do(w.ctx(), http.MethodPut, "/v1/acl/policy", map[string]any{
		"Name": "node-1", "Rules": "agent_prefix \"\" { policy = \"read\" }\nnode_prefix \"\" { policy = \"read\" }\nservice_prefix \"\" { policy = \"write\" }",
	}, nil))
	w.must(w.agent.Register(w.ctx(), lab.Service("web", "web-1", "10.1.2.3", 8080)))
	bearer, err := issuer.Bearer("node-1")
	w.must(err)
	w.config.AuthMethod, w.config.BearerTokenFile = "nodes", filepath.Join(t.TempDir(), "bearer")
	w.must(os.WriteFile(w.config.BearerTokenFile, []byte(bearer), 0o600))
	w.front.Change = func(req *http.Request, resp *http.Response) {
		if req.URL.Path != "/v1/acl/login" {
			return
		}
		var token map[string]any
		text, err := io.ReadAll(resp.Body)
		if err == nil {
			err = json.Unmarshal(text, &token)
		}
		if err != nil {
			t.Errorf("login is answered with %d %s: %v", resp.StatusCode, text, err)
			return
		}
		token["ExpirationTime"] = time.Now().Add(2 * time.Second)
		text, _ = json.Marshal(token)
		resp.Body = io.NopCloser(bytes.NewReader(text))
		resp.Header.Set("Content-Length", strconv.Itoa(len(text)))
	}
	logins := func(path string) int {
		w.front.Lock()
		defer w.front.Unlock()
		return w.front.Requests[path]
	}
	w.run("web")
	w.await("web has a certificate", func(s *catalog.Snapshot) error {
		if s.Leaves["web"] == nil {
			return fmt.Errorf("it has none")
		}
		return nil
	})
	ctx := w.ctx()
	for n := 1; logins("/v1/acl/login") < 3; n++ { // questions go on
		w.must(ctx.Err())
		w.must(w.agent.Intentions(w.ctx(), "web", map[string]string{"api": []string{"allow", "deny"}[n%2]}))
		w.await("the intention is known", func(s *catalog.Snapshot) error {
			if got := s.Policy.Decide(s.Identity("api"), "web").Allowed; got != (n%2 == 0) {
				return fmt.Errorf("allowed: %v", got)
			}
			return nil
		})
	}
	if h := w.source.Health(); h.Err != nil {
		t.Errorf("health: %v", h.Err)
	}
	w.stop()
	if logins("/v1/acl/logout") != 1 {
		t.Errorf("there were %d logouts", logins("/v1/acl/logout"))
	}
}

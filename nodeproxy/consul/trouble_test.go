package consul_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/policy"
	lab "nodeproxy.io/tests/consul"
)

func TestStormsOfErrorsChangeNothingAndAreMetWithPatience(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusForbidden} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			w := newWorld(t, lab.Config{})
			w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
			w.run("api")
			ready := func(s *catalog.Snapshot) error {
				if s.Services["api"] == nil || s.Leaves["api"] == nil {
					return errors.New("api is not ready")
				}
				return nil
			}
			w.await("api is ready", ready)
			w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })

			w.front.Fail(status, func(*http.Request) bool { return true })
			w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"})) // wakes a query
			h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
			if !strings.Contains(h.Err.Error(), http.StatusText(status)) || time.Since(h.Updated) > patience {
				t.Errorf("health: %+v", h)
			}
			asked := w.front.Total()
			time.Sleep(3 * time.Second) // the rate is what is asserted
			if n := w.front.Total() - asked; n > 60 {
				t.Errorf("%d requests in three seconds", n)
			}
			if err := ready(w.current()); err != nil {
				t.Error(err)
			}
			w.front.Fail(0, nil)
			w.await("the intention is in force", denied("web", "api"))
			w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
		})
	}
}

func TestOneForbiddenAnswerIsNoError(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	var once sync.Map
	w.front.Fail(http.StatusForbidden, func(req *http.Request) bool {
		_, again := once.LoadOrStore(req.URL.Path, true)
		return !again
	})
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return w.source.Health().Err
	})
}

func TestADeadAgentsLastWordStaysInForce(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.run("api")
	w.await("the intention is in force", denied("web", "api"))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil && !h.Updated.IsZero() })
	before := w.current()
	killed := time.Now()
	w.agent.Process.Kill()
	h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
	if h.Updated.After(killed.Add(time.Second)) || killed.Sub(h.Updated) > 15*time.Second {
		t.Errorf("the agent was killed at %s; health says %+v", killed, h)
	}
	if now := w.current(); now != before {
		t.Errorf("a snapshot without anything new: %+v", now)
	}

	w.must(w.agent.Restart(w.ctx())) // with another CA, and nothing registered
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.await("the new agent's word is in force", func(s *catalog.Snapshot) error {
		if s.TrustDomain == before.TrustDomain || s.Services["api"] == nil || s.Leaves["api"] == nil {
			return fmt.Errorf("trust domain %s, before %s; %d services; leaves %v", s.TrustDomain, before.TrustDomain, len(s.Services), s.Leaves)
		}
		if s.Leaves["api"].Leaf.URIs[0].String() != s.Identity("api").String() {
			return errors.New("the leaf is of the other mesh")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

func TestAnIndexThatGoesBackStartsOver(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	const path = "/v1/connect/intentions/match"
	var asked []string // the indexes, in order
	w.front.Change = func(req *http.Request, answer *http.Response) {
		if req.URL.Path == path && !req.URL.Query().Has("index") {
			answer.Header.Set("X-Consul-Index", "1000000") // as of a server that has since been replaced
		}
	}
	w.front.Spoil = func(_ http.ResponseWriter, req *http.Request) bool {
		q := req.URL.Query()
		if req.URL.Path != path {
			return false
		}
		w.front.Lock()
		defer w.front.Unlock()
		asked = append(asked, q.Get("index"))
		if q.Get("index") == "1000000" { // it would be answered after the whole wait, there being no such index
			q.Set("wait", "100ms")
			req.URL.RawQuery = q.Encode()
		}
		return false
	}
	w.run("api")
	w.await("there is one", func(*catalog.Snapshot) error { return nil })
	w.front.Lock()
	w.front.Change = nil
	w.front.Unlock()
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("the intention is in force", denied("web", "api"))
	w.must(w.agent.Remove(w.ctx(), "service-intentions", "api"))
	w.await("it is gone", func(s *catalog.Snapshot) error {
		if v := s.Policy.Decide(s.Identity("web"), "api"); !v.Allowed {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("it is back", denied("web", "api"))
	if err := w.source.Health().Err; err != nil {
		t.Error(err)
	}
	w.front.Lock()
	defer w.front.Unlock()
	for i := 1; i < len(asked); i++ {
		if asked[i-1] == "1000000" && asked[i] != "" {
			t.Errorf("after an index that went back %q was asked, want none: %q", asked[i], asked)
		}
	}
	if last := asked[len(asked)-1]; len(asked) < 4 || last == "" || last == "1000000" {
		t.Errorf("asked %q: want an index of the agent's own in the end", asked)
	}
}

func TestATokenFileIsReadAgainAndAServiceHasItsOwn(t *testing.T) {
	w := newWorld(t, lab.Config{HCL: lab.WithACLs, Token: lab.Management})
	w.must(w.agent.Register(w.ctx(), map[string]any{"Name": "api", "ID": "api-1", "Port": 8080}))
	reading := `agent_prefix "" { policy = "read" } node_prefix "" { policy = "read" } service_prefix "" { policy = "read" }`
	dir := t.TempDir()
	w.config.TokenFile, w.config.TokenDir = filepath.Join(dir, "token"), filepath.Join(dir, "tokens.d")
	w.must(os.Mkdir(w.config.TokenDir, 0o700))
	w.must(os.WriteFile(w.config.TokenFile, []byte("00000000-dead-dead-dead-000000000000\n"), 0o600))
	w.run("api")
	h := w.awaitHealth("that the token is wrong", func(h catalog.Health) bool { return h.Err != nil && strings.Contains(h.Err.Error(), "403") })
	if !strings.Contains(h.Err.Error(), "docs/consul.md") {
		t.Errorf("the error does not say what to do: %v", h.Err)
	}
	token, err := w.agent.NewToken(w.ctx(), "reading", reading)
	w.must(err)
	w.must(os.WriteFile(w.config.TokenFile, []byte(token+"\n"), 0o600))
	snap := w.await("api is known", func(s *catalog.Snapshot) error {
		if s.Services["api"] == nil {
			return errors.New("it is not")
		}
		return nil
	})
	if snap.Policy.Default() != policy.Deny {
		t.Error("the default of the ACLs is deny, the policy's is not")
	}
	w.awaitHealth("that there may be no leaf", func(h catalog.Health) bool {
		return h.Err != nil && strings.Contains(h.Err.Error(), "certificate for api")
	})
	token, err = w.agent.NewToken(w.ctx(), "api", `service "api" { policy = "write" }`)
	w.must(err)
	w.must(os.WriteFile(filepath.Join(w.config.TokenDir, "api"), []byte(token), 0o600))
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

func TestAHungAgentIsNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
	stopped := time.Now()
	w.must(w.agent.Process.Signal(syscall.SIGSTOP))
	h := w.awaitHealth("the error", func(h catalog.Health) bool { return h.Err != nil })
	if h.Updated.After(stopped.Add(time.Second)) || !strings.Contains(h.Err.Error(), "no answer within") {
		t.Errorf("stopped at %s; health says %+v", stopped, h)
	}
	if s := w.current(); s.Leaves["api"] == nil || s.Services["api"] == nil {
		t.Errorf("something is gone: %+v", s)
	}
	w.must(w.agent.Process.Signal(syscall.SIGCONT))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil && h.Updated.After(stopped) })
}

// writePEM writes blocks into a file, by rename.
func writePEM(t *testing.T, path, kind string, der ...[]byte) {
	t.Helper()
	var text []byte
	for _, d := range der {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
	}
	if err := errors.Join(os.WriteFile(path+".new", text, 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// authority is a CA that signs one certificate for 127.0.0.1, good for either side.
type authority struct {
	root, leaf []byte
	key        []byte
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	var a authority
	var errs [3]error
	a.root, errs[0] = x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	a.leaf, errs[1] = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	a.key, errs[2] = x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a authority) write(t *testing.T, cfg *consul.Config) {
	t.Helper()
	writePEM(t, cfg.CertFile, "CERTIFICATE", a.leaf)
	writePEM(t, cfg.KeyFile, "PRIVATE KEY", a.key)
	writePEM(t, cfg.CAFile, "CERTIFICATE", a.root)
}

func (a authority) config() *tls.Config {
	root, _ := x509.ParseCertificate(a.root)
	key, _ := x509.ParsePKCS8PrivateKey(a.key)
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{a.leaf}, PrivateKey: key}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
}

func TestHTTPSWithClientCertificatesThatAreReplaced(t *testing.T) {
	w := newWorld(t, lab.Config{})
	w.must(w.agent.Register(w.ctx(), lab.Service("api", "api-1", "10.1.2.3", 8080)))
	var current atomic.Pointer[tls.Config]
	first, second := newAuthority(t), newAuthority(t)
	current.Store(first.config())
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return current.Load(), nil }})
	w.must(err)
	server := &http.Server{Handler: w.front, ConnState: w.front.ConnState, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	t.Cleanup(func() { server.Close(); <-done })
	dir := t.TempDir()
	w.config.Address = "https://" + ln.Addr().String()
	w.config.CAFile, w.config.CertFile, w.config.KeyFile = filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	first.write(t, &w.config)
	w.run("api")
	w.await("api has a leaf", func(s *catalog.Snapshot) error {
		if s.Leaves["api"] == nil {
			return errors.New("none")
		}
		return nil
	})
	current.Store(second.config())
	w.front.Drop()
	w.awaitHealth("that the certificates do not fit", func(h catalog.Health) bool { return h.Err != nil })
	second.write(t, &w.config)
	w.must(w.agent.Intentions(w.ctx(), "api", map[string]string{"web": "deny"}))
	w.await("the intention is in force", denied("web", "api"))
	w.awaitHealth("no error", func(h catalog.Health) bool { return h.Err == nil })
}

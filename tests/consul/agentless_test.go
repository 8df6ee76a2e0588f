package consul

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// agentless is a mesh whose second node has no agent: its daemon asks the server on the first, as whom an auth method says.
type agentless struct {
	*mesh
	issuer      *Issuer
	services    string          // the directory of the node's definitions
	application *netlab.Process // of api
}

const (
	firstNode  = "192.0.2.1" // its address
	authMethod = "nodes"
	ourNode    = "node-2-nodeproxy"
)

func newAgentless(t *testing.T, more Config, source string) *agentless {
	m := &agentless{mesh: newMeshOf(t, 1, more)}
	var err error
	m.issuer, err = NewIssuer()
	m.must(err)
	m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/acl/policy", map[string]any{"Name": "node-2", "Rules": documentedRules(t, "## Without an agent", "node-2", "api")}, nil))
	m.must(m.agents[0].AuthMethod(m.ctx(), authMethod, m.issuer))

	m.services = filepath.Join(m.Nodes[1].Dir, "services.d")
	m.must(os.Mkdir(m.services, 0o700))
	m.bearer("node-2")
	m.Daemons[1].Source = fmt.Sprintf(`source "consul" {
  mode              = "servers"
  services_dir      = %q
  auth_method       = %q
  bearer_token_file = %q
  %s
}
`, m.services, authMethod, m.tokenFile(1), source)
	return m
}

// within is m for a subtest.
func (m *agentless) within(t *testing.T) *agentless {
	sub := *m
	sub.mesh = m.mesh.within(t)
	return &sub
}

// bearer writes the bearer token of a node.
func (m *agentless) bearer(node string) {
	m.t.Helper()
	text, err := m.issuer.Bearer(node)
	m.must(err)
	m.must(os.WriteFile(m.tokenFile(1), []byte(text), 0o600))
}

// define writes the definition of api.
func (m *agentless) define(w *netlab.Workload) {
	text := fmt.Sprintf("service {\n  name    = \"api\"\n  id      = \"api-1\"\n  address = %q\n  port    = %d\n  tags    = [\"v1\"]\n  check {\n    name     = \"port\"\n    tcp      = \"%s:%d\"\n    interval = \"200ms\"\n  }\n}\n", w.IPv4, port, w.IPv4, port)
	m.must(os.WriteFile(filepath.Join(m.services, ".api"), []byte(text), 0o600))
	m.must(os.Rename(filepath.Join(m.services, ".api"), filepath.Join(m.services, "api.hcl")))
}

func (m *agentless) listen(w *netlab.Workload) {
	var err error
	m.application, err = w.Start(netlab.Command{Path: programs.app, Args: []string{"serve", fmt.Sprintf(":%d", port)}})
	m.must(err)
	m.must(m.application.WaitOutput(m.ctx(), "ready"))
}

// inCatalog waits until the catalog has exactly these services on our node.
func (m *agentless) inCatalog(ids ...string) map[string]registration {
	m.t.Helper()
	var found map[string]registration
	slices.Sort(ids)
	m.must(m.agents[0].Await(m.ctx(), fmt.Sprintf("has %v on our node", ids), func() error {
		var list *struct{ Services []registration }
		if err := m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/catalog/node-services/"+ourNode, nil, &list); err != nil {
			return err
		}
		found = make(map[string]registration)
		if list != nil {
			for _, s := range list.Services {
				found[s.ID] = s
			}
		}
		if got := slices.Sorted(maps.Keys(found)); !slices.Equal(got, ids) {
			return fmt.Errorf("it has %v", got)
		}
		return nil
	}))
	return found
}

// statusesAre waits until the checks of our node have these statuses.
func (m *agentless) statusesAre(want map[string]string) {
	m.t.Helper()
	m.must(m.agents[0].Await(m.ctx(), fmt.Sprintf("has checks %v", want), func() error {
		var list []struct{ CheckID, Status, Output string }
		if err := m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/health/node/"+ourNode, nil, &list); err != nil {
			return err
		}
		got := make(map[string]string)
		for _, c := range list {
			got[c.CheckID] = c.Status
		}
		if !maps.Equal(got, want) {
			return fmt.Errorf("it has %v", list)
		}
		return nil
	}))
}

// logins are the accessors of the tokens that the auth method gave and that are still there.
func (m *agentless) logins() []string {
	m.t.Helper()
	var list []struct{ AccessorID string }
	m.must(m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/acl/tokens?authmethod="+authMethod, nil, &list))
	var all []string
	for _, token := range list {
		all = append(all, token.AccessorID)
	}
	return all
}

func TestANodeWithoutAnAgent(t *testing.T) {
	m := newAgentless(t, Config{Open: true}, fmt.Sprintf(`addresses = ["%[1]s:8499", "http://%[1]s:8500"]`, firstNode))
	web := m.place(0, "web")
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	m.define(api)
	m.listen(api)
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "web", map[string]string{"api": "allow"}))
	foreign := map[string]any{"Node": ourNode, "SkipNodeUpdate": true, "Service": map[string]any{"ID": "theirs", "Service": "theirs", "Port": 1}}

	token, err := m.agents[0].NewToken(m.ctx(), "node-1", rules(t, "node-1", "web"))
	m.must(err)
	m.must(os.WriteFile(m.tokenFile(0), []byte(token), 0o600))
	m.Daemons[0].Source = fmt.Sprintf("source \"consul\" {\n  token_file = %q\n}\n", m.tokenFile(0))
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
	}
	for _, d := range m.Daemons {
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	all := []string{"node-proxy", "api-1", "api-1-sidecar-proxy"}
	passing := map[string]string{"nodeproxy": "passing", "api-1:0": "passing", "api-1-sidecar-proxy-app": "passing"}
	critical := map[string]string{"nodeproxy": "passing", "api-1:0": "critical", "api-1-sidecar-proxy-app": "critical"}

	_ = t.Run("registers its services and calls and is called", func(t *testing.T) {
		m := m.within(t)
		for id, s := range m.inCatalog(all...) {
			if s.Meta["managed-by"] != "nodeproxy" {
				t.Errorf("%s: %+v", id, s)
			}
		}
		m.statusesAre(passing)
		m.eventually("web reaches api", web, m.vip(0, "api"), reached)
		m.eventually("api reaches web", api, m.vip(1, "web"), reached)
		m.eventually("web reaches api by its own address, which is redirected", web, netip.AddrPortFrom(api.IPv4, port).String(), reached)
		status, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
			if s.Source.Error != "" {
				return fmt.Errorf("the documented rules are not enough: %s", s.Source.Error)
			}
			return nil
		})
		m.must(err)
		for _, p := range status.Problems {
			t.Logf("problem: %+v", p)
		}
		if n := m.logins(); len(n) != 1 {
			t.Errorf("there are %d logins", len(n))
		}
	}) && t.Run("keeps the health of its services", func(t *testing.T) {
		m := m.within(t)
		m.application.Kill()
		<-m.application.Done()
		m.statusesAre(critical)
		m.listen(api)
		m.statusesAre(passing)
		m.must(m.Daemons[0].AwaitInstances(m.ctx(), "api", 1))
	}) && t.Run("logs in again when its token is revoked, and ends what is denied then", func(t *testing.T) {
		m := m.within(t)
		before := m.logins()
		stream, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"dial", m.vip(0, "api"), "stream"}})
		m.must(err)
		m.must(stream.WaitOutput(m.ctx(), "a line"))
		m.must(m.agents[0].Do(m.ctx(), http.MethodDelete, "/v1/acl/token/"+before[0], nil, nil))
		m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "deny"}))
		m.must(stream.Wait(m.ctx()))
		if out := stream.Output(); !strings.Contains(out, "end: reset") {
			t.Errorf("the connection is not reset: %.300s", out)
		}
		m.await("the daemon logs in again", func() error {
			if after := m.logins(); len(after) != 1 || after[0] == before[0] {
				return fmt.Errorf("logins before %v, after %v", before, after)
			}
			status, err := m.Daemons[1].Admin().Status(m.ctx())
			if err == nil && status.Source.Error != "" {
				err = fmt.Errorf("its source has %s", status.Source.Error)
			}
			return err
		})
		if out := m.dial(web, m.vip(0, "api"), "peer"); reached(out) {
			t.Errorf("web still reaches api: %s", out)
		}
		m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
		m.eventually("web reaches api again", web, m.vip(0, "api"), reached)
	}) && t.Run("touches nothing of others, and removes its own", func(t *testing.T) {
		m := m.within(t)
		m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/catalog/register", foreign, nil))
		m.must(os.Remove(filepath.Join(m.services, "api.hcl")))
		m.inCatalog("node-proxy", "theirs")
		m.define(api)
		m.inCatalog(append(all, "theirs")...)
		m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/catalog/deregister", map[string]any{"Node": ourNode, "ServiceID": "api-1"}, nil))
		m.inCatalog(append(all, "theirs")...) // what others remove comes back
		m.statusesAre(passing)
	}) && t.Run("stays passing when it hands over", func(t *testing.T) {
		m := m.within(t)
		before, err := m.Daemons[1].Replace(m.ctx(), nil)
		m.must(err)
		m.must(before.Wait(m.ctx()))
		m.statusesAre(passing)
		if n := m.logins(); len(n) != 1 {
			t.Errorf("%d logins are there, and one daemon", len(n))
		}
		m.eventually("web reaches api", web, m.vip(0, "api"), reached)
	}) && t.Run("is critical and logged out when it stops, and goes on where it was", func(t *testing.T) {
		m := m.within(t)
		port := m.inCatalog(append(all, "theirs")...)["api-1-sidecar-proxy"].Port
		m.must(m.Daemons[1].Stop(m.ctx()))
		stopped := maps.Clone(passing)
		stopped["nodeproxy"] = "critical"
		m.statusesAre(stopped)
		if n := m.logins(); len(n) != 0 {
			t.Errorf("%d logins are left", len(n))
		}
		m.must(m.Daemons[1].Start(m.ctx()))
		m.statusesAre(passing)
		if again := m.inCatalog(append(all, "theirs")...)["api-1-sidecar-proxy"].Port; again != port {
			t.Errorf("its port was %d and is %d", port, again)
		}
		m.eventually("web reaches api", web, m.vip(0, "api"), reached)
	}) && t.Run("check says what is there and what is missing", func(t *testing.T) {
		m := m.within(t)
		lines := m.checks(1)
		m.says(lines, "consul servers", "ok: Consul 1.")
		m.says(lines, "consul certificates", "ok: signed by the server at "+m.Nodes[0].IPv4.String()+":8502")
		m.says(lines, "consul token", "ok: ", `node "node-2-nodeproxy"`)
		m.says(lines, "consul token for api", "ok: ")
		m.says(lines, "source", "ok: ")
		m.bearer("a-stranger")
		m.says(m.checks(1), "consul token", "failed: ", authMethod, "bearer_token_file", "docs/consul.md")
		m.bearer("node-2")
	}) && t.Run("cleanup leaves what is not ours", func(t *testing.T) {
		m := m.within(t)
		m.must(m.Daemons[1].Stop(m.ctx()))
		for _, left := range [][]string{{"theirs"}, nil} {
			out, err := m.cli(1, "cleanup", "--node", "node-2", "--pins", m.Daemons[1].Pins, "--config", m.Daemons[1].ConfigPath())
			if err != nil {
				t.Fatalf("cleanup: %v: %s", err, out)
			}
			m.inCatalog(left...)
			m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/catalog/deregister", map[string]any{"Node": ourNode, "ServiceID": "theirs"}, nil))
		}
		var nodes []struct{ Node string }
		m.must(m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/catalog/nodes", nil, &nodes))
		if len(nodes) != 1 || len(m.logins()) != 0 {
			t.Errorf("left are nodes %v and logins %v", nodes, m.logins())
		}
	})
}

func TestAgentAndServersAreAskedByTLSWithACertificate(t *testing.T) {
	server, client := certificates(t, firstNode)
	files := fmt.Sprintf("ca_file = %q\n  cert_file = %q\n  key_file = %q\n", client.Root, client.Certificate, client.Key)
	m := newAgentless(t, Config{TLS: server}, fmt.Sprintf("addresses = [%q]\n  ", "https://"+firstNode+":8501")+files)
	web := m.place(0, "web")
	token, err := m.agents[0].NewToken(m.ctx(), "node-1", rules(t, "node-1", "web"))
	m.must(err)
	m.must(os.WriteFile(m.tokenFile(0), []byte(token), 0o600))
	m.Daemons[0].Source = fmt.Sprintf("source \"consul\" {\n  address = %q\n  token_file = %q\n  %s}\n", "https://"+firstNode+":8501", m.tokenFile(0), files)
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	m.define(api)
	m.listen(api)
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	m.inCatalog("node-proxy", "api-1", "api-1-sidecar-proxy")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.eventually("web reaches api", web, m.vip(0, "api"), reached)

	m.must(m.Daemons[1].Stop(m.ctx()))
	m.Daemons[1].Source = strings.ReplaceAll(m.Daemons[1].Source, client.Root, m.tokenFile(1)) // whoever else answers there is nobody
	if err := m.Daemons[1].Start(m.ctx()); err == nil {
		t.Error("a server of no known root is believed")
	} else if !strings.Contains(err.Error(), "ca_file") {
		t.Error(err)
	}
}

// certificates makes a root, and a certificate each of a server at an address and of a client.
func certificates(t *testing.T, address string) (server, client *TLS) {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "servers"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	must(err)
	rootPath := write("root.pem", "CERTIFICATE", der)
	issue := func(name string, usage x509.ExtKeyUsage, ips ...net.IP) *TLS {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: root.NotBefore, NotAfter: root.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: ips, DNSNames: []string{name},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), rootKey)
		must(err)
		secret, err := x509.MarshalPKCS8PrivateKey(key)
		must(err)
		return &TLS{rootPath, write(name+".pem", "CERTIFICATE", der), write(name+"-key.pem", "PRIVATE KEY", secret)}
	}
	return issue("server.dc1.consul", x509.ExtKeyUsageServerAuth, net.ParseIP(address)), issue("node-2", x509.ExtKeyUsageClientAuth)
}

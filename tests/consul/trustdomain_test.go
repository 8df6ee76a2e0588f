package consul

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/tests/netlab"
)

const foreignDomain = "11111111-2222-3333-4444-555555555555.consul"

// useAuthority makes an authority of the test's Consul's CA, and waits until it is the active root.
func (m *mesh) useAuthority() *mtlstest.Authority {
	m.t.Helper()
	root := mtlstest.NewRoot(m.t)
	cert, key := root.PEM(m.t)
	m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/connect/ca/configuration", map[string]any{
		"Provider": "consul", "Config": map[string]any{"PrivateKey": key, "RootCert": cert, "LeafCertTTL": "72h"},
	}, nil))
	for _, agent := range m.agents {
		m.must(agent.Await(m.ctx(), "has the test's root", func() error {
			var roots struct {
				Roots []struct {
					RootCert string
					Active   bool
				}
			}
			if err := agent.Do(m.ctx(), http.MethodGet, "/v1/agent/connect/ca/roots", nil, &roots); err != nil {
				return err
			}
			for _, r := range roots.Roots {
				if r.Active && r.RootCert == cert {
					return nil
				}
			}
			return fmt.Errorf("it has %d others", len(roots.Roots))
		}))
	}
	return root
}

// trustDomain is the cluster's.
func (m *mesh) trustDomain() string {
	m.t.Helper()
	var roots struct{ TrustDomain string }
	m.must(m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/agent/connect/ca/roots", nil, &roots))
	return roots.TrustDomain
}

func identity(domain, service string) string {
	return fmt.Sprintf("spiffe://%s/ns/default/dc/dc1/svc/%s", domain, service)
}

// ask opens a TLS connection from the first node with a client certificate, and returns the first line of an answer.
func (m *mesh) ask(to string, cert *tls.Certificate) (string, error) {
	m.t.Helper()
	conn, err := m.Nodes[0].Namespace.Dial(m.ctx(), "tcp", to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	secure := tls.Client(conn, &tls.Config{Certificates: []tls.Certificate{*cert}, InsecureSkipVerify: true}) // it is the server that is tested
	if _, err := io.WriteString(secure, "peer\n"); err != nil {
		return "", err
	}
	return bufio.NewReader(secure).ReadString('\n')
}

// impersonate serves TLS in a workload's namespace with a certificate, and greets as the test application does.
func (m *mesh) impersonate(w *netlab.Workload, at netip.AddrPort, cert *tls.Certificate) net.Listener {
	m.t.Helper()
	ln, err := w.Namespace.Listen("tcp", at.String())
	m.must(err)
	m.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(patience))
				secure := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*cert}, ClientAuth: tls.RequireAnyClientCert})
				_, _ = fmt.Fprintln(secure, "accept=impostor")
				_ = secure.CloseWrite()
				_, _ = io.Copy(io.Discard, secure)
			}()
		}
	}()
	return ln
}

func TestACertificateOfAnotherTrustDomainIsRefusedBothWays(t *testing.T) {
	m := newMesh(t)
	root := m.useAuthority()
	web, api := m.place(0, "web"), m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	pod, err := m.Nodes[1].Workload("impostor")
	m.must(err)
	at := netip.AddrPortFrom(pod.IPv4, 9000)
	m.register(pod, map[string]any{
		"Name": "impostor", "ID": "impostor-1", "Address": at.Addr().String(), "Port": at.Port(), "Connect": map[string]any{"Native": true},
	})
	m.must(m.agents[0].Intentions(m.ctx(), "impostor", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"api"})
	own := m.trustDomain()
	mesh := netip.AddrPortFrom(api.IPv4, uint16(m.registrations(1)["api-1-sidecar-proxy"].Port)).String()

	m.await("what Consul's own key signed is let in", func() error {
		if line, err := m.ask(mesh, root.Leaf(t, identity(own, "web"))); err != nil || !reached(line) {
			return fmt.Errorf("%q, %w", line, err)
		}
		return nil
	})
	for what, cert := range map[string]*tls.Certificate{
		"another trust domain":            root.Leaf(t, identity(foreignDomain, "web")),
		"our domain, signed by a fraud's": mtlstest.NewRoot(t).Leaf(t, identity(own, "web")),
		"another service":                 root.Leaf(t, identity(own, "batch")),
	} {
		if line, err := m.ask(mesh, cert); err == nil {
			t.Errorf("a client with %s is answered %q", what, line)
		}
	}
	if !counts(m.metrics(1), "nodeproxy_denied_total", map[string]string{"destination_service": "api", "reason": "peer-identity"}) {
		t.Errorf("the client of another trust domain is not counted:\n%s", m.metrics(1))
	}

	vip := m.vip(0, "impostor")
	honest := m.impersonate(pod, at, root.Leaf(t, identity(own, "impostor")))
	m.eventually("a server with the right certificate is called", web, vip, reached)
	m.must(honest.Close())
	m.impersonate(pod, at, root.Leaf(t, identity(foreignDomain, "impostor")))
	m.await("a server of another trust domain is refused", func() error {
		if out := m.dial(web, vip, "peer"); reached(out) {
			m.t.Fatalf("web takes the impostor for the service: %s", out)
		}
		if !counts(m.metrics(0), "nodeproxy_denied_total", map[string]string{"destination_service": "impostor", "reason": "peer-identity"}) {
			return fmt.Errorf("it is not counted:\n%s", m.metrics(0))
		}
		return nil
	})
}

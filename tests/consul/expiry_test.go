package consul

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
)

// authority is a root that Consul signs with, and so can a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a test's root"}, SubjectKeyId: []byte{1, 2, 3, 4}, AuthorityKeyId: []byte{1, 2, 3, 4},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * 365 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, _ = x509.ParseCertificate(der)
	return a
}

func encodePEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func (a *authority) keyPEM(key *ecdsa.PrivateKey) string {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Error(err)
	}
	return encodePEM("EC PRIVATE KEY", der)
}

// reissue replaces the certificate of a service in the agent's answers by one that ends at a time.
func (a *authority) reissue(service string, notAfter time.Time) (change func(*http.Request, *http.Response)) {
	return func(req *http.Request, answer *http.Response) {
		if req.URL.Path != "/v1/agent/connect/ca/leaf/"+service || answer.StatusCode != http.StatusOK {
			return
		}
		var leaf map[string]any
		if err := json.NewDecoder(answer.Body).Decode(&leaf); err != nil {
			a.t.Error(err)
			return
		}
		id, err := url.Parse(leaf["ServiceURI"].(string))
		if err != nil {
			a.t.Error(err)
			return
		}
		key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
		if err != nil {
			a.t.Error(err)
			return
		}
		leaf["CertPEM"], leaf["PrivateKeyPEM"] = encodePEM("CERTIFICATE", der), a.keyPEM(key)
		text, _ := json.Marshal(leaf)
		answer.Body = io.NopCloser(bytes.NewReader(text))
		answer.Header.Set("Content-Length", strconv.Itoa(len(text)))
	}
}

// TestAnExpiredCertificateStopsThatServiceOnly: web's certificate ends while it cannot be renewed, batch's does not. So it is
// after a restart without Consul.
func TestAnExpiredCertificateStopsThatServiceOnly(t *testing.T) {
	m := newMeshWith(t, Config{Persist: true})
	m.fronts[0] = NewFront(t, m.agents[0].Socket())
	root := newAuthority(t)
	m.configureCA("consul", map[string]any{
		"LeafCertTTL": "72h", "PrivateKey": root.keyPEM(root.key), "RootCert": encodePEM("CERTIFICATE", root.cert.Raw),
	})
	m.must(m.until("Consul signs with the test's root", func() error {
		if !m.activeRoot().Equal(root.cert) {
			return fmt.Errorf("it signs with %s", m.activeRoot().Subject)
		}
		return nil
	}))
	ends := time.Now().Add(45 * time.Second)
	m.fronts[0].Change = root.reissue("web", ends)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "api")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow", "batch": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api"})
	vip := m.vip(0, "api")
	m.eventually("web reaches api", web, vip, reached)
	m.eventually("batch reaches api", batch, vip, reached)
	m.fronts[0].Fail(http.StatusInternalServerError, func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/leaf/web") })
	m.load(20, call{web, vip})() // it is not dropped because its renewal fails

	stopped := func() {
		t.Helper()
		m.eventually("web is refused", web, vip, func(out string) bool { return !reached(out) })
		m.load(50, call{batch, vip})()
		status, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
			if !strings.Contains(s.Source.Error, "web") || !strings.Contains(s.Source.Error, "has expired") {
				return fmt.Errorf("the source says %q", s.Source.Error)
			}
			return nil
		})
		m.must(err)
		for _, cert := range status.Certificates {
			if expired := cert.Error != ""; expired != (cert.Service == "web") {
				t.Errorf("certificate of %s: %+v", cert.Service, cert)
			}
		}
		if n := strings.Count(m.Daemons[0].Process.Output(), "a certificate has expired"); n != 1 {
			t.Errorf("%d alarms, want one:\n%s", n, m.Daemons[0].Process.Output())
		}
		if text := m.metrics(0); !strings.Contains(text, `nodeproxy_certificate_expiry_seconds{source_service="web"} -`) {
			t.Errorf("the metric does not say so:\n%s", text)
		}
	}
	stopped()

	m.awaitKept(0)
	for _, agent := range m.agents {
		agent.Process.Kill()
	}
	m.Daemons[0].Process.Kill()
	m.must(m.Daemons[0].Start(m.ctx()))
	_, err := m.Daemons[0].AwaitProtected(m.ctx())
	m.must(err)
	stopped()
}

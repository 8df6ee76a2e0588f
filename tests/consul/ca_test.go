package consul

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

// caRoots are the roots as an agent lists them.
type caRoots struct {
	ActiveRootID string
	Roots        []struct{ ID, RootCert string }
}

// activeRoot is the certificate that signs now.
func (m *mesh) activeRoot() *x509.Certificate {
	m.t.Helper()
	var list caRoots
	m.must(m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/agent/connect/ca/roots", nil, &list))
	for _, root := range list.Roots {
		if root.ID == list.ActiveRootID {
			return certificate(m.t, root.RootCert)
		}
	}
	m.t.Fatal("there is no active root")
	return nil
}

func certificate(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("%q is no PEM", text)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// leaf is a certificate of a service as an agent issues it.
func (m *mesh) leaf(node int, service string) *tls.Certificate {
	m.t.Helper()
	var issued struct{ CertPEM, PrivateKeyPEM string }
	m.must(m.agents[node].Do(m.ctx(), http.MethodGet, "/v1/agent/connect/ca/leaf/"+service, nil, &issued))
	cert, err := tls.X509KeyPair([]byte(issued.CertPEM), []byte(issued.PrivateKeyPEM))
	m.must(err)
	return &cert
}

// meshAddress is where a service of one instance speaks mTLS.
func (m *mesh) meshAddress(service string) string {
	m.t.Helper()
	status, err := m.Daemons[0].Admin().Status(m.ctx())
	m.must(err)
	for _, svc := range status.Services {
		if svc.Name == service && len(svc.Instances) == 1 {
			return svc.Instances[0].Mesh
		}
	}
	m.t.Fatalf("%s has no single instance: %+v", service, status.Services)
	return ""
}

// present connects to a mesh address with a certificate, as an ordinary Connect client would. It returns what the server
// shows, and an error unless the application behind it answers.
func (m *mesh) present(cert *tls.Certificate, to string) ([]*x509.Certificate, error) {
	conn, err := m.Nodes[0].Namespace.Dial(m.ctx(), "tcp", to)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	secure := tls.Client(conn, &tls.Config{
		InsecureSkipVerify:   true, // what it shows is looked at by the caller
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	})
	if err := secure.Handshake(); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(secure, "peer\n"); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(secure)
	if err == nil && !reached(string(text)) {
		err = fmt.Errorf("it answers %q", text)
	}
	return secure.ConnectionState().PeerCertificates, err
}

// chains says whether the chain that a server shows leads to root alone.
func chains(shown []*x509.Certificate, root *x509.Certificate) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	opts.Roots.AddCert(root)
	for _, cert := range shown[1:] {
		opts.Intermediates.AddCert(cert)
	}
	_, err := shown[0].Verify(opts)
	return err
}

// awaitRoot waits until both services show certificates of root.
func (m *mesh) awaitRoot(root *x509.Certificate, client *tls.Certificate, services ...string) {
	m.t.Helper()
	for _, service := range services {
		to := m.meshAddress(service)
		m.must(m.until(service+" shows a certificate of the new root", func() error {
			shown, err := m.present(client, to)
			if len(shown) == 0 {
				return err
			}
			return chains(shown, root)
		}))
	}
}

// traffic makes connections again and again until the function returned is called: none may fail.
func (m *mesh) traffic(calls ...call) (stop func()) {
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan int)
	go func() {
		rounds := 0
		for ; ctx.Err() == nil; rounds++ {
			for i, wait := range m.rounds(25, calls) {
				if out, err := wait(); err != nil || out != "done 25 failed 0\n" {
					m.t.Errorf("from %s to %s: %s, %v", calls[i].from.Name, calls[i].to, out, err)
				}
			}
		}
		done <- rounds
	}()
	return func() {
		m.t.Helper()
		cancel()
		m.t.Logf("%d connections", <-done*25*len(calls))
	}
}

func (m *mesh) rounds(n int, calls []call) (waits []func() (string, error)) {
	for _, c := range calls {
		p, err := c.from.Start(netlab.Command{Path: programs.app, Args: []string{"load", "-n", strconv.Itoa(n), "-c", "1", c.to}})
		waits = append(waits, func() (string, error) {
			if err != nil {
				return "", err
			}
			err := p.Wait(context.WithoutCancel(m.t.Context()))
			return p.Output(), err
		})
	}
	return waits
}

func (m *mesh) configureCA(provider string, config map[string]any) {
	m.t.Helper()
	m.must(m.agents[0].Do(m.ctx(), http.MethodPut, "/v1/connect/ca/configuration", map[string]any{"Provider": provider, "Config": config}, nil))
}

// endOverlap lets the agents list nothing but the active root from now on, as they do by themselves some hours after a rotation.
func (m *mesh) endOverlap() {
	for _, f := range m.fronts {
		f.Lock()
		f.Change = func(req *http.Request, answer *http.Response) {
			if req.URL.Path != "/v1/agent/connect/ca/roots" || answer.StatusCode != http.StatusOK {
				return
			}
			var list map[string]any
			if err := json.NewDecoder(answer.Body).Decode(&list); err != nil {
				return
			}
			roots, _ := list["Roots"].([]any)
			list["Roots"] = slices.DeleteFunc(roots, func(root any) bool { return root.(map[string]any)["ID"] != list["ActiveRootID"] })
			text, _ := json.Marshal(list)
			answer.Body = io.NopCloser(bytes.NewReader(text))
			answer.Header.Set("Content-Length", strconv.Itoa(len(text)))
		}
		f.Unlock()
		f.Drop()
	}
}

// rotates changes the CA under traffic, and checks that nothing fails, that both nodes follow, and that the old root ends.
func (m *mesh) rotates(calls []call, changes ...func()) {
	m.t.Helper()
	api := m.meshAddress("api")
	for _, change := range changes {
		old, oldRoot := m.leaf(0, "web"), m.activeRoot()
		alive := m.streams(calls...)
		stop := m.traffic(calls...)
		change()
		m.must(m.until("there is another root", func() error {
			if m.activeRoot().Equal(oldRoot) {
				return errors.New("it is the old one")
			}
			return nil
		}))
		m.awaitRoot(m.activeRoot(), old, "web", "api")
		if _, err := m.present(old, api); err != nil {
			m.t.Errorf("in the overlap a certificate of the old root is refused: %v", err)
		}
		m.endOverlap()
		m.must(m.until("the old root is not trusted any more", func() error {
			if _, err := m.present(old, api); err == nil {
				return errors.New("a certificate of the old root is accepted")
			}
			return nil
		}))
		if _, err := m.present(m.leaf(0, "web"), api); err != nil {
			m.t.Errorf("a certificate of the new root is refused: %v", err)
		}
		stop()
		m.load(50, calls...)()
		alive()
		for _, f := range m.fronts {
			f.Lock()
			f.Change = nil
			f.Unlock()
			f.Drop()
		}
	}
	if text := m.metrics(1); !strings.Contains(text, `reason="peer-identity"`) {
		m.t.Errorf("the refusals are not counted:\n%s", text)
	}
}

func TestARotationOfTheBuiltInCAFailsNoConnection(t *testing.T) {
	m, _, calls := newFrontedMesh(t)
	keys := func(kind string, bits int) func() {
		return func() {
			m.configureCA("consul", map[string]any{"LeafCertTTL": "72h", "PrivateKeyType": kind, "PrivateKeyBits": bits})
		}
	}
	m.rotates(calls, keys("ec", 384), keys("rsa", 2048))
}

func TestASwitchOfTheCAToVaultFailsNoConnection(t *testing.T) {
	m, _, calls := newFrontedMesh(t)
	vault, err := Vault()
	m.must(err)
	server, err := m.Lab.Start(netlab.Command{
		Path: vault, Namespace: m.Nodes[0].Namespace, Env: []string{"HOME=" + m.Dir()},
		Args: []string{"server", "-dev", "-dev-no-store-token", "-dev-root-token-id=root", "-dev-listen-address=127.0.0.1:8200"},
	})
	m.must(err)
	m.must(server.WaitOutput(m.ctx(), "Development mode should NOT be used"))
	m.rotates(calls, func() {
		m.configureCA("vault", map[string]any{
			"Address": "http://127.0.0.1:8200", "Token": "root", "RootPKIPath": "connect-root", "IntermediatePKIPath": "connect-intermediate",
			"LeafCertTTL": "72h", "PrivateKeyType": "ec", "PrivateKeyBits": 256,
		})
	})
}

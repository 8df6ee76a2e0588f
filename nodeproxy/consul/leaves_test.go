package consul

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"
)

// signer is a root that signs leaves.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newSigner(t *testing.T) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := signer{key: key, cert: &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}}
	s.cert = s.sign(t, s.cert, s.cert)
	return s
}

func (s signer) sign(t *testing.T, template, parent *x509.Certificate) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, s.key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (s signer) leaf(t *testing.T, from, to time.Duration) *tls.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	if err != nil {
		t.Fatal(err)
	}
	cert := s.sign(t, &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(to)}, s.cert)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, Leaf: cert}
}

func TestACertificateOutlivesFailedRenewals(t *testing.T) {
	root := newSigner(t)
	l := newLeaves(nil, newWorld(slog.New(slog.DiscardHandler), "the agent"))
	l.roots = &roots{active: root.cert}
	l.need([]string{"web", "api"})
	good := root.leaf(t, -10*time.Minute, 10*time.Minute)
	l.settle(result{service: "web", cert: good})
	l.settle(result{service: "api", cert: root.leaf(t, -10*time.Minute, -time.Minute)})
	for range 10 {
		l.settle(result{service: "web", err: &statusError{http.StatusInternalServerError, "no leader"}})
		l.settle(result{service: "api", err: errors.New("connection refused")})
	}
	if got := l.certificates([]string{"api", "web"}); got["web"] != good || got["api"] == nil {
		t.Errorf("certificates: %v", got)
	}
	text := l.err().Error()
	for _, want := range []string{"certificate for web: 500: no leader", "certificate for api: connection refused; the last one has expired"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	l.need([]string{"web"})
	if got := l.certificates([]string{"api", "web"}); len(got) != 1 {
		t.Errorf("after api is not needed: %v", got)
	}
}

func TestACertificateIsAskedForAgainLateInItsLife(t *testing.T) {
	root := newSigner(t)
	l := newLeaves(nil, newWorld(slog.New(slog.DiscardHandler), "the agent"))
	l.roots = &roots{active: root.cert}
	var earliest, latest time.Duration
	for i := range 200 {
		l.need(nil)
		l.need([]string{"web"})
		l.settle(result{service: "web", cert: root.leaf(t, -10*time.Minute, 50*time.Minute)}) // an hour
		at := time.Until(l.all["web"].due) + 10*time.Minute
		if i == 0 || at < earliest {
			earliest = at
		}
		latest = max(latest, at)
	}
	if earliest < 35*time.Minute || latest > 55*time.Minute || latest-earliest < 10*time.Minute {
		t.Errorf("between %s and %s of an hour, want 36 to 54 minutes", earliest, latest)
	}
}

func TestALeafOfAnotherRootIsAskedForAtOnce(t *testing.T) {
	old, fresh := newSigner(t), newSigner(t)
	l := newLeaves(nil, newWorld(slog.New(slog.DiscardHandler), "the agent"))
	l.roots = &roots{active: old.cert}
	l.need([]string{"web"})
	l.settle(result{service: "web", cert: old.leaf(t, -10*time.Minute, 50*time.Minute)})
	if l.all["web"].due.Before(time.Now()) {
		t.Error("a new leaf is due")
	}
	l.rotate(&roots{active: fresh.cert})
	if l.all["web"].due.After(time.Now()) {
		t.Error("a leaf of the old root is not due")
	}
	l.settle(result{service: "web", cert: l.all["web"].cert}) // the agent has no other yet
	if wait := time.Until(l.all["web"].due); wait > maxBackoff {
		t.Errorf("asked again after %s", wait)
	}
	l.settle(result{service: "web", cert: fresh.leaf(t, -10*time.Minute, 50*time.Minute)})
	if wait := time.Until(l.all["web"].due); wait < maxBackoff {
		t.Errorf("a leaf of the new root is asked for again after %s", wait)
	}
}

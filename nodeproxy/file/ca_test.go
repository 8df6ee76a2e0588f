package file

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

var start0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func newCA(t *testing.T, dir string) *authority {
	t.Helper()
	a, err := openAuthority(context.Background(), dir, start0, true)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func webLeaf(t *testing.T, a *authority, now time.Time) *tls.Certificate {
	t.Helper()
	leaf, err := a.issue(policy.Identity{TrustDomain: a.trustDomain, Namespace: "default", Datacenter: "dc1", Service: "web"}, now)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// verify is what a peer does that trusts roots and takes the intermediates it is sent.
func verify(leaf *tls.Certificate, roots []*x509.Certificate, now time.Time, usage x509.ExtKeyUsage) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, der := range leaf.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		opts.Intermediates.AddCert(c)
	}
	_, err := leaf.Leaf.Verify(opts)
	return err
}

func TestLeafIsAsConsulMakesThem(t *testing.T) {
	a := newCA(t, t.TempDir())
	leaf := webLeaf(t, a, start0)
	c, err := x509.ParseCertificate(leaf.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	key, isEC := c.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !isEC || key.Curve != elliptic.P256():
		t.Error("not EC P-256")
	case c.Subject.String() != "":
		t.Errorf("subject %s", c.Subject)
	case len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://"+a.trustDomain+"/ns/default/dc/dc1/svc/web":
		t.Errorf("URIs %v", c.URIs)
	case len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) > 0:
		t.Error("another SAN")
	case c.IsCA:
		t.Error("a CA")
	case !c.NotAfter.Equal(start0.Add(72*time.Hour)) || c.NotBefore.After(start0):
		t.Errorf("valid %s to %s", c.NotBefore, c.NotAfter)
	case len(leaf.Certificate) != 1:
		t.Errorf("a chain of %d without any rotation", len(leaf.Certificate))
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if err := verify(leaf, a.roots, start0, usage); err != nil {
			t.Errorf("usage %v: %v", usage, err)
		}
	}
	if err := verify(leaf, a.roots, start0, x509.ExtKeyUsageCodeSigning); err == nil {
		t.Error("good for code signing")
	}
	if other := webLeaf(t, a, start0); other.Leaf.SerialNumber.Cmp(leaf.Leaf.SerialNumber) == 0 {
		t.Error("a serial number twice")
	}
	root := a.roots[0]
	if root.URIs[0].String() != "spiffe://"+a.trustDomain || !root.IsCA || !strings.HasSuffix(a.trustDomain, ".consul") || len(a.trustDomain) != 36+len(".consul") {
		t.Errorf("root of %s: %v", a.trustDomain, root.URIs)
	}
}

// Through two rotations, leaves of any age and nodes that have seen any of the roots get along.
func TestRotationNeedsNoNodeToReload(t *testing.T) {
	d := t.TempDir()
	seen := []*authority{newCA(t, d)}
	for i := range 2 {
		if err := rotate(context.Background(), d, start0.Add(time.Duration(i+1)*time.Hour)); err != nil {
			t.Fatal(err)
		}
		a, err := readAuthority(d)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.roots) != i+2 || a.trustDomain != seen[0].trustDomain || a.roots[0].Equal(seen[i].roots[0]) || !a.roots[1].Equal(seen[i].roots[0]) {
			t.Fatalf("after rotation %d: roots %v", i+1, a.roots)
		}
		seen = append(seen, a)
	}
	now := start0.Add(3 * time.Hour)
	for i, issuer := range seen {
		leaf := webLeaf(t, issuer, now)
		for j, node := range seen {
			if err := verify(leaf, node.roots, now, x509.ExtKeyUsageServerAuth); err != nil {
				t.Errorf("a leaf of root %d at a node that has seen root %d: %v", i, j, err)
			}
		}
	}
	bare := webLeaf(t, seen[1], now)
	bare.Certificate = bare.Certificate[:1]
	if err := verify(bare, seen[0].roots, now, x509.ExtKeyUsageServerAuth); err == nil {
		t.Error("the intermediate is not needed, so this test shows nothing")
	}
	stranger := newCA(t, t.TempDir())
	if err := verify(webLeaf(t, stranger, now), seen[2].roots, now, x509.ExtKeyUsageServerAuth); err == nil {
		t.Error("another mesh's leaf is trusted")
	}
	later := start0.Add(rootLife + 30*time.Minute)
	if err := rotate(context.Background(), d, later); err != nil {
		t.Fatal(err)
	}
	if a, err := readAuthority(d); err != nil || len(a.roots) != 3 || len(a.intermediates) != 2 {
		t.Errorf("the expired root or its intermediate is still there: %d roots, %d intermediates, %v", len(a.roots), len(a.intermediates), err)
	}
}

func TestRotationThatCrashesLeavesTheOldRoot(t *testing.T) {
	d := t.TempDir()
	old := newCA(t, d)
	next, err := newAuthority(old.trustDomain, start0)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.writeKeys(filepath.Join(d, caDir), next.key, old.key); err != nil { // and no more
		t.Fatal(err)
	}
	a, err := readAuthority(d)
	if err != nil || !a.roots[0].Equal(old.roots[0]) || !a.key.Equal(old.key) {
		t.Fatalf("%+v, %v", a, err)
	}
	if err := rotate(context.Background(), d, start0); err != nil {
		t.Fatal(err)
	}
	keys, _, err := readPEM(filepath.Join(d, caDir, keyPEM))
	if err != nil || len(keys) != 1 {
		t.Errorf("%d keys are left, %v", len(keys), err)
	}
}

// Whoever reads while a rotation is written sees the old root or the new one, with its key.
func TestRotationIsNeverSeenHalf(t *testing.T) {
	d := t.TempDir()
	newCA(t, d)
	done := make(chan error, 1)
	go func() {
		var err error
		for i := 0; i < 50 && err == nil; i++ {
			err = rotate(context.Background(), d, start0)
		}
		done <- err
	}()
	for reads := 0; ; reads++ {
		if _, err := readAuthority(d); err != nil {
			t.Errorf("read %d: %v", reads, err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
	}
}

func TestBadCAFiles(t *testing.T) {
	for _, c := range []struct {
		what, want string
		spoil      func(ca string) error
	}{
		{"a key for all to read", "chmod 600", func(ca string) error { return os.Chmod(filepath.Join(ca, keyPEM), 0o644) }},
		{"no key", "key.pem", func(ca string) error { return os.Remove(filepath.Join(ca, keyPEM)) }},
		{"no root", "root.pem", func(ca string) error { return os.Remove(filepath.Join(ca, rootPEM)) }},
		{"a root of another mesh", "no EC key of the first certificate", func(ca string) error {
			other, err := newAuthority("b.consul", start0)
			return errors.Join(err, other.writeRoots(ca))
		}},
		{"two trust domains", "two trust domains", func(ca string) error {
			other, err := newAuthority("b.consul", start0)
			if err != nil {
				return err
			}
			more, err := newAuthority("c.consul", start0)
			other.roots = append(other.roots, more.roots...)
			return errors.Join(err, other.writeRoots(ca))
		}},
		{"a key among the roots", "holds a \"PRIVATE KEY\"", func(ca string) error {
			key, err := os.ReadFile(filepath.Join(ca, keyPEM))
			return errors.Join(err, os.WriteFile(filepath.Join(ca, rootPEM), key, 0o600))
		}},
	} {
		d := t.TempDir()
		newCA(t, d)
		if err := c.spoil(filepath.Join(d, caDir)); err != nil {
			t.Fatal(err)
		}
		for _, create := range []bool{true, false} {
			if _, err := openAuthority(context.Background(), d, start0, create); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, create %v: %v, want %q", c.what, create, err, c.want)
			}
		}
	}
}

func TestLeavesAreRenewedBetween60And90PercentOfTheirLife(t *testing.T) {
	now := start0
	l := newLeaves(func() time.Time { return now })
	a := newCA(t, t.TempDir())
	services := make([]string, 200)
	for i := range services {
		services[i] = "svc-" + string(rune('a'+i%26)) + string(rune('a'+i/26))
	}
	changed := func() bool {
		t.Helper()
		c, err := l.ensure(a, "dc1", services)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if !changed() || len(l.current()) != len(services) || changed() {
		t.Fatal("not every service has a leaf that stays")
	}
	before := l.current()
	now = start0.Add(leafLife * 59 / 100)
	if changed() || l.untilRenewal() > leafLife/10 {
		t.Error("renewed before 60 % of life, or no timer is set for it")
	}
	now = start0.Add(leafLife * 75 / 100)
	changed()
	renewed := 0
	for name, cert := range l.current() {
		if cert != before[name] {
			renewed++
		}
	}
	if renewed < 20 || renewed > 180 {
		t.Errorf("%d of 200 renewed in the middle: the renewals are not spread", renewed)
	}
	now = start0.Add(leafLife * 90 / 100)
	changed()
	for name, cert := range l.current() {
		if cert == before[name] {
			t.Fatalf("%s is not renewed at 90 %% of its life", name)
		}
	}
	services = services[:1]
	if !changed() || len(l.current()) != 1 {
		t.Error("leaves that nobody needs are kept")
	}
	services = append(services, "../x", "*")
	if _, err := l.ensure(a, "dc1", services); err == nil || len(l.current()) != 2 {
		t.Errorf("a wildcard has got a leaf: %v, %d leaves", err, len(l.current()))
	}
}

func TestRunRenewsAndFollowsARotation(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": apiHCL, "config/api.hcl": webToAPI})
	var ahead atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	s := start(t, testConfig(d, "node-1"), func(s *Source) { s.now = now })
	s.Need([]string{"web"})
	first := s.until("a leaf", func(s *catalog.Snapshot) bool { return s.Leaves["web"] != nil })
	if len(first.Leaves) != 1 {
		t.Errorf("leaves that nobody needs: %v", first.Leaves)
	}
	ahead.Store(int64(leafLife * 91 / 100))
	renewed := s.until("a renewed leaf", func(s *catalog.Snapshot) bool { return s.Leaves["web"] != first.Leaves["web"] })
	if renewed.Leaves["web"].Leaf.NotAfter.Before(now().Add(leafLife / 2)) {
		t.Errorf("renewed until %s", renewed.Leaves["web"].Leaf.NotAfter)
	}
	if err := rotate(context.Background(), d, now()); err != nil {
		t.Fatal(err)
	}
	rotated := s.until("two roots", func(s *catalog.Snapshot) bool { return len(s.Roots) == 2 })
	if len(rotated.Leaves["web"].Certificate) != 2 || rotated.TrustDomain != first.TrustDomain {
		t.Errorf("%d certificates in the chain, trust domain %s", len(rotated.Leaves["web"].Certificate), rotated.TrustDomain)
	}
	for what, c := range map[string]struct{ leaf, node *catalog.Snapshot }{"new leaf, old node": {rotated, renewed}, "old leaf, new node": {renewed, rotated}} {
		if err := verify(c.leaf.Leaves["web"], c.node.Roots, now(), x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.Need(nil)
	s.until("no leaf", func(s *catalog.Snapshot) bool { return len(s.Leaves) == 0 })
	s.Need([]string{"batch"})
	snap := s.until("a leaf of a service without definition", func(s *catalog.Snapshot) bool { return s.Leaves["batch"] != nil })
	if !strings.Contains(problems(snap), "batch unknown-service") {
		t.Errorf("no problem says that batch is not defined: %s", problems(snap))
	}
}

// The key is gone, and with it no leaf can be issued after a restart; this daemon goes on, also with policy changes.
func TestAnUnreadableKeyDoesNotStopWhatIsRunning(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/web.hcl": webHCL, "nodes/node-2/api.hcl": apiHCL, "config/api.hcl": webToAPI})
	s := start(t, testConfig(d, "node-1"))
	s.Need([]string{"web"})
	s.until("a leaf", func(s *catalog.Snapshot) bool { return s.Leaves["web"] != nil })
	key := filepath.Join(d, caDir, keyPEM)
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	s.untilError("read CA", "key.pem")
	put(t, d, "config/api.hcl", webNoAPI)
	snap := s.until("a denied web", func(s *catalog.Snapshot) bool { return !allow(s, "web", "api") })
	if snap.Leaves["web"] == nil {
		t.Error("the leaf is gone")
	}
	s.untilError("read CA", "key.pem")
	if err := os.Rename(key+".away", key); err != nil {
		t.Fatal(err)
	}
	s.untilHealthy()
}

func TestAnotherCertificateChangesNothingElse(t *testing.T) {
	s := start(t, testConfig(dir(t, map[string]string{
		"nodes/n1/web.hcl": `services { name = "web"  address = "10.0.0.1"  port = 80  connect { sidecar_service {} } }`,
		"nodes/n1/api.hcl": `services { name = "api"  address = "10.0.0.2"  port = 80  connect { sidecar_service {} } }`,
	}), "n1"))
	s.Need([]string{"web"})
	one := s.until("a certificate", func(snap *catalog.Snapshot) bool { return snap.Leaves["web"] != nil })
	s.Need([]string{"web", "api"})
	both := s.until("a second certificate", func(snap *catalog.Snapshot) bool { return snap.Leaves["api"] != nil })
	if !both.SameCatalog(one) || both.Leaves["web"] != one.Leaves["web"] || len(one.Leaves) != 1 {
		t.Errorf("the second one came with another catalog, or the first is another: %v, %v", one.Leaves, both.Leaves)
	}
	s.Need([]string{"web", "batch"})
	other := s.until("a certificate of a service that nobody defines", func(snap *catalog.Snapshot) bool { return snap.Leaves["batch"] != nil })
	if !strings.Contains(problems(other), "batch unknown-service") || other.Leaves["api"] != nil {
		t.Errorf("problems: %s", problems(other))
	}
	s.Need([]string{"web"})
	if last := s.until("only the first", func(snap *catalog.Snapshot) bool { return len(snap.Leaves) == 1 }); strings.Contains(problems(last), "unknown-service") {
		t.Errorf("problems: %s", problems(last))
	}
}

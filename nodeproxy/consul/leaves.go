package consul

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"nodeproxy.io/policy"
)

const (
	// A leaf is asked for again at a random point between these parts of its life.
	renewFrom = 0.6
	renewTo   = 0.9

	// maxSigning is how many leaves are asked for at once: the servers sign few in a second.
	maxSigning = maxRequests
)

// leaves are the certificates of the services that workloads of this node run as. A certificate stays until a newer one
// is there, even when it has expired: whoever uses it is told so. It is safe for concurrent use.
type leaves struct {
	client *client
	world  *world
	kick   chan struct{}
	issue  func(ctx context.Context, service string) (*tls.Certificate, error)

	mu    sync.Mutex
	roots *roots
	all   map[string]*leaf // by service: those that are needed

	earlier map[string]*tls.Certificate // that an earlier daemon had
}

type leaf struct {
	cert    *tls.Certificate // nil before the first
	due     time.Time        // when it is asked for
	asking  bool
	tries   int // in a row that brought nothing new
	current bool
	alarmed bool // that cert has expired
	err     error
}

func newLeaves(client *client, w *world) *leaves {
	l := &leaves{client: client, world: w, kick: make(chan struct{}, 1), all: make(map[string]*leaf)}
	l.issue = l.fetch
	return l
}

// need replaces the set of services.
func (l *leaves) need(services []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.DeleteFunc(l.all, func(name string, _ *leaf) bool { return !slices.Contains(services, name) })
	for _, name := range services {
		if l.all[name] == nil {
			l.all[name] = &leaf{cert: l.earlier[name]}
		}
	}
	wake(l.kick)
	l.world.touch()
}

// needed lists the services, sorted.
func (l *leaves) needed() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.all))
}

// awaits says whether a service is needed of which no certificate is there, and none was refused.
func (l *leaves) awaits() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, leaf := range l.all {
		if leaf.cert == nil && leaf.tries == 0 {
			return true
		}
	}
	return false
}

// certificates are those that are there of some services.
func (l *leaves) certificates(services []string) map[string]*tls.Certificate {
	l.mu.Lock()
	defer l.mu.Unlock()
	certs := make(map[string]*tls.Certificate, len(services))
	for _, name := range services {
		if leaf := l.all[name]; leaf != nil && leaf.cert != nil {
			certs[name] = leaf.cert
		}
	}
	return certs
}

// rotate tells of new roots. Leaves that the active one did not sign are asked for again.
func (l *leaves) rotate(to *roots) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.roots = to
	for _, leaf := range l.all {
		if leaf.cert != nil && leaf.current && !signedBy(leaf.cert, to.active) {
			leaf.current, leaf.tries, leaf.due = false, 0, time.Time{}
		}
	}
	wake(l.kick)
}

// err joins what keeps leaves from being issued, those with one cause into one.
func (l *leaves) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	services := make(map[string][]string)
	for name, leaf := range l.all {
		var why []string
		if leaf.err != nil {
			why = append(why, leaf.err.Error())
		}
		if leaf.cert != nil && time.Now().After(leaf.cert.Leaf.NotAfter) {
			why = append(why, "the last one has expired, connections of this service are refused")
		}
		if text := strings.Join(why, "; "); text != "" {
			services[text] = append(services[text], name)
		}
	}
	var errs []error
	for _, text := range slices.Sorted(maps.Keys(services)) {
		names := services[text]
		slices.Sort(names)
		if more := len(names) - 5; more > 0 {
			names = append(names[:5], fmt.Sprintf("%d more", more))
		}
		errs = append(errs, fmt.Errorf("get a certificate for %s: %s", strings.Join(names, ", "), text))
	}
	return errors.Join(errs...)
}

// result is the answer for one service.
type result struct {
	service string
	cert    *tls.Certificate
	err     error
}

// run asks for leaves when they are due, until ctx ends.
func (l *leaves) run(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	results := make(chan result, maxSigning)
	timer := time.NewTimer(0)
	defer timer.Stop()
	underWay := 0
	for {
		due, wait := l.due(maxSigning - underWay)
		for _, name := range due {
			underWay++
			asking.Go(func() {
				cert, err := l.issue(ctx, name)
				results <- result{name, cert, err}
			})
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case res := <-results:
			underWay--
			l.settle(res)
		case <-l.kick:
		case <-timer.C:
		}
	}
}

// due takes at most free services whose time has come, and says when the next one's does.
func (l *leaves) due(free int) (names []string, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	wait = l.alarm()
	if l.roots == nil || l.world.current().agent == nil {
		return nil, wait // rotate kicks
	}
	for _, name := range slices.Sorted(maps.Keys(l.all)) {
		leaf := l.all[name]
		switch {
		case leaf.asking:
		case time.Now().Before(leaf.due):
			wait = min(wait, time.Until(leaf.due))
		case len(names) < free:
			leaf.asking = true
			names = append(names, name)
		}
	}
	return names, wait
}

// alarm says, once, that a certificate has expired, and when the next one will: an hour at most. The caller holds l.mu.
func (l *leaves) alarm() time.Duration {
	next := time.Hour
	for name, leaf := range l.all {
		if leaf.cert == nil || leaf.alarmed {
			continue
		}
		if left := time.Until(leaf.cert.Leaf.NotAfter); left > 0 {
			next = min(next, left)
			continue
		}
		leaf.alarmed = true
		l.world.log.Error("a certificate has expired: connections of this service are refused, others go on", "service", name, "expired", leaf.cert.Leaf.NotAfter, "error", leaf.err)
	}
	return next
}

// settle applies the answer for one service.
func (l *leaves) settle(res result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	leaf := l.all[res.service]
	if leaf == nil {
		return // not needed any more
	}
	leaf.asking = false
	if res.err != nil {
		leaf.tries++
		leaf.due = time.Now().Add(backoff(leaf.tries))
		if leaf.tries > tolerated || !hasStatus(res.err, http.StatusForbidden) && !hasStatus(res.err, http.StatusTooManyRequests) {
			leaf.err = explain(res.err)
		}
		return
	}
	leaf.err = nil
	fresh := leaf.cert == nil || !leaf.cert.Leaf.Equal(res.cert.Leaf)
	leaf.current = signedBy(res.cert, l.roots.active)
	life := res.cert.Leaf.NotAfter.Sub(res.cert.Leaf.NotBefore)
	switch {
	case !leaf.current: // the agent takes its time: up to half a minute after a rotation
		leaf.tries++
		leaf.due = time.Now().Add(backoff(leaf.tries))
	case !fresh: // it renews at a time of its own, and keeps the last one until then
		leaf.due = time.Now().Add(max(minBackoff, min(life/50, time.Until(res.cert.Leaf.NotAfter)/10)))
	default:
		part := renewFrom + rand.Float64()*(renewTo-renewFrom)
		leaf.tries, leaf.due = 0, res.cert.Leaf.NotBefore.Add(time.Duration(part*float64(life)))
	}
	if fresh {
		leaf.cert, leaf.alarmed = res.cert, false
		l.world.certify()
	}
}

// fetch asks the agent for one leaf, with the service's own token if there is one, and checks that it is what it should be.
func (l *leaves) fetch(ctx context.Context, name string) (*tls.Certificate, error) {
	got, err := l.client.request(ctx, question{path: "/v1/agent/connect/ca/leaf/" + escape(name), service: name})
	if err != nil {
		return nil, err
	}
	var issued api.LeafCert
	if err := decode(got, &issued); err != nil {
		return nil, err
	}
	return l.check(name, []byte(issued.CertPEM), []byte(issued.PrivateKeyPEM))
}

// check reads a certificate of service name, and its key.
func (l *leaves) check(name string, certPEM, keyPEM []byte) (*tls.Certificate, error) {
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	want := l.identity(name)
	if len(cert.Leaf.URIs) != 1 || cert.Leaf.URIs[0].String() != want.String() {
		return nil, fmt.Errorf("the certificate is for %v and not for %s", cert.Leaf.URIs, want)
	}
	if time.Now().After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate expired at %s already: check the clocks", cert.Leaf.NotAfter.Format(time.RFC3339))
	}
	return &cert, nil
}

func (l *leaves) identity(name string) policy.Identity {
	d := l.world.current()
	return policy.Identity{TrustDomain: d.roots.trustDomain, Namespace: "default", Datacenter: d.agent.datacenter, Service: name}
}

// signedBy says whether cert, with the intermediates that are sent along, chains to root.
func signedBy(cert *tls.Certificate, root *x509.Certificate) bool {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	opts.Roots.AddCert(root)
	for _, der := range cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			opts.Intermediates.AddCert(c)
		}
	}
	_, err := cert.Leaf.Verify(opts)
	return err == nil
}

package file

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"nodeproxy.io/policy"
)

const (
	// A leaf is renewed at a random point between these parts of its life, so that not all are at once.
	renewFrom = 0.6
	renewTo   = 0.9

	// renewRetry is how soon a renewal that failed is tried again, renewIdle how long a timer may sleep.
	renewRetry = time.Second
	renewIdle  = time.Hour
)

// leaves are the certificates of the services that run on this node.
type leaves struct {
	now   func() time.Time
	certs map[string]*leaf // by service
}

type leaf struct {
	cert  *tls.Certificate
	root  *x509.Certificate // whose key signed it
	renew time.Time
}

func newLeaves(now func() time.Time) *leaves { return &leaves{now: now, certs: make(map[string]*leaf)} }

// ensure brings the leaves in line with the services that need one: new ones are issued, those due or of an older root are
// renewed, the others dropped. What cannot be issued is in the error; a leaf that is there stays until it can be.
func (l *leaves) ensure(a *authority, datacenter string, services []string) (changed bool, err error) {
	var errs []error
	now := l.now()
	for _, service := range services {
		if old := l.certs[service]; old != nil && old.root.Equal(a.roots[0]) && now.Before(old.renew) {
			continue
		}
		id := policy.Identity{TrustDomain: a.trustDomain, Namespace: "default", Datacenter: datacenter, Service: service}
		if parsed, err := policy.ParseIdentity(id.String()); err != nil || parsed != id {
			errs = append(errs, fmt.Errorf("issue leaf for %q: not a service name", service))
			continue
		}
		cert, err := a.issue(id, now)
		if err != nil {
			errs = append(errs, fmt.Errorf("issue leaf for %q: %w", service, err))
			continue
		}
		life := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
		part := renewFrom + rand.Float64()*(renewTo-renewFrom)
		l.certs[service] = &leaf{cert: cert, root: a.roots[0], renew: cert.Leaf.NotBefore.Add(time.Duration(part * float64(life)))}
		changed = true
	}
	before := len(l.certs)
	maps.DeleteFunc(l.certs, func(service string, _ *leaf) bool { return !slices.Contains(services, service) })
	return changed || len(l.certs) < before, errors.Join(errs...)
}

// current lists the leaves.
func (l *leaves) current() map[string]*tls.Certificate {
	certs := make(map[string]*tls.Certificate, len(l.certs))
	for service, leaf := range l.certs {
		certs[service] = leaf.cert
	}
	return certs
}

// untilRenewal is how long to wait before ensure has something to do.
func (l *leaves) untilRenewal() time.Duration {
	wait := renewIdle
	for _, leaf := range l.certs {
		wait = min(wait, leaf.renew.Sub(l.now()))
	}
	return max(renewRetry, wait)
}

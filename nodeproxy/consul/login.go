package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

const (
	// renewLogin is after which part of its life a token is replaced.
	renewLogin = 0.8

	// settleLogin is how long a token may be unknown to servers that have not heard of it yet.
	settleLogin = time.Second

	logoutTimeout = 2 * time.Second
)

// login is the token that an auth method gives for a bearer token. It is safe for concurrent use.
type login struct {
	method, file, node string

	mu     sync.Mutex
	token  string // "" for none
	issued time.Time
	renew  time.Time // zero: it does not expire
	failed time.Time
	err    error
}

// current is the token, after logging in where there is none or it is about to expire. After a failure it is not tried
// again for a moment: all questions want a token at once.
func (l *login) current(ctx context.Context, c *client) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.token != "" && (l.renew.IsZero() || now.Before(l.renew)) {
		return l.token, nil
	}
	if l.err == nil || now.Sub(l.failed) >= minBackoff {
		err := l.in(ctx, c)
		if err != nil && ctx.Err() != nil {
			return l.token, err // of this question: others may have a better answer
		}
		l.err, l.failed = err, time.Now()
	}
	if l.err != nil && l.token == "" {
		return "", l.err
	}
	return l.token, nil // the old one, as long as it lasts
}

// in logs in. The bearer token is read each time: whoever issues it replaces it.
func (l *login) in(ctx context.Context, c *client) error {
	text, err := os.ReadFile(l.file)
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	bearer := strings.TrimSpace(string(text))
	if bearer == "" {
		return fmt.Errorf("log in: %s is empty: write the bearer token into it", l.file)
	}
	a, err := c.exchange(ctx, question{method: http.MethodPost, path: "/v1/acl/login", body: &api.ACLLoginParams{
		AuthMethod: l.method, BearerToken: bearer, Meta: map[string]string{"node": l.node, managedBy: ours},
	}}, "")
	if err != nil {
		return fmt.Errorf("log in with auth method %q and the token in %s: %w", l.method, l.file, err)
	}
	var got api.ACLToken
	if err := decode(a, &got); err != nil {
		return err
	}
	l.token, l.issued, l.renew = got.SecretID, time.Now(), time.Time{}
	if got.ExpirationTime != nil { // both times are by the servers' clock, which need not be ours
		l.renew = l.issued.Add(time.Duration(renewLogin * float64(got.ExpirationTime.Sub(got.CreateTime))))
	}
	return nil
}

// drop forgets a token that the servers do not know, and says whether another can be had now.
func (l *login) drop(token string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.token != token:
		return true // somebody else has replaced it
	case time.Since(l.issued) < settleLogin:
		return false
	}
	l.token = ""
	return true
}

// out gives the token back. One that cannot be given back ends with its auth method's MaxTokenTTL.
func (l *login) out(c *client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.token == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), logoutTimeout)
	defer cancel()
	_, _ = c.exchange(ctx, question{method: http.MethodPost, path: "/v1/acl/logout"}, l.token)
	l.token = ""
}

// isUnknownToken says whether the servers do not know the token: it has expired, was revoked, or is too new for them.
func isUnknownToken(err error) bool {
	e, ok := errors.AsType[*statusError](err)
	return ok && e.status == http.StatusForbidden && strings.Contains(e.text, "ACL not found")
}

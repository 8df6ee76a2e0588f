package consul

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// longest is how long the agent may keep a blocking query. It adds up to a sixteenth.
	longest = time.Minute

	// grace is how long an answer may take beyond that, and how long one may take that does not wait.
	grace = 10 * time.Second

	// maxRequests is how many requests that do not wait are under way at once.
	maxRequests = 6

	maxAnswer = 256 << 20
	maxError  = 300 // bytes of an error's text
)

// client asks one agent, or one of several servers. It reads the environment for nothing, unlike Consul's own library, which
// would let whoever starts the daemon redirect it.
type client struct {
	bases  []string                                                             // where they answer
	at     atomic.Uint32                                                        // which of them is asked, counted without end
	dial   func(ctx context.Context, network, address string) (net.Conn, error) // nil: the transport's own
	tls    *tlsFiles                                                            // nil: plain HTTP
	tokens tokens
	login  *login // nil: the tokens are all there are
	http   atomic.Pointer[transports]
	slots  chan struct{} // taken by requests that do not wait
}

// transports are how requests are sent that do not wait, and those that do.
type transports struct {
	prompt *http.Transport

	// waiting uses each connection once: when a connection that was used before is lost, net/http repeats the request by
	// itself, and an agent that has just started would be asked to wait for changes after an index that is another's.
	waiting *http.Transport
}

func (t *transports) close() {
	t.prompt.CloseIdleConnections()
	t.waiting.CloseIdleConnections()
}

func newClient(cfg *Config) (*client, error) {
	c := &client{tokens: newTokens(cfg.TokenFile, cfg.TokenDir), slots: make(chan struct{}, maxRequests)}
	if cfg.AuthMethod != "" {
		c.login = &login{method: cfg.AuthMethod, file: cfg.BearerTokenFile, node: cfg.Node}
	}
	addresses := cfg.Servers
	if len(addresses) == 0 {
		addresses = []string{cfg.Address}
	}
	for _, address := range addresses {
		if err := c.add(address, len(addresses) == 1); err != nil {
			return nil, err
		}
	}
	if strings.HasPrefix(c.bases[0], "https:") {
		c.tls = &tlsFiles{ca: cfg.CAFile, cert: cfg.CertFile, key: cfg.KeyFile}
	} else if cfg.CAFile != "" || cfg.CertFile != "" {
		return nil, fmt.Errorf("address %q has no TLS, but ca_file or cert_file is set: write https://, or remove them", addresses[0])
	}
	c.at.Store(rand.Uint32N(uint32(len(c.bases)))) // nodes spread over the servers
	return c, c.reload()
}

// add adds an address to those that are asked. A socket is the only one.
func (c *client) add(address string, only bool) error {
	scheme, rest, found := strings.Cut(address, "://")
	if !found {
		scheme, rest = "http", address
	}
	switch {
	case scheme == "unix" && strings.HasPrefix(rest, "/") && only:
		c.bases = append(c.bases, "http://agent")
		c.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", rest)
		}
		return nil
	case (scheme == "http" || scheme == "https") && hostPort(strings.TrimSuffix(rest, "/")):
		c.bases = append(c.bases, scheme+"://"+strings.TrimSuffix(rest, "/"))
	default:
		return fmt.Errorf("address %q is not host:port, http://host:port, https://host:port or unix:///path", address)
	}
	if first, _, _ := strings.Cut(c.bases[0], "://"); first != scheme {
		return fmt.Errorf("address %q is asked by %s, and the one before it by %s: use https:// for all of them", address, scheme, first)
	}
	return nil
}

// base is where questions are asked now, and a number for leave.
func (c *client) base() (string, uint32) {
	i := c.at.Load()
	return c.bases[int(i)%len(c.bases)], i
}

// leave asks the next of several servers from now on, unless somebody else has seen to that.
func (c *client) leave(i uint32) { c.at.CompareAndSwap(i, i+1) }

// leaveUnlessCalledOff is leave for a question that was not answered, unless whoever asked does not want to know any more.
func (c *client) leaveUnlessCalledOff(ctx context.Context, i uint32) {
	if !errors.Is(ctx.Err(), context.Canceled) {
		c.leave(i)
	}
}

func hostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	n, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil && host != "" && n > 0
}

// reload makes a transport of the certificates as they are now, if they have changed. Queries under way go on.
func (c *client) reload() error {
	old := c.http.Load()
	if old != nil && (c.tls == nil || !c.tls.changed()) {
		return nil
	}
	t := &transports{
		prompt:  &http.Transport{DialContext: c.dial, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: maxRequests},
		waiting: &http.Transport{DialContext: c.dial, DisableKeepAlives: true},
	}
	if c.tls != nil {
		config, err := c.tls.load()
		if err != nil {
			return err
		}
		t.prompt.TLSClientConfig, t.waiting.TLSClientConfig = config, config.Clone()
	}
	c.http.Store(t)
	if old != nil {
		old.close()
	}
	return nil
}

// close gives up the connections, and the token that was logged in for.
func (c *client) close() {
	if c.login != nil {
		c.login.out(c)
	}
	c.http.Load().close()
}

// question is one request: a GET unless method says otherwise.
type question struct {
	method  string
	body    any
	path    string
	params  url.Values
	service string // whose token to use, "" for the general one
	index   uint64 // the answer waits for a change after it; 0 does not wait

	consistent bool // the leader makes sure that it is one, and knows everything
}

// answer is what came back.
type answer struct {
	body          []byte
	index         uint64
	defaultPolicy string // of the ACLs: "allow", "deny", or "" if the agent does not say
	filtered      bool   // ACLs hid a part of it
}

// statusError is an answer that is an error.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d: %s", e.status, e.text) }

func hasStatus(err error, status int) bool {
	e, ok := errors.AsType[*statusError](err)
	return ok && e.status == status
}

// put changes something, with the token of service. body is sent as JSON unless it is nil.
func (c *client) put(ctx context.Context, path, service string, body any) error {
	_, err := c.request(ctx, question{method: http.MethodPut, path: path, service: service, body: body})
	if err != nil {
		return fmt.Errorf("put %s: %w", path, err)
	}
	return nil
}

// request asks, and waits for a slot first unless the question itself waits.
func (c *client) request(ctx context.Context, q question) (*answer, error) {
	timeout := grace
	if q.index > 0 {
		timeout += longest + longest/16
	} else {
		select {
		case c.slots <- struct{}{}:
			defer func() { <-c.slots }()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s", timeout))
	defer cancel()
	a, err := c.do(ctx, q)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return a, err
}

// do asks with the token of the question's service. One that was logged in for and is not known any more is replaced once.
func (c *client) do(ctx context.Context, q question) (*answer, error) {
	token, err := c.token(ctx, q.service)
	if err != nil {
		return nil, err
	}
	a, err := c.exchange(ctx, q, token)
	if c.login == nil || !isUnknownToken(err) || !c.login.drop(token) {
		return a, err
	}
	if token, err = c.token(ctx, q.service); err != nil {
		return nil, err
	}
	return c.exchange(ctx, q, token)
}

func (c *client) token(ctx context.Context, service string) (string, error) {
	if own, err := c.tokens.own(service); own != "" || err != nil {
		return own, err
	}
	if c.login != nil {
		return c.login.current(ctx, c)
	}
	return c.tokens.general()
}

// exchange asks one server, the next where it cannot be reached.
func (c *client) exchange(ctx context.Context, q question, token string) (a *answer, err error) {
	for range c.bases {
		a, err = c.ask(ctx, q, token)
		if dial, ok := errors.AsType[*net.OpError](err); !ok || dial.Op != "dial" || ctx.Err() != nil {
			break
		}
	}
	return a, err
}

func (c *client) ask(ctx context.Context, q question, token string) (*answer, error) {
	base, server := c.base()
	req, err := newRequest(ctx, base, q)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("X-Consul-Token", token)
	}
	transport := c.http.Load().prompt
	if q.index > 0 {
		transport = c.http.Load().waiting
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		c.leaveUnlessCalledOff(ctx, server)
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		c.leaveUnlessCalledOff(ctx, server)
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("the answer is longer than %d MiB", maxAnswer>>20)
	}
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode >= http.StatusInternalServerError {
			c.leave(server)
		}
		return nil, &statusError{resp.StatusCode, strings.TrimSpace(string(body[:min(len(body), maxError)]))}
	}
	index, _ := strconv.ParseUint(resp.Header.Get("X-Consul-Index"), 10, 64) // 0 where it says nothing
	return &answer{
		body: body, index: index,
		defaultPolicy: resp.Header.Get("X-Consul-Default-ACL-Policy"),
		filtered:      resp.Header.Get("X-Consul-Results-Filtered-By-ACLs") == "true",
	}, nil
}

func newRequest(ctx context.Context, base string, q question) (*http.Request, error) {
	path, query, _ := strings.Cut(q.path, "?")
	params, err := url.ParseQuery(query)
	if err != nil {
		return nil, err
	}
	maps.Copy(params, q.params)
	if q.index > 0 {
		params.Set("index", strconv.FormatUint(q.index, 10))
		params.Set("wait", longest.String())
	}
	if q.consistent {
		params.Set("consistent", "")
	}
	var sent io.Reader
	if q.body != nil {
		text, err := json.Marshal(q.body)
		if err != nil {
			return nil, err
		}
		sent = bytes.NewReader(text)
	}
	return http.NewRequestWithContext(ctx, cmp.Or(q.method, http.MethodGet), base+path+"?"+params.Encode(), sent)
}

// escape makes a name one segment of a path.
func escape(name string) string { return url.PathEscape(name) }

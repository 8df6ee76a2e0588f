package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

// DefaultSocket is where a daemon listens that is not told otherwise.
const DefaultSocket = "/run/nodeproxy/admin.sock"

const (
	requestTimeout = 10 * time.Second
	maxAnswer      = 64 << 20
)

// Client asks a running daemon. Its errors say what to do; it holds no connection between calls.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client of the daemon at the unix socket.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{
		DialContext: dial, DisableKeepAlives: true, ResponseHeaderTimeout: requestTimeout,
	}}}
}

// Status returns the daemon's state.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var s Status
	return &s, c.ask(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Health says how the daemon is.
func (c *Client) Health(ctx context.Context) (*Health, error) {
	var h Health
	return &h, c.ask(ctx, http.MethodGet, "/v1/health", nil, &h)
}

// PID returns the process that serves the socket, even if it hangs; 0 where it is not seen from here.
func (c *Client) PID(ctx context.Context) (int, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.socket)
	if err != nil {
		return 0, c.explain(err)
	}
	defer func() { _ = conn.Close() }()
	cred, err := peer(conn)
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// Applications says where each local instance is delivered to, and what is wrong with that now.
func (c *Client) Applications(ctx context.Context) ([]Application, error) {
	var all []Application
	err := c.ask(ctx, http.MethodGet, "/v1/applications", nil, &all)
	return all, err
}

// Explain says whether source may connect to destination, and why.
func (c *Client) Explain(ctx context.Context, source, destination string) (*Explanation, error) {
	var e Explanation
	q := url.Values{"source": {source}, "destination": {destination}}
	return &e, c.ask(ctx, http.MethodGet, "/v1/explain?"+q.Encode(), nil, &e)
}

// Enroll makes a cgroup a workload of a service.
func (c *Client) Enroll(ctx context.Context, req EnrollRequest) error {
	return c.ask(ctx, http.MethodPost, "/v1/enroll", req, new(EnrollRequest))
}

// Unenroll takes back what Enroll did.
func (c *Client) Unenroll(ctx context.Context, req EnrollRequest) error {
	return c.ask(ctx, http.MethodPost, "/v1/unenroll", req, new(EnrollRequest))
}

// Profile begins a CPU profile of the daemon, of whole seconds. What it returns has it, in the format of pprof, at their end.
func (c *Client) Profile(ctx context.Context, seconds int) (io.ReadCloser, error) {
	return c.do(ctx, http.MethodGet, fmt.Sprintf("/v1/profile?kind=cpu&seconds=%d", seconds), nil)
}

// StartSandbox asks whether a pod may start.
func (c *Client) StartSandbox(ctx context.Context, s Sandbox) (*SandboxState, error) {
	var state SandboxState
	return &state, c.ask(ctx, http.MethodPost, "/v1/sandbox/start", s, &state)
}

// StopSandbox says that a pod's network namespace is about to go.
func (c *Client) StopSandbox(ctx context.Context, s Sandbox) error {
	return c.ask(ctx, http.MethodPost, "/v1/sandbox/stop", s, new(Sandbox))
}

// Trace calls event for every live connection and then for every event that passes f, until ctx ends (nil), event
// returns an error (that error), or the daemon goes away (an error).
func (c *Client) Trace(ctx context.Context, f Filter, event func(Connection) error) error {
	t, err := c.OpenTrace(ctx, f)
	if err != nil {
		return err
	}
	defer t.Close()
	for {
		conn, err := t.Next()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := event(conn); err != nil {
			return err
		}
	}
}

// Trace is a running trace. Its owner calls Close.
type Trace struct {
	socket string
	body   io.ReadCloser
	dec    *json.Decoder
}

// OpenTrace starts a trace: of what passes f and happens after it has returned, nothing is missed. It ends with ctx.
func (c *Client) OpenTrace(ctx context.Context, f Filter) (*Trace, error) {
	q := url.Values{}
	for name, value := range map[string]string{"service": f.Service, "workload": f.Workload, "verdict": string(f.Verdict)} {
		if value != "" {
			q.Set(name, value)
		}
	}
	body, err := c.do(ctx, http.MethodGet, "/v1/trace?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	return &Trace{c.socket, body, json.NewDecoder(body)}, nil
}

// Next waits for the next line: the live connections come first. After an error the trace is over.
func (t *Trace) Next() (Connection, error) {
	var conn Connection
	if err := t.dec.Decode(&conn); err != nil {
		return conn, fmt.Errorf("read the trace: the daemon at %s ended it (%w)", t.socket, err)
	}
	return conn, nil
}

// Close ends the trace.
func (t *Trace) Close() { _ = t.body.Close() }

// ask sends one request and decodes one answer.
func (c *Client) ask(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	body, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("read the daemon's answer to %s: %w", path, err)
	}
	return nil
}

// do returns the body of a successful answer, which the caller closes.
func (c *Client) do(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://nodeproxy"+path, body)
	if err != nil {
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer func() { _ = resp.Body.Close() }()
	return nil, answerError(resp)
}

func answerError(resp *http.Response) error {
	var e apiError
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Error == "" {
		return fmt.Errorf("ask the daemon: it answered %s", resp.Status)
	}
	return errors.New(e.Error)
}

// explain says what to do about an error of the transport.
func (c *Client) explain(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("reach the daemon at %s: is it running? Start it with \"nodeproxy run\", or name its socket with --socket (%w)", c.socket, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("reach the daemon at %s: only root may; try sudo (%w)", c.socket, err)
	case os.IsTimeout(err):
		return fmt.Errorf("reach the daemon at %s: no answer within %s: it hangs; look at its log, then restart it (%w)", c.socket, requestTimeout, err)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("reach the daemon at %s: it closed the connection; it is stopping, has too many clients, or this is not root (%w)", c.socket, err)
	}
	return fmt.Errorf("reach the daemon at %s: %w", c.socket, err)
}

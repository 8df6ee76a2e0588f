package consul

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
)

// Front stands between whoever asks and an agent, at a unix socket: it counts, and misbehaves when told to. Its lock guards
// its fields.
type Front struct {
	sync.Mutex
	Socket string

	Spoil    func(http.ResponseWriter, *http.Request) bool // true: it has answered
	Change   func(*http.Request, *http.Response)           // of the agent's answers
	Open     map[net.Conn]bool
	Most     int            // that were open at once
	Statuses map[int]int    // of the agent's answers
	Requests map[string]int // by path

	agent http.RoundTripper
}

// NewFront stands before the agent that listens at a unix socket, at one beside it, until the test ends.
func NewFront(tb testing.TB, agent string) *Front {
	tb.Helper()
	f := &Front{
		Socket: filepath.Join(filepath.Dir(agent), "front.sock"),
		agent: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", agent)
		}},
		Open: make(map[net.Conn]bool), Statuses: make(map[int]int), Requests: make(map[string]int),
	}
	ln, err := net.Listen("unix", f.Socket)
	if err != nil {
		tb.Fatal(err)
	}
	server := &http.Server{Handler: f, ConnState: f.ConnState}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	tb.Cleanup(func() { _ = server.Close(); <-done })
	return f
}

// ConnState is for the http.Server that a Front is the handler of.
func (f *Front) ConnState(c net.Conn, s http.ConnState) {
	f.Lock()
	defer f.Unlock()
	switch s {
	case http.StateNew:
		f.Open[c] = true
		f.Most = max(f.Most, len(f.Open))
	case http.StateClosed, http.StateHijacked:
		delete(f.Open, c)
	}
}

// ServeHTTP implements http.Handler.
func (f *Front) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	f.Lock()
	spoil, change := f.Spoil, f.Change
	f.Requests[req.URL.Path]++
	f.Unlock()
	if spoil != nil && spoil(rw, req) {
		return
	}
	out := req.Clone(req.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = "http", "agent", ""
	out.Header.Del("Accept-Encoding") // so that Change sees text
	resp, err := f.agent.RoundTrip(out)
	if err != nil {
		panic(http.ErrAbortHandler) // the client sees the connection close, as it does without us
	}
	defer resp.Body.Close()
	f.Lock()
	f.Statuses[resp.StatusCode]++
	f.Unlock()
	if change != nil {
		change(req, resp)
	}
	for k, v := range resp.Header {
		rw.Header()[k] = v
	}
	rw.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(rw, resp.Body)
}

// Misbehave sets what answers in the agent's place, nil for nothing.
func (f *Front) Misbehave(spoil func(http.ResponseWriter, *http.Request) bool) {
	f.Lock()
	defer f.Unlock()
	f.Spoil = spoil
}

// Fail answers what match accepts with a status until it is called with nil.
func (f *Front) Fail(status int, match func(*http.Request) bool) {
	if match == nil {
		f.Misbehave(nil)
		return
	}
	f.Misbehave(func(rw http.ResponseWriter, req *http.Request) bool {
		if !match(req) {
			return false
		}
		http.Error(rw, http.StatusText(status), status)
		return true
	})
}

// Drop closes all connections.
func (f *Front) Drop() {
	f.Lock()
	defer f.Unlock()
	for c := range f.Open {
		c.Close()
	}
}

// Total is how many requests there were.
func (f *Front) Total() int {
	f.Lock()
	defer f.Unlock()
	sum := 0
	for _, n := range f.Requests {
		sum += n
	}
	return sum
}

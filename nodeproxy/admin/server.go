package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Bounds of the API.
const (
	maxBody      = 64 << 10
	maxHeader    = 8 << 10
	maxName      = 4 << 10 // of a query value, a cgroup path or a service name
	maxClients   = 64
	maxTraces    = 32
	traceQueue   = 4096
	readTimeout  = 10 * time.Second
	writeTimeout = 10 * time.Second // of one answer, or one batch of trace lines
	idleTimeout  = 30 * time.Second
	shutdownWait = 2 * time.Second
)

// Errors of a Backend that choose the status code; all others are 500.
var (
	ErrNotFound = errors.New("not found")       // 404: no such workload or service
	ErrRefused  = errors.New("request refused") // 409: the request was understood and may not be granted
)

// Classify makes err one of ErrNotFound or ErrRefused, and leaves its text as it is.
func Classify(err, as error) error { return &classified{err, as} }

type classified struct{ err, as error }

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.err, e.as} }

// Backend is the daemon as the API sees it. Its methods may be called concurrently.
type Backend interface {
	Status() Status
	// Health is cheap: probes ask for it every few seconds.
	Health() Health
	// Applications looks at the listeners of each local instance; it connects to none.
	Applications() []Application
	Explain(source, destination string) (Explanation, error)
	// Enroll returns when the claim is granted; the workload may be protected only later.
	Enroll(ctx context.Context, req EnrollRequest) error
	Unenroll(ctx context.Context, req EnrollRequest) error
	// StartSandbox has a pod protected before it starts, and says whether it is. It does not wait: it is asked again.
	StartSandbox(s Sandbox) SandboxState
	// StopSandbox says that a pod's network namespace is about to go.
	StopSandbox(s Sandbox) error
	// Connections lists the live ones as "open" events with the bytes so far.
	Connections() []Connection
}

// ServerConfig is what a Server needs; every field but the last is required.
type ServerConfig struct {
	Socket  string // absolute path
	Backend Backend
	Hub     *Hub
	Log     *slog.Logger

	Inherited *os.File // the socket, from a daemon that hands over; nil: it is bound
}

func (c *ServerConfig) validate() error {
	switch {
	case !filepath.IsAbs(c.Socket):
		return fmt.Errorf("admin.socket %q is not an absolute path", c.Socket)
	case len(c.Socket) > 107: // sun_path
		return fmt.Errorf("admin.socket %s is longer than the 107 bytes that a unix socket's path can have", c.Socket)
	case c.Backend == nil || c.Hub == nil || c.Log == nil:
		return errors.New("admin server needs a backend, a hub and a logger")
	}
	return nil
}

// Server is the API on its unix socket: GET /v1/status, /v1/health, /v1/applications, /v1/trace, /v1/explain and /v1/profile, POST
// /v1/enroll, /v1/unenroll, /v1/sandbox/start and /v1/sandbox/stop.
// Every error is {"error": "..."}.
type Server struct {
	cfg    ServerConfig
	ln     net.Listener
	socket *net.UnixListener // of ln
	traces chan struct{}     // one token per running trace
}

// Listen binds the socket. The caller calls Serve, or Close if it never gets that far.
func Listen(cfg ServerConfig) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	ln, err := listenUnix(cfg.Socket, cfg.Inherited)
	if err != nil {
		return nil, err
	}
	guarded := &guardedListener{Listener: ln, log: cfg.Log, admit: rootOnly, max: maxClients}
	return &Server{cfg: cfg, ln: guarded, socket: ln, traces: make(chan struct{}, maxTraces)}, nil
}

// Path is where the socket is.
func (s *Server) Path() string { return s.cfg.Socket }

// File is the socket, for the daemon to which this one hands over.
func (s *Server) File() syscall.Conn { return s.socket }

// Yield leaves the socket to that daemon when Serve ends.
func (s *Server) Yield() { s.socket.SetUnlinkOnClose(false) }

// Close removes the socket of a Server that does not serve, unless it is inherited.
func (s *Server) Close() error { return s.ln.Close() }

// Serve answers until ctx ends, then ends the traces, waits shortly for running requests and removes the socket.
func (s *Server) Serve(ctx context.Context) error {
	s.socket.SetUnlinkOnClose(true)
	if err := claim(s.socket); err != nil {
		return errors.Join(err, s.Close())
	}
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	return serve(ctx, srv, s.ln)
}

// serve runs srv on ln until ctx ends and every connection is closed.
func serve(ctx context.Context, srv *http.Server, ln net.Listener) error {
	done := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-ctx.Done():
		case <-done:
		}
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
	}()
	err := srv.Serve(ln)
	close(done)
	<-stopped
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
}

// Handler is the API without its socket and its limits on clients.
func (s *Server) Handler() http.Handler {
	routes := map[string]struct {
		method string
		serve  func(http.ResponseWriter, *http.Request) error
	}{
		"/v1/status":        {http.MethodGet, s.status},
		"/v1/health":        {http.MethodGet, s.health},
		"/v1/applications":  {http.MethodGet, s.applications},
		"/v1/trace":         {http.MethodGet, s.trace},
		"/v1/explain":       {http.MethodGet, s.explain},
		"/v1/profile":       {http.MethodGet, s.profile},
		"/v1/enroll":        {http.MethodPost, s.enroll},
		"/v1/unenroll":      {http.MethodPost, s.unenroll},
		"/v1/sandbox/start": {http.MethodPost, s.startSandbox},
		"/v1/sandbox/stop":  {http.MethodPost, s.stopSandbox},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
		route, ok := routes[r.URL.Path]
		if !ok {
			writeError(w, &httpError{http.StatusNotFound, fmt.Errorf("no such path %.100q: this daemon speaks /v1", r.URL.Path)})
			return
		}
		if r.Method != route.method {
			w.Header().Set("Allow", route.method)
			writeError(w, &httpError{http.StatusMethodNotAllowed, fmt.Errorf("%s takes %s", r.URL.Path, route.method)})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := route.serve(w, r); err != nil {
			writeError(w, err)
		}
	})
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	return writeJSON(w, s.cfg.Backend.Status())
}

func (s *Server) health(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	return writeJSON(w, s.cfg.Backend.Health())
}

func (s *Server) applications(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	return writeJSON(w, s.cfg.Backend.Applications())
}

func (s *Server) explain(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "source", "destination")
	if err != nil {
		return err
	}
	if q["source"] == "" || q["destination"] == "" {
		return badRequest("explain needs source and destination")
	}
	answer, err := s.cfg.Backend.Explain(q["source"], q["destination"])
	if err != nil {
		return err
	}
	return writeJSON(w, answer)
}

func (s *Server) enroll(w http.ResponseWriter, r *http.Request) error {
	req, err := readEnroll(r)
	if err != nil {
		return err
	}
	if req.Service == "" {
		return badRequest("enroll needs a service")
	}
	if err := s.cfg.Backend.Enroll(r.Context(), req); err != nil {
		return err
	}
	s.cfg.Log.Info("enrolled by hand", "cgroup", req.Cgroup, "service", req.Service)
	return writeJSON(w, req)
}

func (s *Server) unenroll(w http.ResponseWriter, r *http.Request) error {
	req, err := readEnroll(r)
	if err != nil {
		return err
	}
	if err := s.cfg.Backend.Unenroll(r.Context(), req); err != nil {
		return err
	}
	s.cfg.Log.Info("un-enrolled by hand", "cgroup", req.Cgroup)
	return writeJSON(w, req)
}

func (s *Server) startSandbox(w http.ResponseWriter, r *http.Request) error {
	sandbox, err := readSandbox(r)
	if err != nil {
		return err
	}
	return writeJSON(w, s.cfg.Backend.StartSandbox(sandbox))
}

func (s *Server) stopSandbox(w http.ResponseWriter, r *http.Request) error {
	sandbox, err := readSandbox(r)
	if err != nil {
		return err
	}
	if err := s.cfg.Backend.StopSandbox(sandbox); err != nil {
		return err
	}
	return writeJSON(w, sandbox)
}

func readSandbox(r *http.Request) (s Sandbox, err error) {
	switch err = readBody(r, &s); {
	case err != nil:
		return s, err
	case s.Namespace == "" || s.Pod == "" || s.UID == "" || hasControl(s.Namespace+s.Pod+s.UID):
		return s, badRequest("a sandbox needs the namespace, the name and the UID of a pod")
	case !filepath.IsAbs(s.Network) || hasControl(s.Network):
		return s, badRequest("network %.200q is not an absolute path", s.Network)
	}
	return s, nil
}

// readBody decodes the one JSON object that the body is.
func readBody(r *http.Request, into any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return bodyError(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return badRequest("the body has more than one JSON object")
	}
	return nil
}

func readEnroll(r *http.Request) (req EnrollRequest, err error) {
	switch err = readBody(r, &req); {
	case err != nil:
		return req, err
	case !filepath.IsAbs(req.Cgroup) || filepath.Clean(req.Cgroup) != req.Cgroup || len(req.Cgroup) > maxName:
		return req, badRequest("cgroup %.200q is not a clean absolute path", req.Cgroup)
	case len(req.Service) > maxName || hasControl(req.Cgroup+req.Service+strings.Join(req.Also, "")):
		return req, badRequest("cgroup or service has control characters or is too long")
	case req.Mode != "" && req.Mode != "strict" && req.Mode != "permissive":
		return req, badRequest("mode %.100q is neither strict nor permissive", req.Mode)
	}
	return req, nil
}

func bodyError(err error) error {
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &httpError{http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than %d bytes", tooLarge.Limit)}
	}
	return badRequest("read the request: %w", err)
}

// query returns the single values of the allowed parameters. Any other is an error: a filter that is not understood
// must not be ignored.
func query(r *http.Request, allowed ...string) (map[string]string, error) {
	found := make(map[string]string, len(allowed))
	for _, name := range allowed {
		found[name] = ""
	}
	for name, values := range r.URL.Query() {
		if _, ok := found[name]; !ok {
			return nil, badRequest("unknown parameter %.100q", name)
		}
		if len(values) != 1 || len(values[0]) > maxName || hasControl(values[0]) {
			return nil, badRequest("parameter %s must be given once, without control characters, in at most %d bytes", name, maxName)
		}
		found[name] = values[0]
	}
	return found, nil
}

func hasControl(s string) bool {
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return true
		}
	}
	return false
}

// httpError is an error with its status code.
type httpError struct {
	status int
	err    error
}

func (e *httpError) Error() string { return e.err.Error() }
func (e *httpError) Unwrap() error { return e.err }

func badRequest(format string, args ...any) error {
	return &httpError{http.StatusBadRequest, fmt.Errorf(format, args...)}
}

func statusOf(err error) int {
	if e, ok := errors.AsType[*httpError](err); ok {
		return e.status
	}
	switch {
	case errors.Is(err, ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, ErrRefused):
		return http.StatusConflict
	}
	return http.StatusInternalServerError
}

// apiError is the body of every error.
type apiError struct {
	Error string `json:"error"`
}

func writeError(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(statusOf(err))
	_ = json.NewEncoder(w).Encode(apiError{err.Error()}) // the client is gone when this fails
}

// writeJSON answers with v. It encodes first, so that what cannot be encoded is still an error.
func writeJSON(w http.ResponseWriter, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n')) // the client is gone when this fails
	return nil
}

package admin

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeBackend answers from its fields and records what it was asked.
type fakeBackend struct {
	mu       sync.Mutex
	status   Status
	live     []Connection
	enrolled map[string]string
	err      error
}

func (b *fakeBackend) Status() Status { return b.status }

func (b *fakeBackend) Health() Health { return Health{Hung: "it is a fake"} }

func (b *fakeBackend) Applications() []Application { return []Application{} }

func (b *fakeBackend) Explain(source, destination string) (Explanation, error) {
	if source == "nobody" {
		return Explanation{}, fmt.Errorf("service %q: %w", source, ErrNotFound)
	}
	return Explanation{Source: source, Destination: destination, Allowed: true}, b.err
}

func (b *fakeBackend) Enroll(_ context.Context, req EnrollRequest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.enrolled == nil {
		b.enrolled = make(map[string]string)
	}
	b.enrolled[req.Cgroup] = req.Service
	return b.err
}

func (b *fakeBackend) Unenroll(_ context.Context, req EnrollRequest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.enrolled, req.Cgroup)
	return b.err
}

func (b *fakeBackend) StartSandbox(s Sandbox) SandboxState {
	return SandboxState{Meshed: true, NotYet: s.UID + " at " + s.Network}
}

func (b *fakeBackend) StopSandbox(Sandbox) error { return b.err }

func (b *fakeBackend) Connections() []Connection { return b.live }

type daemon struct {
	*Client
	socket string
	hub    *Hub
	stop   func()
}

// startDaemon serves b on a real socket until the test ends.
func startDaemon(t *testing.T, b Backend) *daemon {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "run", "admin.sock")
	hub := NewHub()
	srv, err := Listen(ServerConfig{Socket: socket, Backend: b, Hub: hub, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return &daemon{Client: NewClient(socket), socket: socket, hub: hub, stop: stop}
}

func TestHealthCrossesTheSocketAndTheKernelNamesWhoServesIt(t *testing.T) {
	d := startDaemon(t, &fakeBackend{})
	if h, err := d.Health(t.Context()); err != nil || h.Hung != "it is a fake" || h.NotReady != "" {
		t.Errorf("health is %+v, %v", h, err)
	}
	if pid, err := d.PID(t.Context()); err != nil || pid != os.Getpid() {
		t.Errorf("process %d serves, %v, want %d", pid, err, os.Getpid())
	}
}

func TestStatusCrossesTheSocketUnchanged(t *testing.T) {
	want := Status{Node: "node-1", Workloads: []Workload{{Service: "web", State: "protected"}}}
	d := startDaemon(t, &fakeBackend{status: want})
	got, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.Node != want.Node || len(got.Workloads) != 1 || got.Workloads[0].Service != "web" {
		t.Errorf("Status = %+v, want %+v", got, want)
	}
}

func TestEnrollAndUnenrollReachTheBackend(t *testing.T) {
	b := &fakeBackend{}
	d := startDaemon(t, b)
	if err := d.Enroll(t.Context(), EnrollRequest{Cgroup: "/sys/fs/cgroup/web", Service: "web"}); err != nil {
		t.Fatal(err)
	}
	if got := b.enrolled["/sys/fs/cgroup/web"]; got != "web" {
		t.Errorf("enrolled as %q, want web", got)
	}
	if err := d.Unenroll(t.Context(), EnrollRequest{Cgroup: "/sys/fs/cgroup/web"}); err != nil {
		t.Fatal(err)
	}
	if len(b.enrolled) != 0 {
		t.Errorf("still enrolled: %v", b.enrolled)
	}
}

func TestBackendErrorsReachTheCallerInWords(t *testing.T) {
	d := startDaemon(t, &fakeBackend{err: fmt.Errorf("cgroup is an ancestor of the daemon: %w", ErrRefused)})
	err := d.Enroll(t.Context(), EnrollRequest{Cgroup: "/sys/fs/cgroup", Service: "web"})
	if err == nil || !strings.Contains(err.Error(), "ancestor of the daemon") {
		t.Errorf("Enroll error = %v, want the backend's", err)
	}
	if _, err := d.Explain(t.Context(), "nobody", "api"); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("Explain error = %v, want the backend's", err)
	}
}

func TestBadRequestsGetAFittingStatusAndAJSONError(t *testing.T) {
	s := &Server{cfg: ServerConfig{Backend: &fakeBackend{err: ErrRefused}, Hub: NewHub(), Log: slog.New(slog.DiscardHandler)}}
	for name, c := range map[string]struct {
		method, target, body string
		want                 int
	}{
		"unknown path":          {"GET", "/v2/status", "", 404},
		"wrong method":          {"POST", "/v1/status", "", 405},
		"no destination":        {"GET", "/v1/explain?source=web", "", 400},
		"unknown profile":       {"GET", "/v1/profile?kind=all", "", 400},
		"profile without end":   {"GET", "/v1/profile?kind=cpu", "", 400},
		"profile of an hour":    {"GET", "/v1/profile?kind=cpu&seconds=3600", "", 400},
		"unknown service":       {"GET", "/v1/explain?source=nobody&destination=api", "", 404},
		"unknown parameter":     {"GET", "/v1/trace?svc=web", "", 400},
		"unknown verdict":       {"GET", "/v1/trace?verdict=maybe", "", 400},
		"parameter twice":       {"GET", "/v1/explain?source=a&source=b&destination=c", "", 400},
		"control character":     {"GET", "/v1/explain?source=%1b[2J&destination=c", "", 400},
		"not JSON":              {"POST", "/v1/enroll", "cgroup=/x", 400},
		"unknown field":         {"POST", "/v1/enroll", `{"cgroup":"/x","service":"web","root":true}`, 400},
		"two objects":           {"POST", "/v1/enroll", `{"cgroup":"/x","service":"web"}{}`, 400},
		"relative cgroup":       {"POST", "/v1/enroll", `{"cgroup":"x","service":"web"}`, 400},
		"cgroup with ..":        {"POST", "/v1/unenroll", `{"cgroup":"/a/../b"}`, 400},
		"no service":            {"POST", "/v1/enroll", `{"cgroup":"/x"}`, 400},
		"unknown mode":          {"POST", "/v1/enroll", `{"cgroup":"/x","service":"web","mode":"open"}`, 400},
		"oversized body":        {"POST", "/v1/enroll", `{"service":"` + strings.Repeat("a", maxBody) + `"}`, 413},
		"refused by the daemon": {"POST", "/v1/enroll", `{"cgroup":"/x","service":"web"}`, 409},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequest(c.method, c.target, strings.NewReader(c.body)))
			if w.Code != c.want {
				t.Errorf("status = %d, want %d (%s)", w.Code, c.want, w.Body)
			}
			if !strings.HasPrefix(w.Body.String(), `{"error":"`) {
				t.Errorf("body = %s, want a JSON error", w.Body)
			}
		})
	}
}

func TestProfilesAreThoseOfPprof(t *testing.T) {
	d := startDaemon(t, &fakeBackend{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first, err := d.Profile(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := d.Profile(ctx, 1); err == nil || !strings.Contains(err.Error(), "when the other one is done") {
		t.Errorf("a second profile meanwhile: error = %v, want that there is one", err)
	}
	heap, err := d.do(ctx, http.MethodGet, "/v1/profile?kind=heap", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer heap.Close()
	for kind, body := range map[string]io.Reader{"cpu": first, "heap": heap} {
		unzipped, err := gzip.NewReader(body)
		if err != nil {
			t.Fatalf("%s: not a profile: %v", kind, err)
		}
		if text, err := io.ReadAll(unzipped); err != nil || !bytes.Contains(text, []byte("nanoseconds")) && !bytes.Contains(text, []byte("inuse_space")) {
			t.Errorf("%s: a profile of %d bytes without its units, %v", kind, len(text), err)
		}
	}
}

func TestTraceStartsWithLiveConnectionsAndDoesNotRepeatThem(t *testing.T) {
	live := Connection{Event: EventOpen, ID: 7, Verdict: Allowed, Source: Endpoint{Service: "web"}}
	d := startDaemon(t, &fakeBackend{live: []Connection{live}})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var got []string
	errDone := errors.New("done")
	err := d.Trace(ctx, Filter{}, func(c Connection) error {
		got = append(got, fmt.Sprintf("%s %d", c.Event, c.ID))
		if len(got) == 1 { // the subscription stands: what is observed now comes after the list
			d.hub.Observe(live)
			d.hub.Observe(Connection{Event: EventOpen, ID: 8})
			d.hub.Observe(Connection{Event: EventClose, ID: 7})
		}
		if c.Event == EventClose {
			return errDone
		}
		return nil
	})
	if !errors.Is(err, errDone) {
		t.Fatalf("Trace = %v", err)
	}
	if want := "open 7,open 8,close 7"; strings.Join(got, ",") != want {
		t.Errorf("events = %v, want %s", got, want)
	}
}

func TestTraceEndsWithTheDaemonAndSaysSo(t *testing.T) {
	d := startDaemon(t, &fakeBackend{live: []Connection{{Event: EventOpen, ID: 1}}})
	err := d.Trace(t.Context(), Filter{}, func(Connection) error { go d.stop(); return nil })
	if err == nil || !strings.Contains(err.Error(), "the daemon") {
		t.Errorf("Trace = %v, want an error that names the daemon", err)
	}
}

func TestOneTraceTooManyIsRefused(t *testing.T) {
	s := &Server{cfg: ServerConfig{Backend: &fakeBackend{}, Hub: NewHub()}, traces: make(chan struct{}, 1)}
	s.traces <- struct{}{}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/v1/trace", nil))
	if w.Code != http.StatusServiceUnavailable {
		t.Errorf("status = %d, want 503", w.Code)
	}
}

func TestMissingDaemonErrorSaysWhatToDo(t *testing.T) {
	_, err := NewClient(filepath.Join(t.TempDir(), "none.sock")).Status(t.Context())
	if err == nil || !strings.Contains(err.Error(), "is it running?") || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("error = %v, want one that says what to do", err)
	}
}

func TestSocketIsPrivate(t *testing.T) {
	d := startDaemon(t, &fakeBackend{})
	info, err := os.Stat(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("socket mode = %o, want 600", info.Mode().Perm())
	}
	d.stop()
	if _, err := os.Stat(d.socket); !os.IsNotExist(err) {
		t.Errorf("socket remains after Serve: %v", err)
	}
}

func TestStaleSocketIsReplacedAndALiveOneIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admin.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path, nil); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("listen on a live socket = %v, want a refusal", err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close() // as a killed daemon leaves it
	again, err := listenUnix(path, nil)
	if err != nil {
		t.Fatalf("listen on a stale socket: %v", err)
	}
	_ = again.Close()
}

func TestAFileInPlaceOfTheSocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admin.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path, nil); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("listen = %v, want a refusal", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

func TestClientsBeyondTheLimitAreTurnedAwayAndMakeRoomAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admin.sock")
	unixLn, err := listenUnix(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ln := &guardedListener{Listener: unixLn, log: slog.New(slog.DiscardHandler), admit: rootOnly, max: 1}
	defer func() { _ = ln.Close() }()
	accepted := make(chan net.Conn, 3)
	go func() {
		defer close(accepted)
		for conn, err := ln.Accept(); err == nil; conn, err = ln.Accept() {
			accepted <- conn
		}
	}()
	first, second := dialUnix(t, path), dialUnix(t, path)
	defer func() { _ = first.Close() }()
	server := <-accepted
	if _, err := second.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the second client was not turned away: %v", err)
	}
	_ = server.Close()
	_ = server.Close() // releases once
	third := dialUnix(t, path)
	defer func() { _ = third.Close() }()
	select {
	case conn := <-accepted:
		_ = conn.Close()
	case <-time.After(10 * time.Second):
		t.Error("no room after the first client went")
	}
}

func TestAStrangerIsTurnedAwayWhateverTheSocketsMode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	d := startDaemon(t, &fakeBackend{})
	if err := os.Chmod(d.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(d.socket); dir != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	asked := make(chan error, 1)
	go func() {
		// The raw system call changes this thread alone, which ends with the goroutine as it stays locked to it.
		runtime.LockOSThread()
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			asked <- fmt.Errorf("become nobody: %w", errno)
			return
		}
		conn, err := net.Dial("unix", d.socket)
		if err != nil {
			asked <- fmt.Errorf("dial: %w", err)
			return
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = conn.Write([]byte("GET /v1/status HTTP/1.0\r\n\r\n"))
		answer, err := io.ReadAll(conn)
		if len(answer) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the stranger got %q, %v", answer, err)
		}
		asked <- nil
	}()
	if err := <-asked; err != nil {
		t.Error(err)
	}
	if _, err := d.Status(t.Context()); err != nil {
		t.Errorf("root is turned away too: %v", err)
	}
}

func dialUnix(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	return conn
}

func TestServerRefusesAnUnusableConfiguration(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]ServerConfig{
		"relative socket": {Socket: "admin.sock", Backend: &fakeBackend{}, Hub: NewHub(), Log: log},
		"too long":        {Socket: "/" + strings.Repeat("x", 108), Backend: &fakeBackend{}, Hub: NewHub(), Log: log},
		"no backend":      {Socket: "/run/x.sock", Hub: NewHub(), Log: log},
	} {
		if _, err := Listen(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzAPI(f *testing.F) {
	f.Add("GET", "/v1/explain?source=web&destination=api", "")
	f.Add("POST", "/v1/enroll", `{"cgroup":"/x","service":"web"}`)
	f.Add("POST", "/v1/unenroll", `{"cgroup":"/x/../y"}`)
	f.Add("GET", "/v1/status?%zz", "{")
	b := &fakeBackend{}
	h := (&Server{cfg: ServerConfig{Backend: b, Hub: NewHub(), Log: slog.New(slog.DiscardHandler)}}).Handler()
	f.Fuzz(func(t *testing.T, method, target, body string) {
		r, err := http.NewRequest(method, target, strings.NewReader(body))
		if err != nil || r.URL.Path == "/v1/trace" || r.URL.Path == "/v1/profile" {
			t.Skip("not a request, or one that streams")
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusOK {
			b.mu.Lock()
			defer b.mu.Unlock()
			for cgroup := range b.enrolled {
				if !filepath.IsAbs(cgroup) || filepath.Clean(cgroup) != cgroup || hasControl(cgroup) {
					t.Errorf("enrolled %q", cgroup)
				}
			}
			clear(b.enrolled)
			return
		}
		if w.Code < 400 || w.Code >= 500 || !strings.HasPrefix(w.Body.String(), `{"error":"`) {
			t.Errorf("%s %s: %d %s, want a 4xx with a JSON error", method, target, w.Code, w.Body)
		}
	})
}

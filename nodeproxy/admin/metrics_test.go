package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

func snapshotOf(services ...string) *catalog.Snapshot {
	s := &catalog.Snapshot{Services: make(map[string]*catalog.Service)}
	for _, name := range services {
		s.Services[name] = &catalog.Service{Name: name}
	}
	return s
}

func newTestMetrics(services ...string) *Metrics {
	m := NewMetrics(func() Status { return Status{} }, func() []Connection { return nil })
	m.Apply(snapshotOf(services...))
	return m
}

func event(kind string, id uint64, source, destination string) Connection {
	return Connection{Event: kind, ID: id, Direction: Outbound, Path: PathMTLS, Verdict: Allowed,
		Source: Endpoint{Service: source}, Destination: Endpoint{Service: destination}}
}

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("scrape: %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func wantSample(t *testing.T, text, sample string) {
	t.Helper()
	if !strings.Contains(text, sample+"\n") {
		t.Errorf("no sample %q in\n%s", sample, text)
	}
}

const webToAPI = `{destination_service="api",direction="outbound",path="mtls",source_service="web"}`

func TestConnectionsAreCountedPerPair(t *testing.T) {
	m := newTestMetrics("web", "api")
	opened := event(EventOpen, 1, "web", "api")
	opened.Handshake = 3 * time.Millisecond
	m.Observe(opened)
	m.Observe(event(EventOpen, 2, "web", "api"))
	closed := event(EventClose, 1, "web", "api")
	closed.Sent, closed.Received = 100, 900
	m.Observe(closed)
	m.Observe(closed) // told twice, counted once
	text := scrape(t, m)
	wantSample(t, text, "nodeproxy_connections_opened_total"+webToAPI+" 2")
	wantSample(t, text, "nodeproxy_connections_closed_total"+webToAPI+" 1")
	wantSample(t, text, "nodeproxy_connections_active"+webToAPI+" 1")
	wantSample(t, text, "nodeproxy_bytes_total"+webToAPI+" 1000")
	wantSample(t, text, "nodeproxy_handshake_seconds_count"+webToAPI+" 1")
	wantSample(t, text, `nodeproxy_handshake_seconds_bucket`+strings.Replace(webToAPI, "}", `,le="0.0025"}`, 1)+" 0")
	wantSample(t, text, `nodeproxy_handshake_seconds_bucket`+strings.Replace(webToAPI, "}", `,le="0.005"}`, 1)+" 1")
}

func TestRefusedAndCutConnectionsAreDenied(t *testing.T) {
	m := newTestMetrics("web", "api")
	refused := event(EventDenied, 0, "web", "api")
	refused.Verdict, refused.Reason = Denied, catalog.ReasonIntention
	m.Observe(refused)
	m.Observe(event(EventOpen, 1, "web", "api"))
	cut := event(EventClose, 1, "web", "api")
	cut.Verdict, cut.Reason = Denied, catalog.ReasonIntention
	m.Observe(cut)
	wantSample(t, scrape(t, m), "nodeproxy_denied_total"+strings.Replace(webToAPI, `,source`, `,reason="intention",source`, 1)+" 2")
}

func TestPlaintextLetInByTheKernelIsCountedButNeverActive(t *testing.T) {
	m := newTestMetrics("web", "api")
	for range 2 {
		m.Observe(event(EventOpen, 0, "web", "api"))
	}
	text := scrape(t, m)
	wantSample(t, text, "nodeproxy_connections_opened_total"+webToAPI+" 2")
	wantSample(t, text, "nodeproxy_connections_active"+webToAPI+" 0")
	m.Apply(snapshotOf())
	if len(m.series) != 0 {
		t.Error("its series outlives the service")
	}
}

func TestBytesOfLiveConnectionsAreCountedOnce(t *testing.T) {
	live := event(EventOpen, 1, "web", "api")
	m := NewMetrics(func() Status { return Status{} }, func() []Connection { return []Connection{live} })
	m.Apply(snapshotOf("web", "api"))
	m.Observe(live)
	live.Received = 500
	wantSample(t, scrape(t, m), "nodeproxy_bytes_total"+webToAPI+" 500")
	closed := live
	closed.Event, closed.Received = EventClose, 800
	m.Observe(closed)
	wantSample(t, scrape(t, m), "nodeproxy_bytes_total"+webToAPI+" 800") // the list still has it: not again
}

func TestSeriesEndWithTheService(t *testing.T) {
	m := newTestMetrics("web", "api", "batch")
	for id, source := range []string{"web", "batch"} {
		m.Observe(event(EventOpen, uint64(id), source, "api"))
		m.Observe(event(EventClose, uint64(id), source, "api"))
	}
	m.Apply(snapshotOf("web", "api"))
	text := scrape(t, m)
	if strings.Contains(text, "batch") {
		t.Errorf("series of a service that is gone:\n%s", text)
	}
	wantSample(t, text, "nodeproxy_connections_opened_total"+webToAPI+" 1")
}

func TestSeriesWithLiveConnectionsEndAtTheLastClose(t *testing.T) {
	m := newTestMetrics("web", "api")
	m.Observe(event(EventOpen, 1, "web", "api"))
	m.Apply(snapshotOf("api"))
	wantSample(t, scrape(t, m), "nodeproxy_connections_active"+webToAPI+" 1")
	m.Observe(event(EventClose, 1, "web", "api"))
	if text := scrape(t, m); strings.Contains(text, `"web"`) {
		t.Errorf("series remains:\n%s", text)
	}
	if len(m.live) != 0 || len(m.series) != 0 {
		t.Errorf("%d live, %d series remain", len(m.live), len(m.series))
	}
}

func TestUnknownServicesAndTooManyPairsShareOneSeries(t *testing.T) {
	m := newTestMetrics("web")
	for i := range 10 {
		m.Observe(event(EventDenied, 0, fmt.Sprint("made-up-", i), "web"))
	}
	if len(m.series) != 1 {
		t.Errorf("%d series for unknown services, want 1", len(m.series))
	}
	var names []string
	for i := range 70 {
		names = append(names, fmt.Sprint("s", i))
	}
	m = newTestMetrics(names...)
	for _, a := range names {
		for _, b := range names {
			m.Observe(event(EventDenied, 0, a, b))
		}
	}
	if len(m.series) > maxSeries+1 {
		t.Errorf("%d series, want at most %d", len(m.series), maxSeries+1)
	}
	wantSample(t, scrape(t, m), fmt.Sprintf(
		`nodeproxy_denied_total{destination_service="other",direction="outbound",path="mtls",reason="",source_service="other"} %d`, 70*70-maxSeries))
}

func TestGaugesComeFromTheStatusAndTheSnapshot(t *testing.T) {
	status := Status{
		Source:       SourceStatus{Updated: time.Now().Add(-time.Hour)},
		Certificates: []Certificate{{Service: "web", NotAfter: time.Now().Add(2 * time.Hour)}, {Service: "none"}},
		DNS:          &Queries{Answered: 5, Forwarded: 6, Failed: 7},
		Kernel:       Kernel{Counters: map[string]uint64{CounterUnprotectedUDP: 3, CounterEventsLost: 4}},
		Workloads:    []Workload{{State: "protected"}, {State: "empty"}, {State: "waiting"}, {State: "unprotected", Service: "web", Foreign: "ISTIO_"}},
		Refused:      []Refused{{Service: "web"}, {Service: "api"}, {Service: "db"}},
	}
	m := NewMetrics(func() Status { return status }, func() []Connection { return nil })
	snap := snapshotOf("api")
	snap.Services["api"].IgnoredL7 = []string{"router", "splitter"}
	m.Apply(snap)
	text := scrape(t, m)
	wantSample(t, text, "nodeproxy_unprotected_workloads 2")
	wantSample(t, text, `nodeproxy_foreign_redirects{rule="ISTIO_",source_service="web"} 1`)
	wantSample(t, text, "nodeproxy_refused_claims 3")
	wantSample(t, text, "nodeproxy_unprotected_udp_total 3")
	wantSample(t, text, "nodeproxy_kernel_events_lost_total 4")
	wantSample(t, text, "nodeproxy_dns_answered_total 5")
	wantSample(t, text, "nodeproxy_dns_forwarded_total 6")
	wantSample(t, text, "nodeproxy_dns_failed_total 7")
	wantSample(t, text, `nodeproxy_l7_config_ignored{destination_service="api"} 2`)
	for _, prefix := range []string{"nodeproxy_source_age_seconds 360", `nodeproxy_certificate_expiry_seconds{source_service="web"} 719`} {
		if !strings.Contains(text, prefix) {
			t.Errorf("no %s… in\n%s", prefix, text)
		}
	}
	if strings.Contains(text, `"none"`) {
		t.Error("an expiry for a certificate that does not exist")
	}
}

func TestMetricsServerServesTwoPathsOnly(t *testing.T) {
	m := newTestMetrics()
	srv, err := ListenMetrics("127.0.0.1:0", nil, m, func() error { return errors.New("hung") }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	for path, want := range map[string]int{"/metrics": 200, "/healthz": 503, "/livez": 503, "/": 404, "/debug/pprof/": 404, "/v1/status": 404} {
		resp, err := http.Get("http://" + srv.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestEventsScrapesAndTracesDoNotDisturbEachOther(t *testing.T) {
	access, err := NewAccessLog(slog.New(slog.DiscardHandler), AccessAll)
	if err != nil {
		t.Fatal(err)
	}
	r := Recorder{Hub: NewHub(), Access: access, Metrics: newTestMetrics("web", "api")}
	const workers, each = 4, 200
	var wg sync.WaitGroup
	for w := range uint64(workers) {
		wg.Go(func() {
			for i := range uint64(each) {
				r.Observe(event(EventOpen, 1+w*each+i, "web", "api"))
				r.Observe(event(EventClose, 1+w*each+i, "web", "api"))
			}
		})
		wg.Go(func() {
			for range 5 {
				r.Hub.Subscribe(Filter{}, 1).Close()
				r.Metrics.Apply(snapshotOf("web", "api"))
				scrape(t, r.Metrics)
			}
		})
	}
	wg.Wait()
	text := scrape(t, r.Metrics)
	wantSample(t, text, fmt.Sprintf("nodeproxy_connections_closed_total%s %d", webToAPI, workers*each))
	wantSample(t, text, "nodeproxy_connections_active"+webToAPI+" 0")
}

func TestRecorderTellsAllThree(t *testing.T) {
	access, err := NewAccessLog(slog.New(slog.DiscardHandler), AccessAll)
	if err != nil {
		t.Fatal(err)
	}
	r := Recorder{Hub: NewHub(), Access: access, Metrics: newTestMetrics("web", "api")}
	sub := r.Hub.Subscribe(Filter{}, 1)
	defer sub.Close()
	denied := event(EventDenied, 0, "web", "api")
	denied.Verdict = Denied
	r.Observe(denied)
	if len(sub.Events()) != 1 || len(access.lines) != 1 || len(r.Metrics.series) != 1 {
		t.Errorf("hub %d, access log %d, metrics %d; want 1 each", len(sub.Events()), len(access.lines), len(r.Metrics.series))
	}
}

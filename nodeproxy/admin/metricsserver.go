package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxScrapes is how many are answered at a time; the next gets 503.
const maxScrapes = 4

// MetricsServer serves /metrics, /healthz and /livez, and nothing else, over plain HTTP.
type MetricsServer struct {
	address string
	ln      net.Listener
	socket  *net.TCPListener // of ln
	srv     *http.Server
}

// ListenMetrics binds address, or takes over inherited, which is bound to it. /livez answers 200 while alive returns nil. The caller
// calls Serve, or Close if it never gets that far.
func ListenMetrics(address string, inherited *os.File, m *Metrics, alive func() error, log *slog.Logger) (*MetricsServer, error) {
	ln, err := listenTCP(address, inherited)
	if err != nil {
		return nil, fmt.Errorf("listen on admin.metrics %s: %w (set admin.metrics to another address, or to \"\" for none)", address, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/", m.Handler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		if err := alive(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	guarded := &guardedListener{Listener: ln, log: log, max: maxClients}
	return &MetricsServer{address: address, ln: guarded, socket: ln.(*net.TCPListener), srv: &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      3 * writeTimeout,
		IdleTimeout:       3 * idleTimeout, // longer than a scrape interval
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}}, nil
}

func listenTCP(address string, inherited *os.File) (net.Listener, error) {
	if inherited == nil {
		return net.Listen("tcp", address)
	}
	defer inherited.Close()
	return net.FileListener(inherited)
}

// File is the socket, for the daemon to which this one hands over.
func (s *MetricsServer) File() syscall.Conn { return s.socket }

// Address is what ListenMetrics was asked to bind.
func (s *MetricsServer) Address() string { return s.address }

// Addr is the bound address.
func (s *MetricsServer) Addr() net.Addr { return s.ln.Addr() }

// Close gives up the address of a MetricsServer that does not serve.
func (s *MetricsServer) Close() error { return s.ln.Close() }

// Serve answers until ctx ends.
func (s *MetricsServer) Serve(ctx context.Context) error { return serve(ctx, s.srv, s.ln) }

// Handler answers /metrics in Prometheus' formats, and /healthz: 200 once the node has a snapshot to serve from.
func (m *Metrics) Handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newCollector(m))
	metrics := promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if s := m.status(); s.Source.Generation == 0 {
			http.Error(w, "no snapshot yet: "+s.Source.Error, http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	return mux
}

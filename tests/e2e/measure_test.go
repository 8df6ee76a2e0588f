package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/meshlab"
)

// tracer reads what a node's trace shows from the moment it was made.
type tracer struct {
	t      *testing.T
	events chan admin.Connection
}

// traced follows a node's trace until the test ends. Nothing that happens after it returns is missed.
func (m *mesh) traced(node int) *tracer {
	m.t.Helper()
	conn, err := net.Dial("unix", m.Daemons[node].Socket())
	m.must(err)
	_, err = io.WriteString(conn, "GET /v1/trace HTTP/1.1\r\nHost: nodeproxy\r\n\r\n")
	m.must(err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // answered once the daemon has subscribed us
	m.must(err)
	tr := &tracer{t: m.t, events: make(chan admin.Connection, 1<<16)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for dec := json.NewDecoder(resp.Body); ; {
			var c admin.Connection
			if dec.Decode(&c) != nil {
				return
			}
			tr.events <- c
		}
	}()
	m.t.Cleanup(func() { conn.Close(); <-done; resp.Body.Close() })
	return tr
}

// await waits for an event that match accepts. Those before it are not seen again.
func (tr *tracer) await(what string, match func(admin.Connection) bool) admin.Connection {
	tr.t.Helper()
	var seen []admin.Connection
	for deadline := time.After(patience); ; {
		select {
		case c := <-tr.events:
			if match(c) {
				return c
			}
			seen = append(seen, c)
		case <-deadline:
			tr.t.Fatalf("the trace shows no %s; it shows %+v", what, seen)
		}
	}
}

// denials is the sum of a node's counter of denials for a reason.
func (m *mesh) denials(node int, reason catalog.Reason) float64 {
	m.t.Helper()
	return m.metric(node, "nodeproxy_denied_total", fmt.Sprintf("reason=%q", reason))
}

// metric sums the series of a metric whose labels contain all of labels.
func (m *mesh) metric(node int, name string, labels ...string) float64 {
	m.t.Helper()
	text, err := scrape(m.ctx(), m.Daemons[node])
	m.must(err)
	return sum(text, name, labels...)
}

// series lists the series of a metric that are not 0.
func (m *mesh) series(node int, name string) string {
	m.t.Helper()
	text, err := scrape(m.ctx(), m.Daemons[node])
	m.must(err)
	var all strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, name+"{") && !strings.HasSuffix(line, " 0\n") {
			all.WriteString(line)
		}
	}
	return all.String()
}

func sum(text, name string, labels ...string) (total float64) {
lines:
	for line := range strings.Lines(text) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if found, _, _ := strings.Cut(series, "{"); found != name {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(series, label) {
				continue lines
			}
		}
		v, _ := strconv.ParseFloat(value, 64)
		total += v
	}
	return total
}

// scrape reads the daemon's metrics from inside its node.
func scrape(ctx context.Context, d *meshlab.Daemon) (string, error) {
	conn, err := d.Node.Namespace.Dial(ctx, "tcp", "127.0.0.1:20210")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:20210/metrics", nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// footprint is what a daemon holds on to when no connection is open, but for the tunnels that it keeps ready: status counts
// them, each has one socket, and an inbound one a goroutine.
type footprint struct {
	files      int
	goroutines int
	entries    map[string]int // by map
}

func measure(ctx context.Context, d *meshlab.Daemon) (*footprint, error) {
	status, err := d.Admin().Status(ctx)
	if err != nil {
		return nil, err
	}
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(d.Process.PID()), "fd"))
	if err != nil {
		return nil, err
	}
	ready := status.Connections.Tunnels
	f := &footprint{
		files: len(files) - ready.Outbound - ready.Inbound, goroutines: status.Goroutines - ready.Inbound,
		entries: make(map[string]int),
	}
	for _, m := range status.Kernel.Maps {
		// What was asked once is kept as long as the namespace; grants follow the intentions, whatever connects.
		if m.Name != "dns_resolvers" && m.Name != "grants" {
			f.entries[m.Name] = m.Entries
		}
	}
	return f, nil
}

// exceeds says what of f is more than in base.
func (f *footprint) exceeds(base *footprint) error {
	var errs []error
	if f.files > base.files {
		errs = append(errs, fmt.Errorf("%d file descriptors, %d before", f.files, base.files))
	}
	if f.goroutines > base.goroutines {
		errs = append(errs, fmt.Errorf("%d goroutines, %d before", f.goroutines, base.goroutines))
	}
	for name, n := range f.entries {
		if n > base.entries[name] {
			errs = append(errs, fmt.Errorf("%d entries in map %s, %d before", n, name, base.entries[name]))
		}
	}
	return errors.Join(errs...)
}

// awaitBaseline asserts that a daemon lets go of all that its connections took, once their clients are gone.
func (m *mesh) awaitBaseline(ctx context.Context, node int) {
	var last error
	m.eventually("the daemon of "+m.Nodes[node].Name+" is back at its baseline", func() error {
		now, err := measure(ctx, m.Daemons[node])
		if ctx.Err() != nil {
			return last // which says more than that time is up
		}
		last = err
		if err == nil {
			last = m.comparable(now).exceeds(m.baselines[node])
		}
		return last
	})
}

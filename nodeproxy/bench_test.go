package nodeproxy

import (
	"io"
	"log/slog"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

// quietly keeps no events and lifts the limits.
func quietly(c *Config, _ *fakeKernel) {
	c.Observer = discard{}
	c.Limits.Connections, c.Limits.PerWorkload = 100000, 50000
}

func overBothPaths(b *testing.B, benchmark func(*testing.B, option)) {
	b.Run("mtls", func(b *testing.B) { benchmark(b, func(*Config, *fakeKernel) {}) })
	b.Run("tunnel", func(b *testing.B) { benchmark(b, tunnelled) })
}

// BenchmarkRoundTrip is a request of 128 bytes and its answer through both proxies of a mesh connection, which both run
// in this process.
func BenchmarkRoundTrip(b *testing.B) { overBothPaths(b, benchmarkRoundTrip) }

func benchmarkRoundTrip(b *testing.B, path option) {
	client, server := newMesh(b, quietly, path).pair()
	go io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server})
	request := make([]byte, 128)
	b.ReportAllocs()
	defer reportCPU(b)()
	for b.Loop() {
		if _, err := client.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, request); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkConnect opens a connection through both proxies, passes a request and its answer, and closes it.
func BenchmarkConnect(b *testing.B) { overBothPaths(b, benchmarkConnect) }

func benchmarkConnect(b *testing.B, path option) {
	m := newMesh(b, quietly, path)
	at := m.echo()
	b.ReportAllocs()
	defer reportCPU(b)()
	for b.Loop() {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			b.Fatal(err)
		}
		say(b, conn, "ping")
		hear(b, conn, "ping")
		conn.Close()
	}
}

// BenchmarkIdleConnection reports the memory that one idle connection takes on both proxies together.
func BenchmarkIdleConnection(b *testing.B) { overBothPaths(b, benchmarkIdleConnection) }

func benchmarkIdleConnection(b *testing.B, path option) {
	m := newMesh(b, quietly, path)
	at := m.echo()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var held []net.Conn
	for b.Loop() {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			b.Fatal(err)
		}
		say(b, conn, "ping")
		hear(b, conn, "ping")
		held = append(held, conn)
	}
	m.rest(len(held))
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := after.HeapInuse + after.StackInuse - before.HeapInuse - before.StackInuse
	b.ReportMetric(float64(used)/float64(b.N), "B/connection")
	b.ReportMetric(float64(after.StackInuse-before.StackInuse)/float64(b.N), "stack-B/connection")
	for _, conn := range held {
		conn.Close()
	}
}

// BenchmarkDirect is what the daemon does for a connection that does not pass it.
func BenchmarkDirect(b *testing.B) {
	access, err := admin.NewAccessLog(slog.New(slog.DiscardHandler), admin.AccessDenied)
	if err != nil {
		b.Fatal(err)
	}
	metrics := admin.NewMetrics(nil, nil)
	m := newMesh(b, func(c *Config, _ *fakeKernel) {
		c.Observer = &admin.Recorder{Hub: admin.NewHub(), Access: access, Metrics: metrics}
	})
	m.rule(policy.Allow)
	m.publish()
	metrics.Apply(&m.next)
	b.ReportAllocs()
	defer reportCPU(b)()
	for id := uint64(1); b.Loop(); id++ {
		d := directEvent(id)
		m.proxy.Direct(d)
		d.Stage, d.Sent, d.Received = workload.DirectClosed, 3, 4
		m.proxy.Direct(d)
	}
}

// echo is the outbound address of an application that answers with what it gets.
func (m *mesh) echo() string {
	m.instance("api", "api-1", m.echoing())
	m.publish()
	return m.origin(apiVIP())
}

// echoing is where an application listens that answers with what it gets.
func (m *mesh) echoing() string {
	ln := m.listen()
	m.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}, make([]byte, 512))
			}()
		}
	}()
	return ln.Addr().String()
}

type discard struct{}

func (discard) Observe(admin.Connection) {}

// reportCPU makes a benchmark report the processor time of this process too: it depends less on what else the machine does.
// What it returns ends the measurement.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

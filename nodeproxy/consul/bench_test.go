package consul_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"runtime"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/consul"
	"nodeproxy.io/nodeproxy/mtls"
	lab "nodeproxy.io/tests/consul"
)

// BenchmarkDecision decides on a connection and finds the certificate to answer it with: from the snapshot in memory, and as
// a proxy does that asks the agent each time. Then it reports what a service of this node takes.
func BenchmarkDecision(b *testing.B) {
	const services, sources = 1000, 10 // intentions of each service
	w := newWorld(b, lab.Config{HCL: "log_level = \"ERR\"\nlimits {\n  http_max_conns_per_client = 1000\n}\nconnect {\n  enabled = true\n  ca_config {\n    csr_max_per_second = 1000\n  }\n}\n"})
	w.config.Log = slog.New(slog.DiscardHandler)
	name := func(i int) string { return fmt.Sprintf("service-%d", i) }
	var names []string
	for i := range services {
		names = append(names, name(i))
		// Without a sidecar of the operator's: for each of those the agent makes the configuration of an Envoy.
		w.must(w.agent.Register(w.ctx(), map[string]any{"Name": name(i), "ID": name(i) + "-1", "Address": fmt.Sprintf("10.1.%d.%d", i/200, 2+i%200), "Port": 8080}))
		actions := make(map[string]string)
		for j := range sources {
			actions[name((i+j+1)%services)] = []string{"allow", "deny"}[j%2]
		}
		w.must(w.agent.Intentions(w.ctx(), name(i), actions))
	}

	before := heap()
	w.run(names...)
	snap := w.await("everything is known", func(s *catalog.Snapshot) error {
		if len(s.Leaves) != services || len(s.Services) < services {
			return fmt.Errorf("%d certificates and %d services are", len(s.Leaves), len(s.Services))
		}
		for i := range services {
			if !s.Policy.Decide(s.Identity(name((i+1)%services)), name(i)).Allowed || s.Policy.Decide(s.Identity(name((i+2)%services)), name(i)).Allowed {
				return fmt.Errorf("the intentions of %s are not", name(i))
			}
		}
		return nil
	})
	credentials := mtls.New(snap, snap.Leaves)

	b.Run("in memory", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			service := i % services
			if !snap.Policy.Decide(snap.Identity(name((service+1)%services)), name(service)).Allowed {
				b.Fatal("it is denied")
			}
			if _, err := credentials.Leaf(name(service)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("from the agent", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			service := i % services
			var answer struct{ Authorized bool }
			w.must(w.agent.Do(b.Context(), http.MethodPost, "/v1/agent/connect/authorize", map[string]string{
				"Target": name(service), "ClientCertURI": snap.Identity(name((service + 1) % services)).String(), "ClientCertSerial": "01",
			}, &answer))
			if !answer.Authorized {
				b.Fatal("it is denied")
			}
			var leaf struct{ CertPEM, PrivateKeyPEM string }
			w.must(w.agent.Do(b.Context(), http.MethodGet, "/v1/agent/connect/ca/leaf/"+name(service), nil, &leaf))
			if _, err := tls.X509KeyPair([]byte(leaf.CertPEM), []byte(leaf.PrivateKeyPEM)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("memory", func(b *testing.B) {
		w.forget()
		used := heap() - before
		copies := make([]tls.Certificate, 0, services)
		without := heap()
		for b.Loop() {
			copies = copies[:0]
			for _, leaf := range snap.Leaves {
				copies = append(copies, w.again(leaf))
			}
		}
		certificates := heap() - without
		runtime.KeepAlive(copies)
		b.ReportMetric(float64(certificates)/services, "B/certificate")
		b.ReportMetric(float64(used-certificates)/services, "B/service")
	})
	w.stop()
}

// BenchmarkServiceMemory reports what a service of this node takes beside its certificate: one whose sidecar is the
// operator's and taken over, and one that has none, for which one is registered.
func BenchmarkServiceMemory(b *testing.B) {
	b.Run("adopted", func(b *testing.B) { serviceMemory(b, true) })
	b.Run("registered", func(b *testing.B) { serviceMemory(b, false) })
}

func serviceMemory(b *testing.B, adopted bool) {
	const services, sources = 100, 10
	ctx := b.Context() // each of the world's own would count, to its end
	w := newWorld(b, lab.Config{HCL: "log_level = \"ERR\"\nconnect {\n  enabled = true\n  ca_config {\n    csr_max_per_second = 1000\n  }\n}\n"})
	w.config.Log = slog.New(slog.DiscardHandler)
	w.config.StateFile, w.config.Ports = filepath.Join(b.TempDir(), "state.json"), consul.Ports{First: 22000, Last: 22000 + services}
	var names []string
	add := func() {
		name := fmt.Sprintf("service-%d", len(names))
		registration := lab.Service(name, name+"-1", fmt.Sprintf("10.1.0.%d", 2+len(names)), 8080)
		if !adopted {
			delete(registration, "Connect")
		}
		names = append(names, name)
		w.must(w.agent.Register(ctx, registration))
		actions := make(map[string]string)
		for j := range sources {
			actions[fmt.Sprintf("service-%d", len(names)+j)] = "allow"
		}
		w.must(w.agent.Intentions(ctx, name, actions))
	}
	settled := func() {
		w.await("everything is registered and known", func(s *catalog.Snapshot) error {
			var local map[string]any
			w.must(w.agent.Do(ctx, http.MethodGet, "/v1/agent/services", nil, &local))
			if len(s.Leaves) != len(names) || len(local) != 2*len(names)+1 { // and the daemon
				return fmt.Errorf("%d certificates and %d registrations are", len(s.Leaves), len(local))
			}
			for _, inst := range s.LocalInstances() {
				if !inst.Mesh.IsValid() {
					return fmt.Errorf("%s has no sidecar", inst.ID)
				}
			}
			return nil
		})
		w.forget()
	}
	add()
	w.run(names...)
	settled()
	before := heap()
	for range services {
		add()
	}
	w.source.Need(names)
	settled()
	snap, used := w.current(), heap()
	for b.Loop() {
		used = min(used, heap()) // an answer may be under way
	}
	for range 10 {
		used = min(used, heap())
	}
	without := heap()
	var copies []tls.Certificate
	for _, leaf := range snap.Leaves {
		copies = append(copies, w.again(leaf))
	}
	certificates := heap() - without
	runtime.KeepAlive(copies)
	b.ReportMetric(float64(certificates)/services, "B/certificate")
	b.ReportMetric(float64(used-before-certificates)/services, "B/service")
	w.stop()
}

// forget lets go of all snapshots but the last.
func (w *world) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = nil
}

// again reads a certificate and its key once more, so that nothing is shared.
func (w *world) again(cert *tls.Certificate) (own tls.Certificate) {
	w.t.Helper()
	for _, der := range cert.Certificate {
		own.Certificate = append(own.Certificate, bytes.Clone(der))
	}
	var err error
	own.Leaf, err = x509.ParseCertificate(own.Certificate[0])
	w.must(err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	w.must(err)
	own.PrivateKey, err = x509.ParsePKCS8PrivateKey(key)
	w.must(err)
	return own
}

// heap is what is in use once the garbage is collected.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

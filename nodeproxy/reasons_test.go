package nodeproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/policy"
)

// refused wants the connection to be reset, one denied event with the reason, and no application connected to.
func (m *mesh) refused(at string, direction admin.Direction, reason catalog.Reason) admin.Connection {
	m.t.Helper()
	m.wantRefused(at)
	e := m.events.wait(m.t, "denied "+string(direction), is(admin.EventDenied, direction))
	if e.Reason != reason || e.Verdict != admin.Denied || e.Detail == "" || e.Path != admin.PathNone {
		m.t.Fatalf("got %+v, want reason %s", e, reason)
	}
	return e
}

func (m *mesh) neverDelivered() {
	m.t.Helper()
	if n := m.kernel.deliveries(); n != 0 {
		m.t.Fatalf("the application was dialled %d times", n)
	}
}

// silent is an address where nothing listens.
func (m *mesh) silent() netip.AddrPort {
	ln := m.listen()
	defer ln.Close()
	return addrPort(ln.Addr())
}

func TestOutboundRefusals(t *testing.T) {
	tests := []struct {
		name  string
		setup func(m *mesh) (at string)
		want  catalog.Reason
	}{
		{"the intention denies", func(m *mesh) string {
			m.rule(policy.Deny)
			m.instance("api", "api-1", m.silent().String())
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonIntention},
		{"no origin", func(m *mesh) string {
			m.publish()
			return m.serve(func(h workload.Handler, ln *net.TCPListener) { h.ServeOutbound(&workload.Namespace{}, ln) }).String()
		}, catalog.ReasonUnknownOrigin},
		{"no service", func(m *mesh) string {
			m.publish()
			return m.origin(netip.MustParseAddrPort("240.0.0.99:80"))
		}, catalog.ReasonUnknownService},
		{"an instance's address with another port", func(m *mesh) string {
			inst := m.remote("api-1", m.silent())
			m.publish()
			return m.origin(netip.AddrPortFrom(inst.Address.Addr(), 1))
		}, catalog.ReasonUnknownService},
		{"no instance", func(m *mesh) string {
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonNoInstance},
		{"no healthy instance", func(m *mesh) string {
			m.remote("api-1", m.silent()).Healthy = false
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonNoInstance},
		{"no instance that speaks mTLS", func(m *mesh) string {
			inst := m.remote("api-1", netip.AddrPort{})
			inst.Address = netip.MustParseAddrPort("10.0.0.8:80")
			m.publish()
			return m.origin(inst.Address)
		}, catalog.ReasonNoInstance},
		{"nothing listens", func(m *mesh) string {
			m.remote("api-1", m.silent())
			m.remote("api-2", m.silent())
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonConnectFailed},
		{"no leaf", func(m *mesh) string {
			delete(m.next.Leaves, "web")
			m.remote("api-1", m.silent())
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonNoCertificate},
		{"expired leaf", func(m *mesh) string {
			m.next.Leaves["web"] = m.root.Leaf(m.t, spiffe("web"), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
			m.remote("api-1", m.silent())
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonNoCertificate},
		{"the address belongs to another service now", func(m *mesh) string {
			m.remote("api-1", m.tlsServer(&tls.Config{Certificates: []tls.Certificate{*m.leaf("web")}, ClientAuth: tls.RequireAnyClientCert}))
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonPeerIdentity},
		{"the peer speaks no TLS", func(m *mesh) string {
			a := m.app()
			go func() {
				if conn, ok := <-a.conns; ok {
					io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
					conn.Close()
				}
			}()
			m.remote("api-1", addrPort(a.ln.Addr()))
			m.publish()
			return m.origin(apiVIP())
		}, catalog.ReasonHandshakeFailed},
		{"no snapshot yet", func(m *mesh) string { return m.origin(apiVIP()) }, catalog.ReasonNotReady},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t)
			e := m.refused(tt.setup(m), admin.Outbound, tt.want)
			m.neverDelivered()
			if tt.want != catalog.ReasonUnknownOrigin && e.Source.Workload != "/cg/web" {
				t.Errorf("the event does not name the workload: %+v", e)
			}
			if s := m.proxy.Status(); s.Connections.Denied != 1 || s.Connections.Opened != 0 {
				t.Errorf("counted %+v", s.Connections)
			}
		})
	}
}

// tlsServer is a peer that is not ours: it does a handshake with everyone and holds the connection.
func (m *mesh) tlsServer(config *tls.Config) netip.AddrPort {
	ln := m.listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			tls.Server(m.owned(conn), config).Handshake()
		}
	}()
	m.t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return addrPort(ln.Addr())
}

// peer is a Connect client that is not ours.
func (m *mesh) peer(at netip.AddrPort, leaf *tls.Certificate) *tls.Conn {
	m.t.Helper()
	conn, err := m.tryPeer(at, leaf)
	if err != nil {
		m.t.Fatal(err)
	}
	return conn
}

func (m *mesh) tryPeer(at netip.AddrPort, leaf *tls.Certificate) (*tls.Conn, error) {
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if leaf != nil {
		config.Certificates = []tls.Certificate{*leaf}
	}
	raw, err := net.DialTimeout("tcp", at.String(), patience)
	if err != nil {
		return nil, err
	}
	return tls.Client(m.owned(raw), config), nil
}

func TestInboundRefusals(t *testing.T) {
	stranger := mtlstest.NewRoot(t)
	tests := []struct {
		name  string
		setup func(m *mesh)
		leaf  func(m *mesh) *tls.Certificate
		want  catalog.Reason
	}{
		{"the intention denies", func(m *mesh) { m.rule(policy.Deny) }, nil, catalog.ReasonIntention},
		{"no client certificate", nil, func(*mesh) *tls.Certificate { return nil }, catalog.ReasonHandshakeFailed},
		{"a stranger's certificate", nil, func(m *mesh) *tls.Certificate { return stranger.Leaf(m.t, spiffe("web")) }, catalog.ReasonPeerIdentity},
		{"no leaf of our own", func(m *mesh) { delete(m.next.Leaves, "api") }, nil, catalog.ReasonNoCertificate},
		{"no instance at the address", func(m *mesh) { m.kernel.forget() }, nil, catalog.ReasonUnknownWorkload},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t)
			at := m.instance("api", "api-1", m.silent().String()).Mesh
			if tt.setup != nil {
				tt.setup(m)
			}
			m.publish()
			leaf := m.leaf("web")
			if tt.leaf != nil {
				leaf = tt.leaf(m)
			}
			conn, err := m.tryPeer(at, leaf)
			if err == nil {
				_, err = conn.Write([]byte("secret"))
			}
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
			if err == nil || errors.Is(err, io.EOF) {
				t.Errorf("the peer got %v, want to see that it is refused", err)
			}
			e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
			if e.Reason != tt.want || e.Detail == "" {
				t.Fatalf("got %+v, want reason %s", e, tt.want)
			}
			m.neverDelivered()
		})
	}
}

func TestInboundWithoutASnapshotIsNotReady(t *testing.T) {
	m := newMesh(t)
	at := m.instance("api", "api-1", m.silent().String()).Mesh
	m.refused(at.String(), admin.Inbound, catalog.ReasonNotReady)
}

func TestDeliveryRefusals(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want catalog.Reason
	}{
		{"not the workload's", refuse(catalog.ReasonNotTheWorkloads, "dial 127.0.0.1:80: its listener is another cgroup's"), catalog.ReasonNotTheWorkloads},
		{"refused by the application", syscall.ECONNREFUSED, catalog.ReasonDeliveryFailed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, func(_ *Config, k *fakeKernel) {
				k.deliver = func(context.Context, *workload.Served, netip.AddrPort) (net.Conn, error) { return nil, tt.err }
			})
			m.instance("api", "api-1", "")
			m.publish()
			m.wantRefused(m.origin(apiVIP()))
			e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
			if e.Reason != tt.want || !strings.Contains(e.Detail, tt.err.Error()) || e.Source.Identity != spiffe("web") {
				t.Errorf("got %+v, want reason %s", e, tt.want)
			}
		})
	}
}

// With TLS 1.3 the destination refuses our certificate after our side of the handshake is done.
func TestLateRefusalOfOurCertificateHasAReason(t *testing.T) {
	m := newMesh(t)
	m.remote("api-1", m.tlsServer(&tls.Config{
		Certificates: []tls.Certificate{*m.leaf("api")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: x509.NewCertPool(),
	}))
	m.publish()
	m.wantRefused(m.origin(apiVIP()))
	e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound))
	if e.Reason != catalog.ReasonHandshakeFailed || e.Verdict != admin.Denied || !strings.Contains(e.Detail, "refused") {
		t.Fatalf("%+v", e)
	}
}

func TestAPanicEndsItsOwnConnectionOnly(t *testing.T) {
	var mistake atomic.Bool
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.deliver = func(ctx context.Context, s *workload.Served, _ netip.AddrPort) (net.Conn, error) {
			if mistake.Load() {
				panic("mistake")
			}
			return dialTCP(ctx, k.app(s.Instance))
		}
	})
	client, server := m.pair()
	mistake.Store(true)
	m.wantRefused(m.origin(apiVIP()))
	e := m.events.wait(t, "denied", is(admin.EventDenied, admin.Inbound))
	if !strings.Contains(e.Detail, "mistake") || e.Reason == "" {
		t.Errorf("%+v", e)
	}
	say(t, client, "still here")
	hear(t, server, "still here")
}

package nodeproxy

import (
	"crypto/fips140"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
)

func TestCarriesAConnectionAndTellsOfIt(t *testing.T) {
	m := newMesh(t)
	client, server := m.pair()
	say(t, client, "ping")
	hear(t, server, "ping")
	say(t, server, "answer")
	hear(t, client, "answer")
	client.CloseWrite()
	wantEOF(t, server)
	server.Close()
	wantEOF(t, client)

	out := m.events.wait(t, "close of the outbound connection", is(admin.EventClose, admin.Outbound))
	in := m.events.wait(t, "close of the inbound connection", is(admin.EventClose, admin.Inbound))
	for _, e := range []admin.Connection{out, in} {
		if e.Sent != 4 || e.Received != 6 || e.Verdict != admin.Allowed || e.Reason != "" || e.Path != admin.PathMTLS || e.Generation != 1 || e.Sequence == 0 || e.Detail != "" {
			t.Errorf("%+v", e)
		}
		if e.Source.Identity != spiffe("web") || e.Source.Service != "web" || e.Destination.Service != "api" || e.Destination.Instance != "api-1" {
			t.Errorf("%+v", e)
		}
		if e.Handshake <= 0 || e.Handshake > e.Duration {
			t.Errorf("handshake %s of %s", e.Handshake, e.Duration)
		}
	}
	mesh := m.next.Services["api"].Instances[0].Mesh.String()
	wantOut := admin.Endpoint{Service: "api", Instance: "api-1", Identity: spiffe("api"), Address: "240.0.0.1:80", Peer: mesh}
	if out.Destination != wantOut {
		t.Errorf("destination %+v, want %+v", out.Destination, wantOut)
	}
	wantSource := admin.Endpoint{Service: "web", Identity: spiffe("web"), Address: "10.0.0.7:4711", Workload: "/cg/web", PID: 99, Comm: "curl"}
	if out.Source != wantSource {
		t.Errorf("source %+v, want %+v", out.Source, wantSource)
	}
	if in.Destination.Address != mesh || in.Destination.Workload != "/cg/api" || in.Destination.Peer != server.LocalAddr().String() {
		t.Errorf("destination %+v", in.Destination)
	}
	if got := m.kernel.clients; len(got) != 1 || got[0].String() != in.Source.Address || got[0].Addr() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("the application sees %v, want the address of the TCP peer %s", got, in.Source.Address)
	}
}

// The validated module makes the nonces of records itself.
func TestWithFIPS140RecordsStayWithCryptoTLS(t *testing.T) {
	if !fips140.Enabled() {
		self := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		self.Env = append(os.Environ(), "GODEBUG=fips140=only")
		if out, err := self.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	m := newMesh(t, tunnelled)
	client, server := m.pair()
	say(t, client, "ping")
	hear(t, server, "ping")
	say(t, server, "answer")
	hear(t, client, "answer")
	client.CloseWrite()
	wantEOF(t, server)
	server.Close()
	wantEOF(t, client)
	if e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound)); e.Path != admin.PathMTLS || e.Detail != "" {
		t.Errorf("%+v", e)
	}
}

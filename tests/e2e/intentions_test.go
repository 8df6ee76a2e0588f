package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/tunnel"
	"nodeproxy.io/tests/meshlab"
)

func TestAnIntentionFlipCutsLiveConnectionsInBothDirections(t *testing.T) {
	m := newMesh(t)
	a, b := m.place(0, "a"), m.place(1, "b")
	m.allow("a", "b")
	m.allow("b", "a")
	m.start()
	streams := map[string]func() string{}
	for name, client := range map[string]func() string{
		"a downloads from b": m.background(a, "a line", m.vip("b"), "stream"),
		"b downloads from a": m.background(b, "a line", m.vip("a"), "stream"),
		"a is idle":          m.background(a, "held", m.vip("b"), "hold"),
		"b is idle":          m.background(b, "held", m.vip("a"), "hold"),
		"a uploads to b":     m.background(a, "connected", "-payload", "1000000000000", m.vip("b"), "sum"),
	} {
		streams[name] = client
	}
	written := time.Now()
	m.deny("a", "b")
	m.deny("b", "a")
	for name, ended := range streams {
		out := ended()
		if !strings.Contains(out, "end: reset") && !strings.Contains(out, "send: ") {
			t.Errorf("%s: the connection is not reset: %.200s", name, out)
		}
	}
	t.Logf("all were cut within %v", time.Since(written))
	m.getsNothing(a, m.vip("b"))
	m.getsNothing(b, m.vip("a"))
}

// background starts a client and returns a function that waits for its end.
func (m *mesh) background(w workload, text string, args ...string) func() string {
	p := m.startDial(w, text, args...)
	return func() string {
		m.t.Helper()
		if err := p.Wait(m.ctx()); err != nil {
			m.t.Error(err)
		}
		return p.Output()
	}
}

// TestTheServersNodeEnforcesIntentionsByItself dials a mesh port with certificates of the mesh, as from a node that enforces
// nothing.
func TestTheServersNodeEnforcesIntentionsByItself(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	server := m.serve(api, fmt.Sprintf(":%d", port))
	m.allow("api", "web")
	m.start()
	at, root := m.mesh(0, "api"), mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	refused := func(service string) {
		t.Helper()
		before := m.denials(1, catalog.ReasonIntention)
		if _, answer, err := m.meet(web, at, root.Leaf(t, spiffe(root, service).String())); answer != "" || err == nil {
			t.Errorf("%s got %q", service, answer)
		}
		m.comesToDenials(1, catalog.ReasonIntention, before+1)
	}
	refused("batch")
	if strings.Contains(server.Output(), "accepted") {
		t.Errorf("the application has accepted: %s", server.Output())
	}
	raw, err := web.Namespace.Dial(m.ctx(), "tcp", at)
	m.must(err)
	defer raw.Close()
	m.must(raw.SetDeadline(time.Now().Add(patience)))
	live := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*root.Leaf(t, spiffe(root, "web").String())}})
	_, err = io.WriteString(live, "hold\n")
	m.must(err)
	answer := make([]byte, 512)
	if n, err := live.Read(answer); !strings.Contains(string(answer[:n]), "held") {
		t.Fatalf("web got %q, %v", answer[:n], err)
	}
	m.deny("api", "web")
	if n, err := live.Read(answer); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the live connection got %q, %v", answer[:n], err)
	}
	m.awaitGeneration(1)
	refused("web")
}

// TestTheServersNodeEnforcesIntentionsByItselfForEachStreamOfATunnel opens streams over one tunnel, as a node that enforces
// nothing would.
func TestTheServersNodeEnforcesIntentionsByItselfForEachStreamOfATunnel(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	api, err := m.Place(1, "api", port)
	m.must(err)
	server := m.serve(api, fmt.Sprintf(":%d", port))
	m.allow("api", "web")
	m.start()
	root := mtlstest.Read(t, filepath.Join(m.MeshD, "ca"))
	raw, err := web.Namespace.Dial(m.ctx(), "tcp", m.mesh(0, "api"))
	m.must(err)
	defer raw.Close()
	m.must(raw.SetDeadline(time.Now().Add(3 * patience)))
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{tunnel.ALPN}, Certificates: []tls.Certificate{*root.Leaf(t, spiffe(root, "web").String())},
	})
	m.must(conn.Handshake())
	if got := conn.ConnectionState().NegotiatedProtocol; got != tunnel.ALPN {
		t.Fatalf("the ALPN is %q", got)
	}
	send := func(h tunnel.Header, body []byte) {
		t.Helper()
		frame := make([]byte, tunnel.HeaderSize, tunnel.HeaderSize+len(body))
		h.Length = len(body)
		h.Put(frame)
		_, err := conn.Write(append(frame, body...))
		m.must(err)
	}
	receive := func() (tunnel.Type, string) {
		t.Helper()
		frame := make([]byte, tunnel.HeaderSize)
		_, err := io.ReadFull(conn, frame)
		m.must(err)
		h, err := tunnel.ParseHeader(frame)
		m.must(err)
		body := make([]byte, h.Length)
		_, err = io.ReadFull(conn, body)
		m.must(err)
		return h.Type, string(body)
	}
	stream := uint32(0)
	open := func() (tunnel.Type, string) {
		t.Helper()
		stream++
		body := make([]byte, tunnel.OpeningSize)
		tunnel.Opening{ID: tunnel.ID{byte(stream)}, Source: netip.MustParseAddrPort(raw.LocalAddr().String())}.Put(body)
		send(tunnel.Header{Type: tunnel.Open, Stream: stream}, append(body, "peer\n"...))
		return receive()
	}
	answered := func() {
		t.Helper()
		if got, body := open(); got != tunnel.Accepted {
			t.Fatalf("an allowed opening is answered by %s %q", got, body)
		}
		if got, body := receive(); got != tunnel.Data || !strings.Contains(body, "accept=") {
			t.Fatalf("the answer is %s %q", got, body)
		}
		if got, body := receive(); got != tunnel.End {
			t.Fatalf("the answer is followed by %s %q", got, body)
		}
		send(tunnel.Header{Type: tunnel.End, Stream: stream}, nil)
	}
	answered()
	m.deny("api", "web")
	m.awaitGeneration(1)
	if got, body := open(); got != tunnel.Refused || body != string(catalog.ReasonIntention) {
		t.Fatalf("a denied opening is answered by %s %q", got, body)
	}
	if n := strings.Count(server.Output(), "accepted"); n != 1 {
		t.Errorf("the application has accepted %d connections, one of them allowed", n)
	}
	m.allow("api", "web")
	m.awaitGeneration(1)
	answered()
}

func TestAFlipOfAnotherPairsIntentionLeavesAConnectionAlone(t *testing.T) {
	m, web, _ := pair(t)
	p := m.startDial(web, "a line", m.vip("api"), "stream")
	m.must(m.Intentions("api", meshlab.Allow("web"), meshlab.Deny("other")))
	m.allow("api", "web", "other")
	m.awaitGeneration(0)
	lines := strings.Count(p.Output(), "a line")
	m.eventually("the stream goes on", func() error {
		if strings.Count(p.Output(), "a line") < lines+20 {
			return errNotYet
		}
		return nil
	})
	m.allow("api", "web")
}

// awaitGeneration waits until a node has in force what the mesh directory says now, by adding an intention of its own. With
// Consul it is intentions alone that are in force then: what it says of services comes by another way.
func (m *mesh) awaitGeneration(node int) {
	m.t.Helper()
	caller := fmt.Sprintf("marker-%d", m.markers.Add(1))
	m.must(m.Intentions("*", meshlab.Deny(caller), meshlab.Deny("*")))
	admins := m.Daemons[node].Admin()
	var generation uint64
	m.eventually("node decides by the newest intention", func() error {
		status, err := admins.Status(m.ctx())
		if err != nil || len(status.Services) == 0 {
			return fmt.Errorf("%w: there is no service: %w", errNotYet, err)
		}
		explanation, err := admins.Explain(m.ctx(), caller, status.Services[0].Name)
		if err != nil {
			return err
		}
		if generation = explanation.Generation; !slices.ContainsFunc(explanation.Considered, func(i string) bool { return strings.HasPrefix(i, caller+" => ") }) {
			return fmt.Errorf("%w: in generation %d %q: %s", errNotYet, generation, explanation.Considered, status.Source.Error)
		}
		return nil
	})
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.Policy.Generation < generation {
			return fmt.Errorf("policy %d is in force, and not %d: %s", s.Policy.Generation, generation, s.Source.Error)
		}
		return nil
	})
	m.must(err)
}

func TestNoVerdictOfAnOlderPolicyFollowsOneOfANewer(t *testing.T) {
	m, web, _ := pair(t)
	traced := m.traced(0)
	const clients, flips = 4, 20
	done := make(chan struct{})
	ended := make(chan error, clients)
	for range clients {
		go func() {
			for {
				select {
				case <-done:
					ended <- nil
					return
				default:
				}
				p, err := web.Start(m.app("dial", m.vip("api"), "peer"))
				if err == nil {
					err = p.Wait(t.Context())
				}
				if err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	for i := range flips {
		if i%2 == 0 {
			m.deny("api", "web")
		} else {
			m.allow("api", "web")
		}
		m.awaitGeneration(0)
	}
	close(done)
	for range clients {
		m.must(<-ended)
	}
	m.reaches(web, m.vip("api"))
	var verdicts []admin.Connection
	traced.await("end of events", func(c admin.Connection) bool {
		if c.Sequence > 0 && c.Event != "close" {
			verdicts = append(verdicts, c)
		}
		return c.Event == "close" && c.Verdict == admin.Allowed && len(verdicts) > 0 && len(traced.events) == 0
	})
	slices.SortFunc(verdicts, func(a, b admin.Connection) int { return int(a.Sequence) - int(b.Sequence) })
	seen := map[admin.Verdict]int{}
	for i, c := range verdicts {
		seen[c.Verdict]++
		if i > 0 && c.Generation < verdicts[i-1].Generation {
			t.Errorf("verdict %d is of policy %d and follows %d of policy %d", c.Sequence, c.Generation, verdicts[i-1].Sequence, verdicts[i-1].Generation)
		}
	}
	if seen[admin.Allowed] == 0 || seen[admin.Denied] == 0 {
		t.Errorf("only one kind of verdict was seen: %v", seen)
	}
}

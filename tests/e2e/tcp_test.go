package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

func TestTCPBehavesAsWithoutAProxy(t *testing.T) { onEveryPath(t, testTCPBehavesAsWithoutAProxy) }

func testTCPBehavesAsWithoutAProxy(t *testing.T, m *mesh, _ admin.Path) {
	web, err := m.Place(0, "web", 0)
	m.must(err)
	m.serve(web, ":8080")
	api, err := m.Place(1, "api", port)
	m.must(err)
	server := m.serve(api, ":8080")
	first, err := m.Place(1, "first", port)
	m.must(err)
	m.serve(first, "-first", ":8080")
	m.allow("api", "web")
	m.allow("first", "web")
	m.start()
	vip := m.vip("api")

	for _, tc := range []struct {
		name   string
		args   []string
		want   []string // of the client
		server string   // of the server
	}{
		{name: "a client that half-closes still gets the answer",
			args: []string{"-half", "-payload", "1000000", vip, "sum"}, want: []string{"sum 1000000 ", "end: eof"}, server: "received 1000000 by sum: eof"},
		{name: "a server that half-closes still gets the rest",
			args: []string{"-half", "-payload", "2000000", vip, "half"}, want: []string{"bye\n", "end: eof"}, server: "received 2000000 by half: eof"},
		{name: "an echo of many segments is whole",
			args: []string{"-half", "-payload", "50000", vip, "echo"}, want: []string{"end: eof"}, server: "received 50000 by echo: eof"},
		{name: "the server may speak first",
			args: []string{"-half", m.vip("first")}, want: []string{"220 hello " + hostPrefix(web.IPv4), "end: eof"}},
		{name: "a client that closes first is seen to close",
			args: []string{"-close", vip, "hold"}, server: "received 0 by hold: eof"},
		{name: "a client's reset arrives as a reset",
			args: []string{"-reset", vip, "hold"}, server: "received 0 by hold: ECONNRESET"},
		{name: "a server's reset arrives as a reset",
			args: []string{vip, "reset"}, want: []string{"end: reset"}},
		{name: "a non-blocking connect",
			args: []string{"-nonblocking", vip, "peer"}, want: []string{"accept=" + hostPrefix(web.IPv4), "end: eof"}},
		{name: "TCP fast open",
			args: []string{"-fastopen", vip, "peer"}, want: []string{"accept=" + hostPrefix(web.IPv4), "end: eof"}},
		{name: "a source bound before connect",
			args: []string{"-bind", at(web.IPv4, 5555), vip, "peer"}, want: []string{"connected local=" + at(web.IPv4, 5555), "accept=" + hostPrefix(web.IPv4), "end: eof"}},
		{name: "the client's peer is what it dialled",
			args: []string{vip, "peer"}, want: []string{"peer=" + vip}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := m.in(t)
			before := strings.Count(server.Output(), tc.server)
			out := m.dial(web, tc.args...)
			for _, want := range tc.want {
				if !strings.Contains(out, want) {
					t.Errorf("the client does not print %q: %s", want, out)
				}
			}
			if tc.server != "" {
				m.eventually("the server prints "+tc.server, func() error {
					if strings.Count(server.Output(), tc.server) == before {
						return errNotYet
					}
					return nil
				})
			}
		})
	}
}

func TestASocketBoundToADeviceIsRefusedWithAReason(t *testing.T) {
	m, web, _ := pair(t)
	traced := m.traced(0)
	if out := m.dial(web, "-device", "eth0", m.vip("api"), "peer"); !strings.Contains(out, "refused: ") {
		t.Errorf("the connection is not refused: %s", out)
	}
	c := traced.await("refusal", func(c admin.Connection) bool { return c.Reason == catalog.ReasonBoundDevice })
	if c.Verdict != admin.Denied || c.Source.Comm != "app" || c.Destination.Address != m.vip("api") {
		t.Errorf("the refusal is traced as %+v", c)
	}
	if n := m.denials(0, catalog.ReasonBoundDevice); n < 1 {
		t.Errorf("the counter says %v", n)
	}
	m.reaches(web, m.vip("api"))
}

// TestAGibibyteGoesBothWaysAtOnceOverEightConnections has every byte come back as it was, and the end after it, from an instance of the
// other node and one of the same.
func TestAGibibyteGoesBothWaysAtOnceOverEightConnections(t *testing.T) {
	onEveryPath(t, func(t *testing.T, m *mesh, between admin.Path) {
		const connections, each = 8, 1 << 27
		web := m.place(0, "web")
		m.place(1, "api")
		m.place(0, "db")
		m.allow("api", "web")
		m.allow("db", "web")
		m.start()
		for service, path := range map[string]admin.Path{"api": between, "db": admin.PathDirect} {
			var all []*netlab.Process
			for range connections {
				p, err := web.Start(m.app("echo", "-half", "-n", strconv.Itoa(each), "-timeout", slowly.String(), m.vip(service)))
				m.must(err)
				t.Cleanup(p.Kill)
				all = append(all, p)
			}
			ctx, cancel := context.WithTimeout(t.Context(), slowly)
			for _, p := range all {
				m.must(p.Wait(ctx))
				if out := p.Output(); out != fmt.Sprintf("echoed %d\n", each) {
					t.Errorf("over %s: %s", path, out)
				}
			}
			cancel()
			if n := m.metric(0, "nodeproxy_connections_opened_total", `destination_service="`+service+`"`, `path="`+string(path)+`"`, `direction="outbound"`); n != connections {
				t.Errorf("%v of %d connections went over %s", n, connections, path)
			}
		}
	})
}

// TestTenThousandConnectionsLeaveNothingBehind opens and closes them on each path; the baselines are looked at in the end.
func TestTenThousandConnectionsLeaveNothingBehind(t *testing.T) {
	onEveryPath(t, func(t *testing.T, m *mesh, between admin.Path) {
		const rounds, each = 100, 100 // many idle tunnels of a key are kept, so some are used again
		web := m.place(0, "web")
		m.place(1, "api")
		m.allow("api", "web")
		m.must(web.Namespace.Sysctl("net/ipv4/ip_local_port_range", "1024 65535"))
		m.start()
		count := func(name string) float64 {
			return m.metric(0, name, `direction="outbound"`, `source_service="web"`)
		}
		for round := range rounds {
			stdin, release, err := os.Pipe()
			m.must(err)
			p, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"hold", "-n", strconv.Itoa(each), m.vip("api")}, Stdin: stdin})
			m.must(err)
			t.Cleanup(p.Kill)
			ctx, cancel := context.WithTimeout(t.Context(), slowly)
			m.must(p.WaitOutput(ctx, "held="))
			cancel()
			m.eventually("all are open, or were refused by a machine that is too busy", func() error {
				opened, denied := count("nodeproxy_connections_opened_total"), count("nodeproxy_denied_total")
				if opened+denied < float64((round+1)*each) {
					return fmt.Errorf("%v were opened and %v denied: %s", opened, denied, m.series(0, "nodeproxy_denied_total"))
				}
				return nil
			})
			m.must(errors.Join(release.Close(), stdin.Close()))
			m.must(p.Wait(m.ctx()))
		}
		if opened := m.metric(0, "nodeproxy_connections_opened_total", `path="`+string(between)+`"`); opened < 0.9*rounds*each {
			t.Errorf("%v of %d were opened over %s", opened, rounds*each, between)
		}
	})
}

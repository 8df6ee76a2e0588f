package e2e

import (
	"fmt"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

func TestAnObservedWorkloadIsOnlyWatched(t *testing.T) {
	m, web, api := labelled(t)
	m.baselines[0] = nil
	traced := m.traced(0)
	expect := func(direction admin.Direction, verdict admin.Verdict, reason catalog.Reason, source, destination string) {
		t.Helper()
		c := traced.await("observation", func(c admin.Connection) bool { return c.Event == admin.EventObserved && c.Direction == direction })
		if c.Verdict != verdict || c.Reason != reason || c.Source.Service != source || c.Destination.Service != destination {
			t.Errorf("observed is %+v, want %s %s of %s to %s", c, verdict, reason, source, destination)
		}
	}
	m.label(web.Cgroup, "service", "web", "mesh", "observe")
	m.awaitWorkload(web.Cgroup, "web", "observed")
	m.reaches(web, at(api.IPv4, port)) // in plaintext, which the permissive api takes
	expect(admin.Outbound, admin.Allowed, "", "web", "api")
	if n := m.metric(0, "nodeproxy_connections_opened_total"); n != 0 {
		t.Errorf("%v connections were carried", n)
	}
	m.getsNothing(web, "-timeout", "2s", "240.99.99.99:80")
	expect(admin.Outbound, admin.Denied, catalog.ReasonUnknownService, "web", "")
	m.deny("api", "web")
	m.awaitGeneration(0)
	m.reaches(web, at(api.IPv4, port))
	expect(admin.Outbound, admin.Denied, catalog.ReasonIntention, "web", "api")
	stranger := m.stranger(0)
	m.reaches(stranger, at(web.IPv4, port))
	expect(admin.Inbound, admin.Denied, catalog.ReasonPlaintext, "", "web")

	if n := m.metric(0, "nodeproxy_observed_total"); n < 4 {
		t.Errorf("%v observations are counted", n)
	}
	for _, reason := range []string{"", "intention"} {
		if m.metric(0, "nodeproxy_observed_total", `source_service="web"`, `destination_service="api"`, fmt.Sprintf("reason=%q", reason)) == 0 {
			t.Errorf("nothing is counted of web and api with reason %q", reason)
		}
	}
	if n := m.metric(0, "nodeproxy_denied_total"); n != 0 {
		t.Errorf("%v denials are counted of what was only watched", n)
	}
	out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"explain", "--observed", "--socket", m.Daemons[0].Socket()}})
	m.must(err)
	for _, part := range []string{"carried", "denied: intention", "denied: unknown-service", "denied: plaintext"} {
		if !strings.Contains(out, part) {
			t.Errorf("explain --observed does not say %q: %s", part, out)
		}
	}

	m.allow("api", "web")
	m.label(web.Cgroup, "mesh", "enabled")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	m.comesToReach(web, m.vip("api"))
	m.getsNothing(stranger, "-timeout", "2s", at(web.IPv4, port))
}

package check

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
)

func TestMain(m *testing.M) {
	if slices.Equal(os.Args[1:], []string{CanaryCommand}) { // the test program started itself
		if err := RunErrands(os.Stdin, os.Stdout); err != nil {
			_, _ = os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var (
	away = errand{through, netip.MustParseAddrPort("240.255.255.255:1")}
	port = errand{plaintext, netip.MustParseAddrPort("10.0.0.5:80")}
	mesh = errand{handshake, netip.MustParseAddrPort("10.0.0.5:21500")}
)

func sample() *canary {
	return &canary{
		workload: &admin.Workload{Service: "web", Cgroup: "/c/web"},
		status:   &admin.Status{Certificates: []admin.Certificate{{Service: "api", Identity: "spiffe://td/svc/api"}, {Service: "web", Identity: "spiffe://td/svc/web"}}},
	}
}

func TestOutboundCanaryIsOKOnlyWhenTheProxyKnowsWhoseItIs(t *testing.T) {
	proxied := &admin.Connection{ID: 7, Source: admin.Endpoint{Workload: "/c/web"}}
	reached := outcome{errand: away, Connected: true, Closed: true, Peer: away.To}
	if wrong := sample().judgeOutbound(reached, proxied); wrong != "" {
		t.Errorf("all is well, and it says: %s", wrong)
	}
	for complaint, is := range map[string]struct {
		outcome outcome
		event   *admin.Connection
	}{
		"refused by the kernel (not-ready":   {outcome{errand: away, Refused: true}, &admin.Connection{Reason: catalog.ReasonNotReady, Source: admin.Endpoint{Workload: "/c/web"}}},
		"taken for one of /c/web/inner":      {reached, &admin.Connection{ID: 7, Source: admin.Endpoint{Workload: "/c/web/inner"}}},
		"shows 127.0.0.1:1 as its peer":      {outcome{errand: away, Connected: true, Peer: netip.MustParseAddrPort("127.0.0.1:1")}, proxied},
		"the daemon tells of nothing":        {outcome{errand: away, Refused: true}, nil},
		"came to the proxy without":          {reached, nil},
		"then nothing happened":              {outcome{errand: away, Connected: true}, nil},
		"was not redirected (no route there": {outcome{errand: away, Error: "no route there"}, nil},
	} {
		if wrong := sample().judgeOutbound(is.outcome, is.event); !strings.Contains(wrong, complaint) {
			t.Errorf("says %q, want %q", wrong, complaint)
		}
	}
}

func TestStrictPortIsOKOnlyWhenTheTraceSaysThatItRefused(t *testing.T) {
	verdict := func(v admin.Verdict) *admin.Connection { return &admin.Connection{Verdict: v} }
	for _, is := range []struct {
		outcome outcome
		event   *admin.Connection
		verdict Verdict
		text    string
	}{
		{outcome{errand: port, Refused: true}, verdict(admin.Denied), OK, "10.0.0.5:80 is refused"},
		{outcome{errand: port, Connected: true}, verdict(admin.Allowed), Warning, "inbound.plaintext_from"},
		{outcome{errand: port, Connected: true}, nil, Failed, "nothing guards"},
		{outcome{errand: port, Connected: true}, verdict(admin.Denied), Failed, "nothing guards"},
		{outcome{errand: port, Refused: true}, nil, Failed, "nothing listens there and nothing guards it"},
		{outcome{errand: port, Error: "no answer"}, nil, Failed, "no answer: a firewall"},
	} {
		want(t, []Result{sample().judgePlaintext(is.outcome, is.event)}, is.verdict, is.text)
	}
}

func TestMeshPortIsOKOnlyWithTheServicesCertificateAndADemandForOne(t *testing.T) {
	until := time.Now().Add(time.Hour)
	for _, is := range []struct {
		outcome outcome
		verdict Verdict
		text    string
	}{
		{outcome{errand: mesh, Identity: "spiffe://td/svc/web", NotAfter: until, Alert: "certificate required"}, OK, "shows spiffe://td/svc/web, valid until " + until.Format(time.DateTime)},
		{outcome{errand: mesh, Identity: "spiffe://td/svc/web", NotAfter: until}, Failed, "takes clients without a certificate"},
		{outcome{errand: mesh, Identity: "spiffe://td/svc/api", Alert: "certificate required"}, Failed, `"spiffe://td/svc/api" instead of "spiffe://td/svc/web"`},
		{outcome{errand: mesh, Refused: true, Error: "refused"}, Failed, "nothing steers the port"},
		{outcome{errand: mesh, Error: "EOF"}, Failed, "EOF: look at"},
	} {
		want(t, []Result{sample().judgeHandshake(is.outcome)}, is.verdict, is.text)
	}
}

func TestCanariesOfAStoppingDaemonAreNotTried(t *testing.T) {
	status := &admin.Status{Stopping: true, Workloads: []admin.Workload{{State: "protected", Processes: 1}}}
	want(t, Canaries(t.Context(), status, nil), Failed, "the daemon is stopping")
}

func TestEventsOfCanariesMayComeInAnyOrder(t *testing.T) {
	events := make(chan admin.Connection, 2)
	events <- admin.Connection{ID: 2}
	events <- admin.Connection{ID: 1}
	c := sample()
	c.events = events
	for _, id := range []uint64{1, 2} {
		if e := c.await(t.Context(), func(e *admin.Connection) bool { return e.ID == id }); e == nil {
			t.Errorf("the event of connection %d is lost", id)
		}
	}
}

func TestAnApplicationThatWouldNotBeDeliveredToFailsItsOwnWorkloadAlone(t *testing.T) {
	all := []admin.Application{
		{Service: "web", Instance: "web-1", Workload: "/c/web", Target: "127.0.0.1:80"},
		{Service: "web", Instance: "web-2", Workload: "/c/web", Error: "nothing listens on port 81"},
		{Service: "api", Instance: "api-1", Workload: "/c/api", Error: "nothing listens on port 82"},
	}
	results := sample().applications(all)
	want(t, results, OK, "listens at 127.0.0.1:80, where instance web-1")
	want(t, results, Failed, "nothing listens on port 81")
	if len(results) != 2 {
		t.Errorf("%v, want web's two", results)
	}
}

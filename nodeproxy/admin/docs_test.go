package admin

import (
	"bytes"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nodeproxy.io/nodeproxy/catalog"
)

// fullConnection has every field of a line.
func fullConnection() Connection {
	e := Endpoint{Service: "s", Target: "t", Instance: "i", Identity: "spiffe://x", Address: "10.0.0.1:1", Peer: "10.0.0.2:2", Workload: "/c", PID: 1, Comm: "c"}
	return Connection{Event: EventClose, ID: 1, Direction: Outbound, Source: e, Destination: e, Path: PathMTLS, Verdict: Denied,
		Reason: catalog.ReasonIntention, Detail: "d", Intention: "n", Generation: 1, Sent: 1, Received: 1, Duration: time.Second, Repeated: 1, RTT: time.Millisecond}
}

func TestEveryFieldOfTheAccessLogIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/access-log.md")
	if err != nil {
		t.Fatal(err)
	}
	var line bytes.Buffer
	undocumented := func(_ []string, a slog.Attr) slog.Attr {
		if !strings.Contains(string(doc), "`"+a.Key+"`") && a.Key != slog.TimeKey && a.Key != slog.LevelKey {
			t.Errorf("field %s is not in docs/access-log.md", a.Key)
		}
		return a
	}
	a, err := NewAccessLog(slog.New(slog.NewTextHandler(&line, &slog.HandlerOptions{ReplaceAttr: undocumented})), AccessAll)
	if err != nil {
		t.Fatal(err)
	}
	a.lost.Store(1)
	c := fullConnection()
	a.write(&c)
	if line.Len() == 0 {
		t.Fatal("no line")
	}
}

func TestEveryReasonIsDocumentedInItsOwnWords(t *testing.T) {
	doc, err := os.ReadFile("../../docs/access-log.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []catalog.Reason{
		catalog.ReasonIntention, catalog.ReasonUnknownOrigin, catalog.ReasonUnknownWorkload, catalog.ReasonClaimRefused,
		catalog.ReasonNoCertificate, catalog.ReasonUnknownService, catalog.ReasonNoInstance, catalog.ReasonConnectFailed,
		catalog.ReasonHandshakeFailed, catalog.ReasonPeerIdentity, catalog.ReasonNotTheWorkloads, catalog.ReasonDeliveryFailed,
		catalog.ReasonCapacity, catalog.ReasonPlaintext, catalog.ReasonNotReady, catalog.ReasonStale, catalog.ReasonBoundDevice,
		catalog.ReasonOutsideMesh, catalog.ReasonStorage, catalog.ReasonConsulAccess, catalog.ReasonIdle, catalog.ReasonDrain, catalog.ReasonGrantMismatch,
	} {
		row := "| `" + string(r) + "` | " + r.Sentence() + " |"
		if !strings.Contains(strings.ReplaceAll(string(doc), "`limits.idle`", "limits.idle"), row) {
			t.Errorf("no row %q", row)
		}
	}
}

func TestEveryMetricIsDocumentedWithItsLabels(t *testing.T) {
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	descs := make(chan *prometheus.Desc, 100)
	newCollector(newTestMetrics()).Describe(descs)
	close(descs)
	parts := regexp.MustCompile(`fqName: "([a-z0-9_]+)".*variableLabels: {([a-z_,]*)}`)
	for d := range descs {
		found := parts.FindStringSubmatch(d.String())
		if found == nil {
			t.Fatalf("no name and labels in %s", d)
		}
		labels := strings.Replace(found[2], strings.Join(pairLabels[:], ","), "pair", 1)
		for _, alone := range []string{"source_service", "destination_service", "reason"} {
			labels = strings.Replace(labels, alone, "`"+alone+"`", 1)
		}
		row := "| `" + found[1] + "` | " + strings.ReplaceAll(labels, ",", ", ")
		if !strings.Contains(string(doc), strings.TrimSuffix(row, " ")+" | ") {
			t.Errorf("no row %q in docs/metrics.md", row)
		}
	}
}

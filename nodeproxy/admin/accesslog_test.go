package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// accessLines runs act against an access log in a bubble of fake time and returns the lines written.
func accessLines(t *testing.T, level AccessLevel, act func(*AccessLog)) []map[string]any {
	t.Helper()
	var out bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		a, err := NewAccessLog(slog.New(slog.NewJSONHandler(&out, nil)), level)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); a.Run(ctx) }()
		act(a)
		cancel()
		<-done
	})
	var lines []map[string]any
	for text := range strings.Lines(out.String()) {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("line %q: %v", text, err)
		}
		lines = append(lines, line)
	}
	return lines
}

func denial(source string) Connection {
	return Connection{Event: EventDenied, Verdict: Denied, Reason: catalog.ReasonIntention,
		Source: Endpoint{Service: source, Address: "10.0.0.1:40000"}, Destination: Endpoint{Service: "api"}}
}

func TestAccessLogWritesWhatItsLevelAsksFor(t *testing.T) {
	closed := Connection{Event: EventClose, Verdict: Allowed}
	cut := Connection{Event: EventClose, Verdict: Denied, Reason: catalog.ReasonIntention}
	for level, want := range map[AccessLevel]string{
		AccessNone:   "",
		AccessDenied: "connection cut,connection denied",
		AccessAll:    "connection let in,connection closed,connection cut,connection denied",
	} {
		lines := accessLines(t, level, func(a *AccessLog) {
			a.Observe(Connection{Event: EventOpen, Verdict: Allowed, ID: 1})
			a.Observe(Connection{Event: EventOpen, Verdict: Allowed, Path: PathPlaintext})
			a.Observe(closed)
			a.Observe(cut)
			a.Observe(denial("web"))
		})
		var got []string
		for _, l := range lines {
			got = append(got, l["msg"].(string))
		}
		if strings.Join(got, ",") != want {
			t.Errorf("%s: lines %q, want %q", level, got, want)
		}
	}
}

func TestRepeatedDenialsAreCountedInTheNextLine(t *testing.T) {
	lines := accessLines(t, AccessDenied, func(a *AccessLog) {
		for range 4 {
			a.Observe(denial("web"))
		}
		a.Observe(denial("batch")) // another pair is not held back
		time.Sleep(denialWindow)   // the minute is over: the repeats get a line of their own, or lead the next
		synctest.Wait()
		a.Observe(denial("web"))
	})
	var web, total int
	for _, l := range lines {
		if l["source_service"] == "web" {
			web++
			total++
			if n, ok := l["repeated"].(float64); ok {
				total += int(n)
			}
		}
	}
	if len(lines)-web != 1 {
		t.Errorf("batch has %d lines, want 1", len(lines)-web)
	}
	if web != 3 || total != 5 {
		t.Errorf("web: %d lines that stand for %d denials, want 3 for 5", web, total)
	}
}

func TestRepeatsAreNotLostWhenTheDaemonStops(t *testing.T) {
	lines := accessLines(t, AccessDenied, func(a *AccessLog) {
		for range 3 {
			a.Observe(denial("web"))
		}
	})
	if len(lines) != 2 || lines[1]["repeated"] != float64(1) {
		t.Errorf("lines = %v, want the first, and one with 1 repeat", lines)
	}
}

func TestCallerWithoutAServiceIsOneCallerWhateverItsPort(t *testing.T) {
	lines := accessLines(t, AccessDenied, func(a *AccessLog) {
		for port := range 3 {
			c := denial("")
			c.Source.Address = fmt.Sprintf("10.0.0.9:%d", 40000+port)
			a.Observe(c)
			synctest.Wait()
		}
	})
	if len(lines) != 2 {
		t.Errorf("%d lines, want the first and the repeats", len(lines))
	}
}

func TestDenialsOfManyPairsTakeBoundedMemoryAndFewLines(t *testing.T) {
	lines := accessLines(t, AccessDenied, func(a *AccessLog) {
		for i := range maxDenialPairs + 1000 {
			a.Observe(denial(fmt.Sprint("service-", i)))
			synctest.Wait()
		}
		if len(a.denials) > maxDenialPairs+1 {
			t.Errorf("%d pairs kept, want at most %d", len(a.denials), maxDenialPairs+1)
		}
	})
	if len(lines) != maxDenialPairs+2 {
		t.Errorf("%d lines, want %d", len(lines), maxDenialPairs+2)
	}
}

func TestObserveDoesNotWaitForTheWriter(t *testing.T) {
	a, err := NewAccessLog(slog.New(slog.DiscardHandler), AccessAll)
	if err != nil {
		t.Fatal(err)
	}
	for range accessQueue + 5 { // nobody runs the log
		a.Observe(Connection{Event: EventClose, Verdict: Allowed})
	}
	if got := a.lost.Load(); got != 5 {
		t.Errorf("lost %d lines, want 5", got)
	}
}

func TestUnknownAccessLevelIsAnError(t *testing.T) {
	if _, err := NewAccessLog(slog.New(slog.DiscardHandler), "some"); err == nil {
		t.Error("no error")
	}
}

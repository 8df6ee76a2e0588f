package admin

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestSlowSubscriberLosesEventsAndOthersDoNot(t *testing.T) {
	hub := NewHub()
	slow, quick := hub.Subscribe(Filter{}, 1), hub.Subscribe(Filter{}, 10)
	defer slow.Close()
	defer quick.Close()
	for id := range uint64(5) {
		hub.Observe(Connection{ID: id})
	}
	if got := slow.TakeDropped(); got != 4 {
		t.Errorf("slow subscriber lost %d, want 4", got)
	}
	if got := slow.TakeDropped(); got != 0 {
		t.Errorf("the loss is told twice: %d", got)
	}
	if len(quick.Events()) != 5 || quick.TakeDropped() != 0 {
		t.Errorf("quick subscriber has %d of 5", len(quick.Events()))
	}
}

func TestClosedSubscriptionGetsNothing(t *testing.T) {
	hub := NewHub()
	sub := hub.Subscribe(Filter{}, 1)
	sub.Close()
	hub.Observe(Connection{})
	if len(sub.Events()) != 0 {
		t.Error("an event after Close")
	}
}

func TestTraceTellsWhatWasDropped(t *testing.T) {
	hub := NewHub()
	sub := hub.Subscribe(Filter{}, 1)
	defer sub.Close()
	hub.Observe(Connection{Event: EventDenied})
	hub.Observe(Connection{Event: EventDenied})
	w := httptest.NewRecorder()
	tw := &traceWriter{w: json.NewEncoder(w), rc: http.NewResponseController(w), live: map[uint64]bool{}}
	tw.rest(sub)
	lines := strings.Split(strings.TrimSpace(w.Body.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("lines = %q, want the event and the count", lines)
	}
	var last Connection
	if err := json.Unmarshal([]byte(lines[1]), &last); err != nil {
		t.Fatal(err)
	}
	if last.Event != EventDropped || last.Dropped != 1 {
		t.Errorf("last line = %s, want dropped 1", lines[1])
	}
}

func TestFilterMatchesEitherSide(t *testing.T) {
	c := Connection{Verdict: Denied, Source: Endpoint{Service: "web", Workload: "/sys/fs/cgroup/demo/web"}, Destination: Endpoint{Service: "api"}}
	for _, f := range []Filter{{}, {Service: "web"}, {Service: "api"}, {Workload: "web"}, {Workload: "demo/web"},
		{Workload: "/sys/fs/cgroup/demo/web"}, {Verdict: Denied}, {Service: "web", Verdict: Denied}} {
		if !f.Match(&c) {
			t.Errorf("%+v does not match", f)
		}
	}
	for _, f := range []Filter{{Service: "db"}, {Workload: "eb"}, {Workload: "demo"}, {Verdict: Allowed}, {Service: "web", Verdict: Allowed}} {
		if f.Match(&c) {
			t.Errorf("%+v matches", f)
		}
	}
}

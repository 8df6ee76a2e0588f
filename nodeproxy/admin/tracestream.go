package admin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// trace streams events as one JSON object per line, the live connections first, until the client or the daemon goes.
// A client that takes nothing for writeTimeout is closed.
func (s *Server) trace(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "service", "workload", "verdict")
	if err != nil {
		return err
	}
	f := Filter{Service: q["service"], Workload: q["workload"], Verdict: Verdict(q["verdict"])}
	if f.Verdict != "" && f.Verdict != Allowed && f.Verdict != Denied {
		return badRequest("verdict %.100q is neither %s nor %s", string(f.Verdict), Allowed, Denied)
	}
	select {
	case s.traces <- struct{}{}:
		defer func() { <-s.traces }()
	default:
		return &httpError{http.StatusServiceUnavailable, fmt.Errorf("%d traces are running already: end one", maxTraces)}
	}
	// Subscribe before listing what is live: nothing that happens in between is lost.
	sub := s.cfg.Hub.Subscribe(f, traceQueue)
	defer sub.Close()
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{}) // the request is read; its deadline would end the stream
	w.Header().Set("Content-Type", "application/x-ndjson")
	t := &traceWriter{w: json.NewEncoder(w), rc: rc, live: make(map[uint64]bool)}
	t.list(s.cfg.Backend.Connections(), f)
	t.follow(r, sub)
	return nil
}

// traceWriter writes the lines of one trace. Its first error ends it.
type traceWriter struct {
	w    *json.Encoder
	rc   *http.ResponseController
	live map[uint64]bool // listed at the start, so their open event is not to be repeated
	err  error
}

func (t *traceWriter) list(live []Connection, f Filter) {
	for i := range live {
		if c := &live[i]; f.Match(c) {
			t.live[c.ID] = true
			t.write(c)
		}
	}
	t.flush()
}

func (t *traceWriter) follow(r *http.Request, sub *Subscription) {
	for t.err == nil {
		select {
		case c := <-sub.Events():
			t.event(&c)
			t.rest(sub)
			t.flush()
		case <-r.Context().Done():
			return
		}
	}
}

// rest writes what is queued already, so that a burst costs one flush, and says what was lost.
func (t *traceWriter) rest(sub *Subscription) {
	for range len(sub.Events()) {
		c := <-sub.Events()
		t.event(&c)
	}
	if n := sub.TakeDropped(); n > 0 {
		t.write(&Connection{Event: EventDropped, Time: time.Now(), Dropped: n})
	}
}

func (t *traceWriter) event(c *Connection) {
	if c.Event == EventOpen && t.live[c.ID] {
		return
	}
	if c.Event == EventClose {
		delete(t.live, c.ID)
	}
	t.write(c)
}

func (t *traceWriter) write(c *Connection) {
	if t.err == nil {
		_ = t.rc.SetWriteDeadline(time.Now().Add(writeTimeout)) // not every writer has one; Encode tells what matters
		t.err = t.w.Encode(c)
	}
}

func (t *traceWriter) flush() {
	if t.err == nil {
		t.err = t.rc.Flush()
	}
}

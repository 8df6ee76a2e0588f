package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// traceInterval is how long a denial may take to appear in a trace before another is made.
const traceInterval = 500 * time.Millisecond

// reach shows that web reaches api, both ways of naming it, as itself.
func (s *show) reach(ctx context.Context) error {
	s.step("Reach a service")
	for _, target := range []struct {
		what string
		url  string
	}{
		{"its virtual IP", fmt.Sprintf("http://%s/", s.virtual)},
		{"the instance's own address", fmt.Sprintf("http://%s/", netip.AddrPortFrom(s.api.IPv4, apiPort))},
	} {
		answer, err := s.get(ctx, s.web, target.url)
		if err != nil {
			s.claim(false, "web reaches api by %s, %s", target.what, target.url)
			s.detail("%v", err)
			continue
		}
		s.claim(strings.Contains(answer, secret), "web reaches api by %s, %s", target.what, target.url)
		caller, _, _ := strings.Cut(strings.TrimPrefix(answer, "caller="), "\n")
		s.claim(caller == s.web.IPv4.String(), "api sees its caller as %s; web is %s", caller, s.web.IPv4)
	}
	return nil
}

func (s *show) get(ctx context.Context, w *netlab.Workload, url string) (string, error) {
	p, err := s.app(w, "get", url)
	if err != nil {
		return "", err
	}
	defer p.Kill()
	err = p.Wait(ctx)
	return p.Output(), err
}

// deny shows that batch is refused and that its node says why.
func (s *show) deny(ctx context.Context) error {
	s.step("Be denied")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	denied := make(chan admin.Connection, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.traceDenied(ctx, denied) // without a trace the claim below does not hold
	}()
	defer func() { cancel(); <-ended }()

	url := fmt.Sprintf("http://%s/", s.virtual)
	answer, err := s.get(ctx, s.batch, url)
	s.claim(err != nil && !strings.Contains(answer, secret), "batch gets nothing from api")
	for again := time.NewTicker(traceInterval); ; {
		select {
		case c := <-denied:
			again.Stop()
			s.claim(c.Intention != "" && c.Reason != "", "node-1 says why: %s", c.Reason.Sentence())
			s.detail("%s (pid %d, %s) → %s %s: %s", c.Source.Service, c.Source.PID, c.Source.Comm, c.Destination.Service, c.Destination.Address, c.Intention)
			return nil
		case <-again.C: // the trace had not begun yet
			_, _ = s.get(ctx, s.batch, url)
		case <-ctx.Done():
			again.Stop()
			s.claim(false, "node-1 says why")
			return nil
		}
	}
}

var errSeen = errors.New("seen")

// traceDenied passes on the first denial of batch that node-1 reports from now on.
func (s *show) traceDenied(ctx context.Context, denied chan<- admin.Connection) error {
	return s.mesh.Daemons[0].Admin().Trace(ctx, admin.Filter{Verdict: admin.Denied}, func(c admin.Connection) error {
		if c.Source.Service != "batch" {
			return nil
		}
		denied <- c
		return errSeen
	})
}

// revoke shows that a changed intention ends a transfer that is under way.
func (s *show) revoke(ctx context.Context) error {
	s.step("Revoke a live connection")
	p, err := s.app(s.web, "stream", fmt.Sprintf("http://%s/stream", s.virtual))
	if err != nil {
		return err
	}
	defer p.Kill()
	if err := p.WaitOutput(ctx, "receiving"); err != nil {
		s.claim(false, "web receives a stream from api")
		s.detail("%v", err)
		return nil
	}
	s.claim(true, "web receives a stream from api")
	written := time.Now()
	if err := s.mesh.Intentions("api", meshlab.Deny("web")); err != nil {
		return err
	}
	err = p.Wait(ctx)
	stopped, ok := stoppedAt(p.Output())
	if err != nil || !ok {
		s.claim(false, "the stream is cut when the intention says deny")
		s.detail("%v", err)
		return nil
	}
	s.claim(true, "the stream is cut %d ms after an intention file said deny", stopped.Sub(written).Milliseconds())
	if err := s.mesh.Intentions("api", meshlab.Allow("web")); err != nil {
		return err
	}
	s.claim(s.recovers(ctx), "web reaches api again when the file says allow")
	return nil
}

func stoppedAt(output string) (time.Time, bool) {
	_, after, found := strings.Cut(output, "stopped=")
	number, _, _ := strings.Cut(after, " ")
	ns, err := strconv.ParseInt(number, 10, 64)
	return time.Unix(0, ns), found && err == nil
}

// recovers tries until web gets an answer or ctx ends.
func (s *show) recovers(ctx context.Context) bool {
	for ctx.Err() == nil {
		if answer, err := s.get(ctx, s.web, fmt.Sprintf("http://%s/", s.virtual)); err == nil && strings.Contains(answer, secret) {
			return true
		}
	}
	return false
}

// wire shows what crossed the link between the nodes since the daemons started.
func (s *show) wire(context.Context) error {
	s.step("Look at the wire between the nodes")
	rec, err := s.capture.Stop()
	if err != nil {
		return err
	}
	const handshake, data = 22, 23
	records := rec.TLSRecords()
	s.claim(records[handshake] > 0 && records[data] > 0, "%d packets: %d begin a TLS handshake record, %d TLS application data",
		len(rec.Packets), records[handshake], records[data])
	s.claim(!rec.Contains([]byte(secret)) && !rec.Contains([]byte("HTTP/1.1")) && rec.Dropped == 0,
		"none of their %d payload bytes show the secret or HTTP (%d packets missed)", rec.PayloadBytes(), rec.Dropped)
	return nil
}

// leaveNothing ends and removes everything, with a context of its own: the caller's may have ended.
func (s *show) leaveNothing() error {
	if s.mesh == nil {
		return nil
	}
	s.interrupted = context.Background().Err // from here on all is asserted, whatever happened before
	s.step("Leave nothing behind")
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	if s.capture != nil {
		_, _ = s.capture.Stop() // again, if it was read: only its descriptor matters here
	}
	for _, daemon := range s.mesh.Daemons {
		if daemon.Process != nil {
			if err := daemon.Stop(ctx); err != nil {
				s.claim(false, "the daemon of %s ends when it is told to", daemon.Node.Name)
				s.detail("%v", err)
			}
		}
	}
	pinned, err := s.mesh.Pinned()
	s.detail("with the daemons gone %d programs, maps and links stay pinned: nothing new connects", len(pinned))
	if err := errors.Join(err, s.mesh.Close()); err != nil {
		return err
	}
	left := s.settled(ctx, pinned)
	s.claim(len(left) == 0, "programs, maps, namespaces, cgroups, processes and files are gone")
	for _, what := range left {
		s.detail("still there: %s", what)
	}
	return nil
}

// settled returns what is left. The kernel frees programs and maps a moment after their last reference, so it looks again.
func (s *show) settled(ctx context.Context, pinned []netlab.BPFObject) []string {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		left := s.mesh.Leaks()
		pinned = slices.DeleteFunc(pinned, func(o netlab.BPFObject) bool { return !o.Exists() })
		for _, o := range pinned {
			left = append(left, o.String())
		}
		if len(left) == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return left
		}
	}
}

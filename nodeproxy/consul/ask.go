package consul

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"
)

var errUnread = errors.New("the agent has not been asked yet")

const (
	// The time between tries doubles between these, less a random part of up to half.
	minBackoff = 250 * time.Millisecond
	maxBackoff = 15 * time.Second
)

// backoff is how long to wait after a number of failures in a row.
func backoff(failures int) time.Duration {
	d := min(minBackoff<<min(failures-1, 10), maxBackoff)
	return d/2 + rand.N(d/2)
}

// topic is one thing that is asked again and again.
type topic struct {
	what  string        // for people: "ask the agent for …"
	every time.Duration // a query that waits is asked at most this often
	ask   func() question
	apply func(*answer) error // only called for answers that differ from the last
	woken func()              // called after each answer, also one that says the same; nil: nothing is

	failed func() // called after each question of a watch that was not answered; nil: nothing is
}

// asker asks, and notes in the world what is not answered.
type asker struct {
	*client
	*world
}

// watch asks t with blocking queries until ctx ends. A failure starts over at index 0, with jitter: the agent, or the
// servers behind it, may be others by then, with other indexes. So does a connection that another query lost.
func (a asker) watch(ctx context.Context, t topic) {
	var index, losses uint64
	var last [sha256.Size]byte
	for ctx.Err() == nil {
		asked := time.Now()
		q := t.ask()
		if now := a.losses(); now == losses {
			q.index = index
		} else {
			losses = now
		}
		next, sum, err := a.try(ctx, t, q, last)
		if ctx.Err() != nil {
			break
		}
		wait := t.every - time.Since(asked)
		if err != nil {
			wait = backoff(a.failed(t.what, asked, explain(err)))
			if t.failed != nil {
				t.failed()
			}
		} else {
			last = sum
			a.answered(t.what)
		}
		index = next
		pause(ctx, wait)
	}
	a.answered(t.what)
}

// once asks t without waiting for a change. last is what it returned before.
func (a asker) once(ctx context.Context, t topic, last [sha256.Size]byte) ([sha256.Size]byte, bool) {
	asked := time.Now()
	_, sum, err := a.try(ctx, t, t.ask(), last)
	if err != nil {
		if ctx.Err() == nil {
			a.failed(t.what, asked, explain(err))
		}
		return last, false
	}
	a.answered(t.what)
	return sum, true
}

// request asks q. A server that has just started answers from before it has read all of its log, an empty catalog say: for
// a while after the start, and after a question that was not answered, servers are asked to be sure of what they say.
func (a asker) request(ctx context.Context, q question) (*answer, error) {
	q.consistent = q.index == 0 && !strings.HasPrefix(q.path, "/v1/agent/") && a.shaken()
	return a.client.request(ctx, q)
}

// try asks q and applies the answer if it differs from the last. The index to ask with next is 0 after an error.
func (a asker) try(ctx context.Context, t topic, q question, last [sha256.Size]byte) (uint64, [sha256.Size]byte, error) {
	got, err := a.request(ctx, q)
	if err != nil {
		return 0, last, err
	}
	h := sha256.New()
	fmt.Fprintln(h, got.defaultPolicy, got.filtered)
	h.Write(got.body)
	sum := [sha256.Size]byte(h.Sum(nil))
	if sum != last {
		if err := t.apply(got); err != nil {
			return 0, last, err
		}
	}
	if t.woken != nil {
		t.woken()
	}
	return nextIndex(q.index, got.index), sum, nil
}

// nextIndex applies the rules for blocking queries: one that goes back starts over, and 0 is asked for as 1.
func nextIndex(asked, got uint64) uint64 {
	if got < asked {
		return 0
	}
	return max(got, 1)
}

// explain adds what to do where that is known.
func explain(err error) error {
	e, ok := errors.AsType[*statusError](err)
	if ok && e.status == http.StatusForbidden {
		return fmt.Errorf("%w: see docs/consul.md for what the token needs", err)
	}
	return err
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

package nodeproxy

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"

	"nodeproxy.io/nodeproxy/catalog"
)

// turns bounds what is done at once for each key: who finds all places taken waits, first come first served. It holds an
// entry for what is in use or waited for and nothing else.
type turns struct {
	mu    sync.Mutex
	lines map[slotKey]*line
}

type line struct {
	places *semaphore.Weighted
	users  int // that have a place or wait for one
}

// take waits, until ctx ends, for a place in each of wanted. release gives them back, once; it is never nil.
func (t *turns) take(ctx context.Context, wanted ...slot) (release func(), err error) {
	var held []func()
	release = sync.OnceFunc(func() {
		for _, give := range held {
			give()
		}
	})
	for _, w := range wanted {
		give, err := t.takeOne(ctx, w)
		if err != nil {
			release()
			return release, err
		}
		held = append(held, give)
	}
	return release, nil
}

func (t *turns) takeOne(ctx context.Context, w slot) (give func(), err error) {
	l := t.join(w)
	if err := l.places.Acquire(ctx, 1); err != nil {
		t.leave(w.key, l)
		return nil, &catalog.Refusal{Reason: catalog.ReasonCapacity, Err: fmt.Errorf("wait for a turn: %s: all %d are in use: %w", w.key, w.max, context.Cause(ctx))}
	}
	return func() {
		l.places.Release(1)
		t.leave(w.key, l)
	}, nil
}

func (t *turns) join(w slot) *line {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lines[w.key]
	if l == nil {
		l = &line{places: semaphore.NewWeighted(int64(w.max))}
		t.lines[w.key] = l
	}
	l.users++
	return l
}

func (t *turns) leave(key slotKey, l *line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(t.lines, key)
	}
}

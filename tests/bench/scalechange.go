package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// Each of these workloads calls the one before it: one directly, the other through the proxy.
const (
	granted = 2
	proxied = 3
)

// quiet is how long nothing may happen after a change before it is believed to be over.
const quiet = 300 * time.Millisecond

// change changes one intention n times each way over each path.
func (l *scaleLab) change(ctx context.Context, n int) (all []change, err error) {
	for _, of := range []struct {
		path   admin.Path
		caller int
	}{{admin.PathDirect, granted}, {admin.PathMTLS, proxied}} {
		for range n {
			both, err := l.denyAndAllow(ctx, of.path, of.caller)
			if err != nil {
				return nil, err
			}
			all = append(all, both...)
		}
	}
	return all, nil
}

// denyAndAllow changes the intention of a pair that is allowed to deny, and back.
func (l *scaleLab) denyAndAllow(ctx context.Context, path admin.Path, caller int) ([]change, error) {
	h, err := l.hold(ctx, path, caller)
	if err != nil {
		return nil, err
	}
	defer h.release()
	event, err := h.within(ctx, quiet)
	if err == nil && event.what != "" {
		err = fmt.Errorf("the %s connection was %s, and nothing has changed", path, event.what)
	}
	if err != nil {
		return nil, err
	}
	deny, began, err := l.write(ctx, path, caller, false)
	if err != nil {
		return nil, err
	}
	for patient := scaleTimeout; ; patient = quiet { // until it is cut for good: another way may be open for a moment longer
		last := event
		if event, err = h.within(ctx, patient); err != nil {
			return nil, err
		}
		if event.what == "" && last.what == "cut" {
			break
		}
		deny.Applied = milliseconds(event.at.Sub(began))
	}
	allow, began, err := l.write(ctx, path, caller, true)
	if err != nil {
		return nil, err
	}
	if event, err = h.within(ctx, scaleTimeout); err == nil && event.what != "open" {
		err = fmt.Errorf("the %s connection that is allowed again was %q", path, event.what)
	}
	if err != nil {
		return nil, err
	}
	allow.Applied = milliseconds(event.at.Sub(began))
	return []change{deny, allow}, nil
}

// write replaces the intentions of the service that caller calls.
func (l *scaleLab) write(ctx context.Context, path admin.Path, caller int, allowed bool) (change, time.Time, error) {
	c, began := change{Path: path, Allowed: allowed}, time.Now()
	err := l.plane.intend(ctx, serviceName(caller-1), l.size.sources(caller-1, allowed))
	c.Accepted = milliseconds(time.Since(began))
	return c, began, err
}

// holder is a connection that is held, or tried again and again.
type holder struct {
	client
	events chan happened
}

// happened is what a holder tells.
type happened struct {
	what string // "open", "cut"; "" is nothing
	at   time.Time
}

// hold opens a connection and asserts by the daemon's trace that it takes its path.
func (l *scaleLab) hold(ctx context.Context, path admin.Path, caller int) (_ *holder, err error) {
	source, destination := serviceName(caller), serviceName(caller-1)
	virtual, err := l.way(ctx, path, source, destination)
	if err != nil {
		return nil, err
	}
	trace, err := l.Daemons[0].Admin().OpenTrace(ctx, admin.Filter{Service: destination})
	if err != nil {
		return nil, err
	}
	defer trace.Close()
	h := &holder{events: make(chan happened, 1024)}
	if err := h.start(l.workloads[caller], netlab.Command{Path: l.self, Args: []string{"hold", netip.AddrPortFrom(virtual, servicePort).String()}}); err != nil {
		return nil, err
	}
	h.stop = context.AfterFunc(ctx, h.process.Kill)
	defer func() {
		if err != nil {
			h.release()
		}
	}()
	go h.listen()
	event, err := h.within(ctx, scaleTimeout)
	if err == nil && event.what != "open" {
		err = fmt.Errorf("open a connection from %s to %s: it was %q", source, destination, event.what)
	}
	if err != nil {
		return nil, err
	}
	for {
		c, err := trace.Next()
		if err != nil {
			return nil, err
		}
		if c.Event != admin.EventOpen || c.Source.Service != source {
			continue
		}
		if c.Path != path {
			return nil, fmt.Errorf("the connection from %s to %s takes path %q, and not %q", source, destination, c.Path, path)
		}
		return h, nil
	}
}

// way waits until connections of source to destination take a path, and returns the virtual IP that leads there.
func (l *scaleLab) way(ctx context.Context, path admin.Path, source, destination string) (netip.Addr, error) {
	for {
		e, err := l.Daemons[0].Admin().Explain(ctx, source, destination)
		if err == nil && e.Path == path && len(e.Missing) == 0 && len(e.Virtual) > 0 {
			return netip.ParseAddr(e.Virtual[0])
		}
		if wait(ctx, pollLog) != nil {
			return netip.Addr{}, fmt.Errorf("%s has no way to %s over %q: %w, %w: %+v", source, destination, path, context.Cause(ctx), err, e)
		}
	}
}

// listen passes on what the process tells until it ends.
func (h *holder) listen() {
	defer close(h.events)
	for {
		var e happened
		var at int64
		if _, err := fmt.Fscanln(h.answers, &e.what, &at); err != nil {
			return
		}
		e.at = time.Unix(0, at)
		h.events <- e
	}
}

// within is the next event, or none when there is none for so long.
func (h *holder) within(ctx context.Context, d time.Duration) (happened, error) {
	select {
	case e, open := <-h.events:
		if !open {
			return e, fmt.Errorf("a held connection's process ended: %w; its output:\n%s", context.Cause(ctx), h.process.Output())
		}
		return e, nil
	case <-time.After(d):
		return happened{}, nil
	case <-ctx.Done():
		return happened{}, context.Cause(ctx)
	}
}

func (h *holder) release() {
	h.stop()
	h.process.Kill()
	h.in.Close()
	for range h.events { // until its last word
	}
	h.out.Close()
}

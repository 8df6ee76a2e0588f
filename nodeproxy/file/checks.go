package file

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"reflect"
	"slices"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
)

// maxProbes is how many checks run at once.
const maxProbes = 32

// check is one TCP or HTTP check, as Consul defines them. An HTTP check passes on 2xx; redirects are not followed, for
// they could lead anywhere.
type check struct {
	name       string
	tcp, http  string
	method     string
	header     map[string][]string
	skipVerify bool
	interval   time.Duration
	timeout    time.Duration
	passing    bool // before the first result
	successes  int  // consecutive successes before it passes; 0 is 1
	failures   int  // consecutive failures before it is critical; 0 is 1
}

// needs is how many equal results in a row it takes to change to ok.
func (c *check) needs(ok bool) int {
	if ok {
		return max(1, c.successes)
	}
	return max(1, c.failures)
}

// dialFunc dials for a check of an instance, from where the instance's workload is.
type dialFunc func(ctx context.Context, instance, network, address string) (net.Conn, error)

// checker runs the checks of this node's instances. Its goroutines end with the context of run's caller: see set and wait.
type checker struct {
	dial    dialFunc
	log     *slog.Logger
	changed chan struct{} // gets a value, without blocking, when the health of an instance has changed
	results chan struct{} // the same for the result of a check
	slots   chan struct{}

	running sync.WaitGroup
	mu      sync.Mutex
	checked map[string]*checked // by instance ID
}

// checked is one instance with its checks.
type checked struct {
	checks []check
	stop   context.CancelFunc
	passes []bool
	why    []string // they do not pass
}

func newChecker(dial dialFunc, log *slog.Logger) *checker {
	if dial == nil {
		var d net.Dialer
		dial = func(ctx context.Context, _, network, address string) (net.Conn, error) {
			return d.DialContext(ctx, network, address)
		}
	}
	return &checker{
		dial: dial, log: log, changed: make(chan struct{}, 1), results: make(chan struct{}, 1),
		slots: make(chan struct{}, maxProbes), checked: make(map[string]*checked),
	}
}

// set makes the checks those of instances. What has not changed keeps its results. The goroutines end with ctx.
func (c *checker) set(ctx context.Context, instances []*instance) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wanted := make(map[string]bool, len(instances))
	for _, inst := range instances {
		wanted[inst.id] = len(inst.checks) > 0
		if old := c.checked[inst.id]; old != nil {
			if reflect.DeepEqual(old.checks, inst.checks) {
				continue
			}
			old.stop()
			delete(c.checked, inst.id)
		}
		if len(inst.checks) > 0 {
			c.start(ctx, inst)
		}
	}
	for id, old := range c.checked {
		if !wanted[id] {
			old.stop()
			delete(c.checked, id)
		}
	}
}

func (c *checker) start(ctx context.Context, inst *instance) {
	ctx, stop := context.WithCancel(ctx)
	now := &checked{checks: inst.checks, stop: stop, passes: make([]bool, len(inst.checks)), why: make([]string, len(inst.checks))}
	c.checked[inst.id] = now
	for i, ch := range inst.checks {
		now.passes[i] = ch.passing
		c.running.Go(func() { c.loop(ctx, inst.id, now, i) })
	}
}

// wait returns when all goroutines have ended; the context given to set has ended before.
func (c *checker) wait() { c.running.Wait() }

// healthy says whether all checks of inst pass. Before the first results it is what the checks say themselves.
func (c *checker) healthy(inst *instance) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.checked[inst.id]; now != nil && reflect.DeepEqual(now.checks, inst.checks) {
		return now.healthy()
	}
	return !slices.ContainsFunc(inst.checks, func(ch check) bool { return !ch.passing })
}

// outcome is what each check of inst last said.
func (c *checker) outcome(inst *instance) []catalog.CheckResult {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.checked[inst.id]
	var all []catalog.CheckResult
	for i, ch := range inst.checks {
		res := catalog.CheckResult{Name: ch.String(), Passing: ch.passing}
		if now != nil {
			res.Passing, res.Output = now.passes[i], now.why[i]
		}
		all = append(all, res)
	}
	return all
}

func (c *checked) healthy() bool { return !slices.Contains(c.passes, false) }

func (c *checker) loop(ctx context.Context, id string, now *checked, i int) {
	ch := now.checks[i]
	passes, streak := ch.passing, 0
	tick := time.NewTicker(ch.interval)
	defer tick.Stop()
	for first := true; ; first = false {
		err := c.probe(ctx, id, ch)
		if ctx.Err() != nil {
			return
		}
		ok := err == nil
		switch streak++; {
		case ok == passes:
			streak = 0
			if first && !ok {
				c.report(id, now, i, err)
			}
		case streak >= ch.needs(ok):
			passes, streak = ok, 0
			c.report(id, now, i, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// report stores the new result of a check and tells of it when it changes the instance's health.
func (c *checker) report(id string, now *checked, i int, err error) {
	c.mu.Lock()
	before := now.healthy()
	now.passes[i], now.why[i] = err == nil, text(err)
	changed := before != now.healthy() && c.checked[id] == now
	c.mu.Unlock()
	if err != nil {
		c.log.Warn("check fails", "instance", id, "check", now.checks[i].String(), "error", err)
	} else {
		c.log.Info("check passes", "instance", id, "check", now.checks[i].String())
	}
	if changed {
		wake(c.changed)
	}
	wake(c.results)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (c *check) String() string {
	if c.name != "" {
		return c.name
	}
	return c.tcp + c.http
}

// probe runs ch once, when there is a free slot.
func (c *checker) probe(ctx context.Context, id string, ch check) error {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, ch.timeout)
	defer cancel()
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.dial(ctx, id, network, address)
	}
	if ch.http != "" {
		return ch.get(ctx, dial)
	}
	conn, err := dial(ctx, "tcp", ch.tcp)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (c *check) get(ctx context.Context, dial func(ctx context.Context, network, address string) (net.Conn, error)) error {
	request, err := http.NewRequestWithContext(ctx, c.method, c.http, http.NoBody)
	if err != nil {
		return err
	}
	for key, values := range c.header {
		request.Header[http.CanonicalHeaderKey(key)] = values
	}
	if host := request.Header.Get("Host"); host != "" {
		request.Host = host
	}
	transport := &http.Transport{
		DialContext: dial, DisableKeepAlives: true, TLSHandshakeTimeout: c.timeout,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: c.skipVerify},
	}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, _ = io.CopyN(io.Discard, response.Body, 4<<10)
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return fmt.Errorf("%s answered %s", c.http, response.Status)
	}
	return nil
}

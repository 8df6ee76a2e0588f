// Package containers finds workloads among the containers of this node's engine, by label: of Docker or one that speaks its API, or of
// containerd.
//
// A label asks, and the configuration grants: a container may be only a service that containers are allowed to be.
//
// The engine is read, and never told anything. While it does not answer, what was last known stays in force, and Problem says so.
package containers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/workload"
)

const (
	retry       = time.Second           // between two attempts to connect
	answers     = 5 * time.Second       // within which an engine answers a question
	pingEvery   = 5 * time.Second       // so that one that hangs is noticed
	lookEvery   = time.Second           // at what nobody tells of
	changesLast = 20 * time.Millisecond // what changes together is looked at together
)

// Config is what an Engine needs.
type Config struct {
	Socket    string   // path of the engine's
	API       API      // that it speaks there
	Allow     []string // the services that containers may be
	Mount     string   // of cgroup2
	StateFile string   // keeps what is claimed, for a daemon that starts while the engine is away
	Log       *slog.Logger
}

// API is how an engine is asked.
type API func(Config) (runtime, error)

// runtime asks an engine. Its questions take as long as their contexts let them.
type runtime interface {
	ping(ctx context.Context) error
	// follow tells which containers may have changed, by ID, until the engine tells no more, which is an error.
	follow(ctx context.Context) (changed <-chan string, ended <-chan error)
	// labelled lists the IDs of those that are for us.
	labelled(ctx context.Context) ([]string, error)
	// look returns nil if there is no such container.
	look(ctx context.Context, id string) (*seen, error)
	Close() error
}

// seen is what an engine says of a container.
type seen struct {
	name    string
	labels  map[string]string
	pid     int                   // of its first process, 0 while it does not run
	owns    func(dir string) bool // whether the cgroup in which that is, or one above, is the container's
	cgroup  string                // where it is or will be, "" if the engine does not say
	parent  string                // containers of one have their cgroups side by side
	host    bool                  // it is in the node's network namespace
	exposed []uint16
	mapped  []workload.Mapping
}

// Engine is what runs this node's containers. It implements workload.Provider.
type Engine struct {
	cfg        Config
	containers map[string]*container // that are claimed, or refused, by ID; Run's own
	places     map[string]string     // where the engine makes cgroups: paths with idMark in them, by cgroup parent; Run's own

	mu        sync.Mutex
	away      error // why the engine does not tell of its containers
	misplaced error // containers whose cgroup is not found
}

// New is of the engine that listens at a socket. It connects to nothing yet.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, containers: make(map[string]*container), places: make(map[string]string)}
}

// Name implements workload.Provider.
func (*Engine) Name() string { return "containers" }

// Problem implements workload.Reporter.
func (e *Engine) Problem() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return cmp.Or(e.away, e.misplaced)
}

// Check asks the engine once for all that is needed.
func (e *Engine) Check(ctx context.Context) error {
	c, err := e.cfg.API(e.cfg)
	if err == nil {
		defer func() { _ = c.Close() }()
		_, err = c.labelled(ctx)
	}
	if err != nil {
		return e.unheard(err)
	}
	return nil
}

func (e *Engine) unheard(err error) error {
	return fmt.Errorf("follow the containers of the engine at %s: %w: enrolled containers stay enrolled, new ones are not seen; see that the engine runs and listens there, or set workloads.containers.socket: it is tried again by itself", e.cfg.Socket, err)
}

// Run implements workload.Provider.
func (e *Engine) Run(ctx context.Context, claim func([]workload.Claim)) error {
	heard := false
	for {
		err := e.session(ctx, func(claims []workload.Claim) {
			heard = true
			claim(claims)
			e.remember()
		})
		if ctx.Err() != nil {
			return nil
		}
		if !heard {
			heard = true
			if e.recall(); len(e.containers) > 0 {
				claim(e.claims())
			}
		}
		if e.report(e.unheard(err)) {
			e.cfg.Log.Warn("workload provider has a problem; its workloads stay as they are", "provider", e.Name(), "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
	}
}

// report says whether err is news.
func (e *Engine) report(err error) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	news := fmt.Sprint(e.away) != fmt.Sprint(err)
	e.away = err
	return news
}

// session follows the engine until it does not answer.
func (e *Engine) session(ctx context.Context, claim func([]workload.Claim)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := e.cfg.API(e.cfg)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := ask(ctx, c.ping); err != nil {
		return err
	}
	changes, ended := c.follow(ctx)
	if err := e.lookAtAll(ctx, c); err != nil {
		return err
	}
	e.report(nil)
	told := e.claims()
	claim(told)
	ping, look := time.NewTicker(pingEvery), time.NewTicker(lookEvery)
	defer ping.Stop()
	defer look.Stop()
	again := time.After(lookEvery) // containerd does not say when it has begun to tell
	for {
		select {
		case id := <-changes:
			if err := e.lookAt(ctx, c, together(id, changes)); err != nil {
				return err
			}
		case err := <-ended:
			return cmp.Or(err, errors.New("it ended the stream of its events"))
		case <-ping.C:
			if err := ask(ctx, c.ping); err != nil {
				return err
			}
			continue
		case <-again:
			if err := e.lookAtAll(ctx, c); err != nil {
				return err
			}
		case <-look.C:
			if err := e.lookAt(ctx, c, e.unplaced()); err != nil {
				return err
			}
		}
		e.forget()
		if now := e.claims(); !reflect.DeepEqual(now, told) {
			told = now
			claim(told)
		}
	}
}

// ask bounds the time of a question.
func ask(ctx context.Context, question func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answers, fmt.Errorf("it has not answered for %s", answers))
	defer cancel()
	if err := question(ctx); err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	return nil
}

// together lists first and the containers that change closely after it.
func together(first string, more <-chan string) []string {
	ids := []string{first}
	for wait := time.After(changesLast); ; {
		select {
		case id := <-more:
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		case <-wait:
			return ids
		}
	}
}

// lookAtAll brings what is known in line with what the engine has.
func (e *Engine) lookAtAll(ctx context.Context, c runtime) error {
	var ids []string
	err := ask(ctx, func(ctx context.Context) (err error) {
		ids, err = c.labelled(ctx)
		return err
	})
	if err != nil {
		return err
	}
	for id := range e.containers {
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if err := e.lookAt(ctx, c, ids); err != nil {
		return err
	}
	e.forget()
	return e.lookAt(ctx, c, e.unplaced()) // now that others have shown where cgroups are
}

// lookAt asks the engine about containers.
func (e *Engine) lookAt(ctx context.Context, c runtime, ids []string) error {
	for _, id := range ids {
		var found *seen
		err := ask(ctx, func(ctx context.Context) (err error) {
			found, err = c.look(ctx, id)
			return err
		})
		switch {
		case err != nil:
			return err
		case found != nil:
			e.update(id, found)
		case e.containers[id] != nil:
			e.containers[id].gone = true
		}
	}
	return nil
}

// unplaced lists those whose cgroup is not known.
func (e *Engine) unplaced() (ids []string) {
	for id, c := range e.containers {
		if c.claim.Cgroup == "" && c.granted() {
			ids = append(ids, id)
		}
	}
	return ids
}

// forget drops what the engine has no more, once its last process has ended: until then it must not be open to strangers. It notes
// whose cgroup is not found.
func (e *Engine) forget() {
	maps.DeleteFunc(e.containers, func(_ string, c *container) bool { return c.gone && !(c.granted() && c.populated()) })
	var misplaced []error
	for _, c := range e.containers {
		if c.misplaced != nil && c.granted() && !c.gone {
			misplaced = append(misplaced, fmt.Errorf("%s is not enrolled: %w", c.claim.Name, c.misplaced))
		}
	}
	slices.SortFunc(misplaced, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	e.mu.Lock()
	defer e.mu.Unlock()
	e.misplaced = errors.Join(misplaced...)
}

func (e *Engine) claims() []workload.Claim {
	var all []workload.Claim
	for _, c := range e.containers {
		if c.claim.Cgroup != "" || !c.granted() {
			all = append(all, c.claim)
		}
	}
	slices.SortFunc(all, func(a, b workload.Claim) int {
		return cmp.Or(strings.Compare(a.Cgroup, b.Cgroup), strings.Compare(a.Name, b.Name))
	})
	return all
}

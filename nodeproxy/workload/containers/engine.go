// Package containers finds workloads among the containers of this node's engine, Docker or one that speaks its API, by label.
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
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"

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
	Allow     []string // the services that containers may be
	Mount     string   // of cgroup2
	StateFile string   // keeps what is claimed, for a daemon that starts while the engine is away
	Log       *slog.Logger
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
	c, err := e.connect()
	if err == nil {
		defer c.Close()
		_, err = c.ContainerList(ctx, client.ContainerListOptions{All: true})
	}
	if err != nil {
		return e.unheard(err)
	}
	return nil
}

func (e *Engine) unheard(err error) error {
	return fmt.Errorf("follow the containers of the engine at %s: %w: enrolled containers stay enrolled, new ones are not seen; see that the engine runs and listens there, or set workloads.containers.socket: it is tried again by itself", e.cfg.Socket, err)
}

func (e *Engine) connect() (*client.Client, error) {
	transport := &http.Transport{ResponseHeaderTimeout: 2 * answers} // for the stream of events, which ask does not bound
	return client.New(client.WithHTTPClient(&http.Client{Transport: transport, CheckRedirect: client.CheckRedirect}), client.WithHost("unix://"+e.cfg.Socket), client.WithScheme("http"))
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
	c, err := e.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := alive(ctx, c); err != nil {
		return err
	}
	changes := c.Events(ctx, client.EventsListOptions{Filters: make(client.Filters).
		Add("type", string(events.ContainerEventType), string(events.NetworkEventType)).
		Add("event", "create", "start", "die", "destroy", "remove", "rename", "connect", "disconnect")}) // podman says remove
	if err := e.lookAtAll(ctx, c); err != nil {
		return err
	}
	e.report(nil)
	told := e.claims()
	claim(told)
	ping, look := time.NewTicker(pingEvery), time.NewTicker(lookEvery)
	defer ping.Stop()
	defer look.Stop()
	for {
		select {
		case change := <-changes.Messages:
			if err := e.lookAt(ctx, c, together(change, changes.Messages)); err != nil {
				return err
			}
		case err := <-changes.Err:
			return cmp.Or(err, errors.New("it ended the stream of its events"))
		case <-ping.C:
			if err := alive(ctx, c); err != nil {
				return err
			}
			continue
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

func alive(ctx context.Context, c *client.Client) error {
	return ask(ctx, func(ctx context.Context) error {
		_, err := c.Ping(ctx, client.PingOptions{})
		return err
	})
}

// together lists the containers of which first and the events that follow closely tell.
func together(first events.Message, more <-chan events.Message) (ids []string) {
	wait := time.After(changesLast)
	for m := first; ; {
		id := m.Actor.ID
		if m.Type == events.NetworkEventType {
			id = m.Actor.Attributes["container"]
		}
		if id != "" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
		select {
		case m = <-more:
		case <-wait:
			return ids
		}
	}
}

// lookAtAll brings what is known in line with what the engine has.
func (e *Engine) lookAtAll(ctx context.Context, c *client.Client) error {
	var ids []string
	err := ask(ctx, func(ctx context.Context) error {
		all, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
		for _, s := range all.Items {
			if isLabelled(s.Labels) {
				ids = append(ids, s.ID)
			}
		}
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
func (e *Engine) lookAt(ctx context.Context, c *client.Client, ids []string) error {
	for _, id := range ids {
		err := ask(ctx, func(ctx context.Context) error {
			found, err := c.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
			if err == nil {
				e.update(&found.Container)
			}
			return err
		})
		switch {
		case errdefs.IsNotFound(err):
			if known := e.containers[id]; known != nil {
				known.gone = true
			}
		case err != nil:
			return err
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

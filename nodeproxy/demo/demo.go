// Package demo shows a mesh at work on one machine, with nothing else installed: two nodes in network namespaces, a daemon
// on each, three programs that know of no proxy, and one claim after another, each checked as it is made.
//
// Everything it makes lives in a netlab and is gone when Run returns, also when its context is cancelled. It does not
// touch the machine's own network.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const (
	apiPort = 8080
	// stepTimeout bounds every wait, so that a claim that does not hold ends the demonstration and does not hang it. Emulated machines are slow.
	stepTimeout = 2 * time.Minute
)

// Config says how to show it.
type Config struct {
	Out    io.Writer // what people read
	Color  bool      // mark what holds and what does not with colours
	Binary string    // path of this executable, which Run starts as the daemons and the applications
}

// ErrClaims is returned by Run when everything could be shown but not every claim held.
var ErrClaims = errors.New("show the mesh: not every claim held")

// Run shows the mesh. It takes some ten seconds and needs root. Its error is ErrClaims, or says what could not be set up, or is ctx's.
func Run(ctx context.Context, cfg Config) error {
	if err := prerequisites(); err != nil {
		return err
	}
	s := &show{screen: screen{out: cfg.Out, color: cfg.Color, interrupted: ctx.Err}, binary: cfg.Binary}
	s.intro()
	err := s.run(ctx)
	if cleanErr := s.leaveNothing(); cleanErr != nil {
		err = errors.Join(err, cleanErr)
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("show the mesh: %w; everything was removed", context.Cause(ctx))
	case err != nil:
		return err
	case s.failed > 0:
		return fmt.Errorf("%w: %d of %d", ErrClaims, s.failed, s.claims)
	}
	s.say("\nAll %d claims held.", s.claims)
	return nil
}

// prerequisites names at once all that is missing.
func prerequisites() error {
	missing := netlab.Missing()
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		missing = append(missing, "a kernel with BTF (CONFIG_DEBUG_INFO_BTF)")
	}
	if len(missing) > 0 {
		return fmt.Errorf("show the mesh: missing %s", strings.Join(missing, ", "))
	}
	return nil
}

// show is one demonstration: the mesh and what has been found of it.
type show struct {
	screen
	binary string

	mesh            *meshlab.Mesh
	web, batch, api *netlab.Workload
	virtual         netip.Addr
	capture         *netlab.Capture
}

func (s *show) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{s.build, s.reach, s.deny, s.revoke, s.wire} {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.bounded(ctx, step); err != nil {
			return err
		}
	}
	return nil
}

func (s *show) bounded(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, stepTimeout, fmt.Errorf("not done within %s", stepTimeout))
	defer cancel()
	return step(ctx)
}

func (s *show) intro() {
	s.say(`A mesh of two nodes on this machine. Each node is a network namespace with one nodeproxy; web, batch and api are plain
HTTP programs in namespaces and cgroups of their own. None of them knows of a proxy, TLS or a certificate.

  node-1                                  node-2
  ├─ web    10.1.1.2  ── calls api        └─ api  10.2.1.2:%d
  └─ batch  10.1.2.2  ── must not`, apiPort)
}

// build makes the nodes, starts the applications and then the daemons: the applications are not restarted for them.
func (s *show) build(ctx context.Context) (err error) {
	s.step("Start the programs, then enrol them")
	if s.mesh, err = meshlab.New(s.binary); err != nil {
		return err
	}
	for _, place := range []struct {
		workload **netlab.Workload
		node     int
		name     string
	}{{&s.web, 0, "web"}, {&s.batch, 0, "batch"}, {&s.api, 1, "api"}} {
		if *place.workload, err = s.mesh.Place(place.node, place.name, apiPort); err != nil {
			return err
		}
		if err := s.serve(ctx, *place.workload); err != nil {
			return err
		}
	}
	if err := s.mesh.Intentions("api", meshlab.Allow("web")); err != nil {
		return err
	}
	if s.capture, err = s.mesh.Capture(); err != nil {
		return err
	}
	return s.startDaemons(ctx)
}

func (s *show) serve(ctx context.Context, w *netlab.Workload) error {
	p, err := s.app(w, "serve", fmt.Sprintf(":%d", apiPort))
	if err != nil {
		return err
	}
	return p.WaitOutput(ctx, "listening")
}

func (s *show) app(w *netlab.Workload, args ...string) (*netlab.Process, error) {
	return w.Start(netlab.Command{Path: s.binary, Args: append([]string{AppCommand}, args...)})
}

func (s *show) startDaemons(ctx context.Context) error {
	began := time.Now()
	for _, daemon := range s.mesh.Daemons {
		daemon.Extra = "limits {\n  drain = \"1s\"\n}\n"
		if err := daemon.Start(ctx); err != nil {
			return err
		}
	}
	for _, daemon := range s.mesh.Daemons {
		if _, err := daemon.AwaitProtected(ctx); err != nil {
			return err
		}
		if err := daemon.AwaitInstances(ctx, "api", 1); err != nil {
			return err
		}
	}
	s.claim(true, "three running programs were enrolled, in %d ms, and not restarted", time.Since(began).Milliseconds())
	var err error
	s.virtual, err = s.mesh.Daemons[0].Virtual(ctx, "api")
	return err
}

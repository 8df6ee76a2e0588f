package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// TestContainersThatComeAndGoAsFastAsTheirEngineCanLeaveNothing starts and removes labelled containers beside one that stays, which is
// called all the time, and beside strangers, who get the addresses that labelled ones had.
func TestContainersThatComeAndGoAsFastAsTheirEngineCanLeaveNothing(t *testing.T) {
	m, e := contained(t, "api")
	web := m.place(0, "web")
	m.define(1, "api", port, m.Nodes[1].IPv4)
	m.allow("api", "web")
	m.allow("web", "api")
	stays := e.run("api", "api", ":80", "--publish", fmt.Sprintf("%d:80", port))
	m.start()
	before := e.awaitState(stays, "api", "protected")
	m.reaches(web, m.vip("api"))
	m.settle(1) // at which it is again at the end

	stdin, stop := io.Pipe()
	t.Cleanup(func() { stop.Close() })
	calls, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"load", "-n", "0", "-c", "1", "-pause", "20ms", m.vip("api")}, Stdin: stdin})
	m.must(err)
	held := m.stream(web, m.vip("api"))
	addresses := make(map[string]bool) // that labelled ones had
	e.stranger(web, addresses)         // before there were any
	ended := e.churn()
	for churns := true; churns; {
		select {
		case err := <-ended:
			m.must(err)
			churns = false
		default:
		}
		for _, line := range strings.Split(e.docker("network", "inspect", "bridge", "--format", `{{range .Containers}}{{.Name}} {{.IPv4Address}}{{"\n"}}{{end}}`), "\n") {
			if name, address, _ := strings.Cut(line, " "); strings.HasPrefix(name, "lives-") {
				addresses[address] = true
			}
		}
		e.stranger(web, addresses)
	}
	if !e.stranger(web, addresses) {
		t.Errorf("nobody got an address that a labelled container had: those are %v", addresses)
	}
	m.goesOn("a connection to the container that stays", held)
	held.Kill()
	m.must(stop.Close())
	m.must(calls.Wait(m.ctx()))
	if out := calls.Output(); !strings.Contains(out, " failed 0\n") {
		t.Errorf("calls of the container that stays failed: %s", out)
	}
	_, err = m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		if len(s.Workloads) != 1 || s.Workloads[0].ID != before.ID || s.Workloads[0].State != "protected" || len(s.Refused)+len(s.Problems) > 0 {
			return fmt.Errorf("workloads are %+v, refused are %+v, problems are %+v", s.Workloads, s.Refused, s.Problems)
		}
		return nil
	})
	m.must(err)
}

// churn starts and removes containers that are api by their label, several at a time.
func (e *engine) churn() (ended <-chan error) {
	const lives, atOnce = 100, 4
	done := make(chan error, 1)
	var churning sync.WaitGroup
	errs := make(chan error, atOnce)
	began := time.Now()
	ctx, cancel := context.WithTimeout(e.m.t.Context(), slowly)
	for worker := range atOnce {
		churning.Go(func() {
			for i := range lives / atOnce {
				name := fmt.Sprintf("lives-%d-%d", worker, i)
				_, err := e.Run(ctx, "--name", name, "--label", "nodeproxy.io/service=api", "app", "/app", "serve", ":80")
				if err == nil {
					_, err = e.Docker(ctx, "rm", "--force", name)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	go func() {
		defer cancel()
		churning.Wait()
		close(errs)
		var all []error
		for err := range errs {
			all = append(all, err)
		}
		took := time.Since(began)
		e.m.t.Logf("%d containers came and went in %s: %.1f a second", lives, took.Round(time.Second), lives/took.Seconds())
		done <- errors.Join(all...)
	}()
	return done
}

// stranger runs a container without a label, asserts that it reaches nobody in the mesh, and says whether its address is one of these.
func (e *engine) stranger(web workload, addresses map[string]bool) bool {
	e.m.t.Helper()
	id, err := e.Run(e.m.ctx(), "--name", "stranger", "app", "/app", "serve", ":80")
	e.m.must(err)
	address := e.docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}/{{.NetworkSettings.IPPrefixLen}}", id)
	for _, to := range []string{e.m.vip("web"), at(web.IPv4, port)} {
		if out := e.dial("stranger", "-timeout", "2s", to, "peer"); strings.Contains(out, "accept=") {
			e.m.t.Errorf("with the address %s a stranger reaches %s: %s", address, to, out)
		}
	}
	e.docker("rm", "--force", id)
	return addresses[address]
}

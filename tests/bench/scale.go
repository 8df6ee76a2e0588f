package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// The sources of a scale run.
const (
	fileSource   = "file"
	consulSource = "consul"
)

// scaling says what a scale run measures.
type scaling struct {
	binary  string
	full    size
	factors []float64 // of the full size, rising, the last one 1
	changes int       // of an intention each way, over each path
	settle  time.Duration
	idle    time.Duration // over which the idle daemon is measured
}

// scaled is what was measured at one size.
type scaled struct {
	Source string  `json:"source"`
	Factor float64 `json:"factor"`
	Size   size    `json:"size"`

	Ready   float64 `json:"ready_ms"`   // the daemon's start to ready, nothing enrolled
	Attach  float64 `json:"attach_ms"`  // the first workload's request to the last one enrolled
	Restart float64 `json:"restart_ms"` // start to ready with what an earlier daemon enrolled

	Resident      uint64  `json:"resident_bytes"`               // with all workloads, no connection
	ResidentAfter uint64  `json:"resident_after_changes_bytes"` // once intentions have changed
	Idle          float64 `json:"idle_cpu"`                     // of one processor

	Changes []change `json:"changes"`
}

// change is one intention that was changed.
type change struct {
	Path     admin.Path `json:"path"` // of the connection that tells
	Allowed  bool       `json:"allowed"`
	Accepted float64    `json:"accepted_ms"` // until the control plane had it
	Applied  float64    `json:"applied_ms"`  // from the beginning of the write until a live connection was cut, or one was let through again
}

// scaleLab is a mesh of a size, of which one node has a daemon and workloads.
type scaleLab struct {
	*meshlab.Mesh
	size      size
	plane     plane
	self      string
	manager   *net.UnixConn // where the daemon says that it is ready, and leaves what the next one is to have
	ready     chan struct{} // that it has said so
	workloads []*netlab.Workload
}

const (
	enrollers = 8 // requests at once

	// scaleTimeout bounds each step.
	scaleTimeout = 5 * time.Minute
)

// measureScale measures all sizes with both sources, and leaves nothing behind.
func measureScale(ctx context.Context, s scaling, p *progress) (all []scaled, err error) {
	defer p.end()
	raiseOpenFiles()
	for _, source := range []string{fileSource, consulSource} {
		for _, factor := range s.factors {
			m := scaled{Source: source, Factor: factor, Size: s.full.times(factor)}
			p.say("scale: %s source, %d services", source, m.Size.Services)
			if err := s.measure(ctx, &m, p); err != nil {
				return nil, fmt.Errorf("measure %d services from source %s: %w", m.Size.Services, source, err)
			}
			all = append(all, m)
		}
	}
	return all, nil
}

func (s *scaling) measure(ctx context.Context, m *scaled, p *progress) (err error) {
	step := func(what string, do func(context.Context) error) {
		if err != nil {
			return
		}
		p.step("scale: %s source, %d services: %s", m.Source, m.Size.Services, what)
		limited, cancel := context.WithTimeoutCause(ctx, scaleTimeout, fmt.Errorf("not done within %s", scaleTimeout))
		defer cancel()
		if err = do(limited); err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}
	var l *scaleLab
	step("build", func(ctx context.Context) (err error) {
		l, err = newScaleLab(ctx, s.binary, m.Source, m.Size)
		return err
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	step("start", func(ctx context.Context) (err error) {
		m.Ready, err = l.start(ctx)
		return err
	})
	step("enroll", func(ctx context.Context) (err error) {
		m.Attach, err = l.enroll(ctx)
		return err
	})
	step("idle", func(ctx context.Context) error { return s.rest(ctx, l, m) })
	step("change intentions", func(ctx context.Context) (err error) {
		m.Changes, err = l.change(ctx, s.changes)
		return err
	})
	step("rest", func(context.Context) (err error) {
		m.ResidentAfter, err = l.resident()
		return err
	})
	step("check", l.check)
	step("start again", func(ctx context.Context) (err error) {
		if err := l.Daemons[0].Stop(ctx); err != nil {
			return err
		}
		m.Restart, err = l.start(ctx)
		return err
	})
	step("check again", l.check)
	return err
}

func newScaleLab(ctx context.Context, binary, source string, s size) (*scaleLab, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	mesh, err := meshlab.New(binary)
	if err != nil {
		return nil, err
	}
	l := &scaleLab{Mesh: mesh, size: s, self: self}
	if err := l.build(ctx, source); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close removes all of it.
func (l *scaleLab) Close() error {
	if l.manager != nil {
		l.manager.Close()
	}
	return l.Mesh.Close()
}

func (l *scaleLab) build(ctx context.Context, source string) (err error) {
	d := l.Daemons[0]
	l.plane = files{l.Mesh}
	if source == consulSource {
		if l.plane, err = newAgent(ctx, l.Mesh); err != nil {
			return err
		}
		d.Source = "source \"consul\" {}\n\n"
	}
	at := filepath.Join(l.Dir(), "ready.sock")
	if l.manager, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"}); err != nil {
		return err
	}
	l.ready = make(chan struct{}, 1)
	go l.manage()
	d.Env = []string{"NOTIFY_SOCKET=" + at}
	var places []string
	for i := range l.size.Workloads {
		w, err := l.Nodes[0].Workload(serviceName(i))
		if err != nil {
			return err
		}
		p, err := w.Start(netlab.Command{Path: l.self, Args: []string{"member", ""}})
		if err != nil {
			return err
		}
		if err := p.WaitOutput(ctx, "listening"); err != nil {
			return err
		}
		l.workloads, places = append(l.workloads, w), append(places, w.IPv4.String())
	}
	if err := l.plane.define(ctx, l.size, places); err != nil {
		return err
	}
	return l.plane.count(ctx, serviceName(proxied-1))
}

// start starts the daemon and returns how long it takes to be ready, as it tells the service manager: in force is all that it
// knows, and every workload is protected. It is not asked meanwhile, nor later than need be: an answer is as large as the mesh.
func (l *scaleLab) start(ctx context.Context) (float64, error) {
	began := time.Now()
	d := l.Daemons[0]
	err := d.Launch()
	if err != nil {
		return 0, err
	}
	select {
	case <-l.ready:
		return milliseconds(time.Since(began)), nil
	case <-d.Process.Done():
		err = errors.New("it has ended")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return 0, fmt.Errorf("wait until the daemon is ready: %w; its output:\n%s", err, d.Process.Output())
}

// manage reads, as a service manager does, whatever the daemon has to say, until Close: it waits for who does not. The files that come
// along the kernel closes.
func (l *scaleLab) manage() {
	buf := make([]byte, 4096)
	for {
		n, err := l.manager.Read(buf)
		if err != nil {
			return
		}
		if strings.Contains(string(buf[:n]), "READY=1") {
			select {
			case l.ready <- struct{}{}:
			default: // it has said so before
			}
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// enroll asks for all workloads at once, and returns how long it takes from the first request until the last is enrolled, by the
// daemon's log. Labels would do, but every daemon on the machine reads those.
func (l *scaleLab) enroll(ctx context.Context) (float64, error) {
	began := time.Now()
	err := together(enrollers, func(worker int) error {
		for i := worker; i < len(l.workloads); i += enrollers {
			request := admin.EnrollRequest{Cgroup: l.workloads[i].Cgroup.Path(), Service: serviceName(i)}
			if err := l.Daemons[0].Admin().Enroll(ctx, request); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for {
		last, n, err := lastEnrolled(l.Daemons[0].Process.Output())
		if err != nil {
			return 0, err
		}
		if n == len(l.workloads) {
			return milliseconds(last.Sub(began)), nil
		}
		select {
		case <-time.After(pollLog):
		case <-ctx.Done():
			return 0, fmt.Errorf("%d of %d workloads are enrolled: %w; the daemon's output:\n%s", n, len(l.workloads), context.Cause(ctx), l.Daemons[0].Process.Output())
		}
	}
}

const pollLog = 20 * time.Millisecond

// lastEnrolled is the time of the last workload that a log tells of, and how many it tells of.
func lastEnrolled(log string) (last time.Time, n int, err error) {
	for lines := bufio.NewScanner(strings.NewReader(log)); lines.Scan(); {
		line := lines.Text()
		if !strings.Contains(line, `msg="workload enrolled"`) {
			continue
		}
		stamp, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
		if last, err = time.Parse(time.RFC3339Nano, stamp); err != nil {
			return last, n, fmt.Errorf("read the daemon's log: %w", err)
		}
		n++
	}
	return last, n, nil
}

// rest measures the daemon while nothing happens.
func (s *scaling) rest(ctx context.Context, l *scaleLab, m *scaled) error {
	if err := wait(ctx, s.settle); err != nil {
		return err
	}
	daemon, err := proxiesOf(l.Daemons[0].Process)
	if err != nil {
		return err
	}
	before, err := daemon.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := wait(ctx, s.idle); err != nil {
		return err
	}
	after, err := daemon.cpu()
	if err != nil {
		return err
	}
	m.Idle = (after - before).Seconds() / time.Since(began).Seconds()
	m.Resident, err = l.resident()
	return err
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (l *scaleLab) resident() (uint64, error) {
	daemon, err := proxiesOf(l.Daemons[0].Process)
	if err != nil {
		return 0, err
	}
	each, err := daemon.resident()
	if err != nil {
		return 0, err
	}
	return each[0], nil
}

// check asserts that the daemon knows all of the mesh, and protects all of its node.
func (l *scaleLab) check(ctx context.Context) error {
	_, err := l.Daemons[0].Await(ctx, func(s *admin.Status) error {
		endpoints, protected, certificates := 0, 0, len(s.Certificates)
		for _, service := range s.Services {
			if strings.HasPrefix(service.Name, "service-") {
				endpoints += len(service.Instances)
			}
		}
		for _, w := range s.Workloads {
			if w.State == "protected" {
				protected++
			}
		}
		is := fmt.Sprintf("%d services, %d endpoints, %d intentions, %d workloads with %d certificates, error %q", len(s.Services), endpoints, s.Policy.Intentions, protected, certificates, s.Source.Error)
		want := fmt.Sprintf("%d services, %d endpoints, %d intentions, %d workloads with %d certificates, error %q", l.size.Services, l.size.Endpoints, l.size.Intentions+1, l.size.Workloads, l.size.Workloads, "")
		if is != want {
			return fmt.Errorf("the daemon has %s, and not %s", is, want)
		}
		return nil
	})
	return err
}

package meshlab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// pollInterval is how often a state of the daemon is asked for that it does not announce.
const pollInterval = 20 * time.Millisecond

// Daemon is nodeproxy on one node. Its settings are read by Start.
type Daemon struct {
	Node    *netlab.Node
	Binary  string
	Pins    string   // state.pins
	MeshD   string   // source.file.path
	Source  string   // the source block, in HCL; "" is that of the mesh's control plane
	Labels  string   // more of its workloads block, in HCL
	Plain   bool     // tunnels = false
	Metrics string   // admin.metrics; "" is 127.0.0.1:20210
	Extra   string   // more of the configuration, in HCL
	Env     []string // more of the environment
	Process *netlab.Process

	lab    *netlab.Lab
	source func() string
	cgroup *netlab.Cgroup

	enrolled []Enrolment
}

// Enrolment is a cgroup block of the configuration.
type Enrolment struct {
	Cgroup  *netlab.Cgroup
	Service string
	Mode    string // "": the node's
	More    string // of the block, in HCL
}

// Enroll adds a workload to the configuration that the next Start reads.
func (d *Daemon) Enroll(w *netlab.Workload, service string) {
	d.EnrollCgroup(Enrolment{Cgroup: w.Cgroup, Service: service})
}

// EnrollCgroup is Enroll for what is not a whole workload of the lab.
func (d *Daemon) EnrollCgroup(e Enrolment) { d.enrolled = append(d.enrolled, e) }

// Socket is the path of the admin socket.
func (d *Daemon) Socket() string { return filepath.Join(d.Node.Dir, "admin.sock") }

// ConfigPath is the path of the configuration, written by WriteConfig.
func (d *Daemon) ConfigPath() string { return filepath.Join(d.Node.Dir, "nodeproxy.hcl") }

// Admin asks the daemon.
func (d *Daemon) Admin() *admin.Client { return admin.NewClient(d.Socket()) }

// WriteConfig writes the configuration to ConfigPath.
func (d *Daemon) WriteConfig() error {
	var b strings.Builder
	fmt.Fprintf(&b, "node {\n  name    = %q\n  address = %q\n}\n\n", d.Node.Name, d.Node.IPv4)
	b.WriteString(cmp.Or(d.Source, d.source()))
	b.WriteString("workloads {\n")
	for i, e := range d.enrolled {
		fmt.Fprintf(&b, "  cgroup \"%s-%d\" {\n    path    = %q\n    service = %q\n", e.Service, i, e.Cgroup.Path(), e.Service)
		if e.Mode != "" {
			fmt.Fprintf(&b, "    mode    = %q\n", e.Mode)
		}
		b.WriteString(e.More + "  }\n")
	}
	b.WriteString(d.Labels)
	fmt.Fprintf(&b, "}\n\nadmin {\n  socket  = %q\n  metrics = %q\n}\n\n", d.Socket(), cmp.Or(d.Metrics, "127.0.0.1:20210"))
	fmt.Fprintf(&b, "state {\n  dir  = %q\n  pins = %q\n}\n\n", filepath.Join(d.Node.Dir, "state"), d.Pins)
	if d.Plain {
		b.WriteString("tunnels = false\n")
	}
	b.WriteString(d.Extra)
	return os.WriteFile(d.ConfigPath(), []byte(b.String()), 0o600)
}

// Launch writes the configuration and starts the daemon in its own cgroup in the node's network namespace.
func (d *Daemon) Launch() error {
	if err := d.WriteConfig(); err != nil {
		return fmt.Errorf("write the daemon's configuration: %w", err)
	}
	var err error
	d.Process, err = d.StartNext(d.cgroup)
	return err
}

// Start launches the daemon and waits until it answers with a snapshot in force.
func (d *Daemon) Start(ctx context.Context) error {
	if err := d.Launch(); err != nil {
		return err
	}
	_, err := d.Await(ctx, func(s *admin.Status) error {
		if s.Source.Generation == 0 {
			return fmt.Errorf("no definitions are in force: %s", s.Source.Error)
		}
		return nil
	})
	return err
}

// StartNext starts a process of the daemon with the configuration as it was written, in a cgroup or, with nil, in the same as
// the one that runs. That one hands over to it, if it can.
func (d *Daemon) StartNext(cgroup *netlab.Cgroup) (*netlab.Process, error) {
	if cgroup == nil {
		cgroup = d.cgroup
	}
	return d.lab.Start(netlab.Command{
		Path: d.Binary, Args: []string{"run", "--config", d.ConfigPath()},
		Env: d.Env, Namespace: d.Node.Namespace, Cgroup: cgroup,
	})
}

// Replace starts the next process of the daemon as StartNext does, waits until it has taken over, and returns the one before, which
// drains.
func (d *Daemon) Replace(ctx context.Context, cgroup *netlab.Cgroup) (before *netlab.Process, err error) {
	next, err := d.StartNext(cgroup)
	if err != nil {
		return nil, err
	}
	if err := next.WaitOutput(ctx, "took over from the daemon before"); err != nil {
		return nil, fmt.Errorf("%s: %w; the output of the daemon before:\n%s", d.Node.Name, err, d.Process.Output())
	}
	before, d.Process = d.Process, next
	return before, nil
}

// LeaveCgroup removes the cgroup in which the daemon before ran, once that has ended; the daemon is in next now.
func (d *Daemon) LeaveCgroup(next *netlab.Cgroup) error {
	err := d.cgroup.Remove()
	d.cgroup = next
	return err
}

// Await asks for the daemon's status until check accepts it, and returns it. If ctx ends first, or the daemon does, the
// error says what check last found wrong.
func (d *Daemon) Await(ctx context.Context, check func(*admin.Status) error) (*admin.Status, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	last := errors.New("it was not asked")
	for ctx.Err() == nil {
		status, err := d.Admin().Status(ctx)
		if err == nil {
			err = check(status)
		}
		if err == nil {
			return status, nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-d.Process.Done():
			return nil, fmt.Errorf("%s: the daemon ended; its output:\n%s", d.Node.Name, d.Process.Output())
		case <-ctx.Done():
		}
	}
	return nil, fmt.Errorf("%s: %w: %w; the daemon's output:\n%s", d.Node.Name, context.Cause(ctx), last, d.Process.Output())
}

// AwaitProtected waits until every enrolled workload that has a process is protected.
func (d *Daemon) AwaitProtected(ctx context.Context) (*admin.Status, error) {
	return d.Await(ctx, func(s *admin.Status) error {
		states := make(map[string]admin.Workload)
		for _, w := range s.Workloads {
			states[w.Cgroup] = w
		}
		for _, e := range d.enrolled {
			pids, err := e.Cgroup.PIDs()
			if err != nil || len(pids) == 0 {
				continue
			}
			if w := states[e.Cgroup.Path()]; w.State != "protected" {
				return fmt.Errorf("workload %s is %q: %s", e.Cgroup.Path(), w.State, w.Detail)
			}
		}
		return nil
	})
}

// Virtual is the virtual IPv4 address of a service.
func (d *Daemon) Virtual(ctx context.Context, service string) (netip.Addr, error) {
	var found netip.Addr
	_, err := d.Await(ctx, func(s *admin.Status) error {
		for _, svc := range s.Services {
			for _, text := range svc.Virtual {
				if ip, err := netip.ParseAddr(text); svc.Name == service && err == nil && ip.Is4() {
					found = ip
					return nil
				}
			}
		}
		return fmt.Errorf("service %s has no virtual IPv4 address", service)
	})
	return found, err
}

// AwaitInstances waits until the daemon knows n healthy instances of a service that can be dialled.
func (d *Daemon) AwaitInstances(ctx context.Context, service string, n int) error {
	_, err := d.Await(ctx, func(s *admin.Status) error {
		healthy := 0
		for _, svc := range s.Services {
			for _, inst := range svc.Instances {
				if svc.Name == service && inst.Healthy && inst.Mesh != "" && inst.Ejected == "" {
					healthy++
				}
			}
		}
		if healthy < n {
			return fmt.Errorf("service %s has %d of %d healthy instances", service, healthy, n)
		}
		return nil
	})
	return err
}

// Stop asks the daemon to end with SIGTERM, and waits for it. The error quotes its output if it did not end well.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the daemon of %s: %w", d.Node.Name, err)
	}
	return d.Process.Wait(ctx)
}

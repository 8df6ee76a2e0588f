// Package enginelab runs a real container engine, Debian's dockerd or its containerd alone, on a node of a netlab: in the node's network namespace, with a mount
// namespace of its own in which cgroup2 alone is mounted, its containers in cgroups below the node's.
//
// It ends with the lab, and so do its containers.
package enginelab

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"nodeproxy.io/tests/netlab"
)

// Debian's package docker.io has them there. What else is called docker on a machine is another program.
const (
	engine = "/usr/sbin/dockerd"
	cli    = "/usr/bin/docker"
)

// view makes what engines are to see of the machine, one after the other, and holds it.
const view = `set -e
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
echo ready
exec sleep infinity
`

// Engine is a dockerd on a node.
type Engine struct {
	Socket     string         // its API's
	Containers *netlab.Cgroup // the parent of the containers' cgroups
	lab        *netlab.Lab
	node       *netlab.Node
	cgroup     *netlab.Cgroup
	dir        string
	view       *netlab.Process // in whose mount namespace it runs
	process    *netlab.Process
}

// Missing names what an Engine needs and this machine does not have.
func Missing() []string {
	var missing []string
	for _, path := range []string{engine, cli, "/usr/bin/containerd", "/usr/sbin/iptables", "/usr/bin/unshare", "/usr/bin/nsenter"} {
		if _, err := os.Stat(path); err != nil {
			missing = append(missing, path)
		}
	}
	return missing
}

// New is an engine that does not run yet. A node has one.
func New(lab *netlab.Lab, node *netlab.Node) (*Engine, error) {
	e := &Engine{lab: lab, node: node, dir: filepath.Join(node.Dir, "engine")}
	e.Socket = filepath.Join(e.dir, "docker.sock")
	var err, errContainers error
	e.cgroup, err = node.Cgroup.Child("engine")
	e.Containers, errContainers = node.Cgroup.Child("containers")
	if err := errors.Join(err, errContainers, os.Mkdir(e.dir, 0o700), os.WriteFile(filepath.Join(e.dir, "engine.json"), []byte("{}"), 0o600)); err != nil {
		return nil, err
	}
	e.view, err = newView(lab, node, e.cgroup)
	return e, err
}

func newView(lab *netlab.Lab, node *netlab.Node, cgroup *netlab.Cgroup) (*netlab.Process, error) {
	return lab.Start(netlab.Command{Path: "/usr/bin/unshare", Args: []string{"--mount", "/bin/sh", "-c", view}, Namespace: node.Namespace, Cgroup: cgroup})
}

// Start starts it and returns when it answers. Containers live on without it.
func (e *Engine) Start(ctx context.Context) error {
	mount, err := netlab.Cgroup2()
	if err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(e.dir, name) }
	if err := e.view.WaitOutput(ctx, "ready"); err != nil {
		return err
	}
	e.process, err = e.lab.Start(netlab.Command{
		Path: "/usr/bin/nsenter",
		Args: []string{"--target", strconv.Itoa(e.view.PID()), "--mount", engine, "--live-restore", "--host", "unix://" + e.Socket, "--data-root", in("data"), "--exec-root", in("exec"), "--pidfile", in("pid"),
			"--config-file", in("engine.json"), "--storage-driver", "vfs", "--bip", "172.30.0.1/24", "--cgroup-parent", strings.TrimPrefix(e.Containers.Path(), mount)},
		Env:       []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Namespace: e.node.Namespace, Cgroup: e.cgroup,
	})
	if err != nil {
		return err
	}
	return e.process.Await(ctx, "the engine answers", func() error {
		_, err := e.Docker(ctx, "version")
		return err
	})
}

// Stop ends the engine as a service manager does, and not its containers.
func (e *Engine) Stop(ctx context.Context) error {
	if err := e.process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the engine: %w", err)
	}
	return e.process.Wait(ctx)
}

// Freeze makes the engine hang, Thaw makes it go on.
func (e *Engine) Freeze() error { return e.process.Signal(syscall.SIGSTOP) }

// Thaw ends a Freeze.
func (e *Engine) Thaw() error { return e.process.Signal(syscall.SIGCONT) }

// Log is what the engine wrote.
func (e *Engine) Log() string { return e.process.Output() }

// Docker runs the engine's command line and returns what it wrote.
func (e *Engine) Docker(ctx context.Context, args ...string) (string, error) {
	return e.docker(ctx, nil, args...)
}

func (e *Engine) docker(ctx context.Context, stdin []byte, args ...string) (string, error) {
	c := netlab.Command{Path: cli, Args: append([]string{"--host", "unix://" + e.Socket, "--config", filepath.Join(e.dir, "cli")}, args...)}
	if stdin != nil {
		c.Stdin = bytes.NewReader(stdin)
	}
	out, err := e.lab.Run(ctx, c)
	return strings.TrimSpace(out), err
}

// Layer is the file system of an image, as engines import it: one static program, which is /app.
func Layer(program string) ([]byte, error) {
	text, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	err = w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(text))})
	if err == nil {
		_, err = w.Write(text)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, fmt.Errorf("make an image of %s: %w", program, err)
	}
	return layer.Bytes(), nil
}

// Import makes an image of a program.
func (e *Engine) Import(ctx context.Context, image, program string) error {
	layer, err := Layer(program)
	if err == nil {
		_, err = e.docker(ctx, layer, "import", "-", image)
	}
	return err
}

// Run starts a container with "docker run --detach" and more arguments, and returns its ID.
func (e *Engine) Run(ctx context.Context, args ...string) (id string, err error) {
	return e.Docker(ctx, append([]string{"run", "--detach"}, args...)...)
}

// Cgroup is where a container's is.
func (e *Engine) Cgroup(id string) string { return filepath.Join(e.Containers.Path(), id) }

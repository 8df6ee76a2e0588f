package enginelab

import (
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

// Containerd is one on a node that no engine uses. Its containers are made and run by ctr, which comes with it.
type Containerd struct {
	Socket     string
	Containers *netlab.Cgroup // the parent of the containers' cgroups
	lab        *netlab.Lab
	node       *netlab.Node
	cgroup     *netlab.Cgroup
	dir        string
	view       *netlab.Process
	process    *netlab.Process
}

// NewContainerd is one that does not run yet. Its containers' root has a program as /app.
func NewContainerd(lab *netlab.Lab, node *netlab.Node, program string) (*Containerd, error) {
	c := &Containerd{lab: lab, node: node, dir: filepath.Join(node.Dir, "containerd")}
	c.Socket = filepath.Join(c.dir, "containerd.sock")
	var err, errContainers error
	c.cgroup, err = node.Cgroup.Child("engine")
	c.Containers, errContainers = node.Cgroup.Child("containers")
	text, errRead := os.ReadFile(program)
	if err := errors.Join(err, errContainers, errRead, os.MkdirAll(filepath.Join(c.dir, "root"), 0o755), os.WriteFile(filepath.Join(c.dir, "root", "app"), text, 0o755),
		os.WriteFile(filepath.Join(c.dir, "config.toml"), []byte("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"), 0o600)); err != nil {
		return nil, err
	}
	c.view, err = newView(lab, node, c.cgroup)
	return c, err
}

// Start starts it and returns when it answers. Containers live on without it.
func (c *Containerd) Start(ctx context.Context) error {
	if err := c.view.WaitOutput(ctx, "ready"); err != nil {
		return err
	}
	var err error
	c.process, err = c.lab.Start(c.inside("/usr/bin/containerd", "--config", filepath.Join(c.dir, "config.toml"), "--address", c.Socket,
		"--root", filepath.Join(c.dir, "data"), "--state", filepath.Join(c.dir, "state")))
	if err != nil {
		return err
	}
	return c.process.Await(ctx, "containerd answers", func() error {
		_, err := c.Ctr(ctx, "version")
		return err
	})
}

// Stop ends it as a service manager does, and not its containers.
func (c *Containerd) Stop(ctx context.Context) error {
	if err := c.process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop containerd: %w", err)
	}
	return c.process.Wait(ctx)
}

// Ctr runs its command line and returns what that wrote.
func (c *Containerd) Ctr(ctx context.Context, args ...string) (string, error) {
	out, err := c.lab.Run(ctx, c.inside("/usr/bin/ctr", append([]string{"--address", c.Socket}, args...)...))
	return strings.TrimSpace(out), err
}

// Run starts a container with flags of "ctr run", that runs /app with arguments.
func (c *Containerd) Run(ctx context.Context, id string, flags []string, args ...string) error {
	mount, err := netlab.Cgroup2()
	if err != nil {
		return err
	}
	all := append([]string{"run", "--detach", "--null-io", "--rootfs", "--cpu-shares=0", "--cgroup", strings.TrimPrefix(filepath.Join(c.Containers.Path(), id), mount)}, flags...)
	all = append(all, filepath.Join(c.dir, "root"), id, "/app")
	_, err = c.Ctr(ctx, append(all, args...)...)
	return err
}

func (c *Containerd) inside(path string, args ...string) netlab.Command {
	return netlab.Command{
		Path: "/usr/bin/nsenter", Args: append([]string{"--target", strconv.Itoa(c.view.PID()), "--mount", path}, args...),
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Namespace: c.node.Namespace, Cgroup: c.cgroup,
	}
}

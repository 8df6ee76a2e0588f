package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const (
	servicePort  = 8080
	setupTimeout = 30 * time.Second
	openFiles    = 1 << 16 // enough for 10,000 connections, of which a daemon holds both ends
)

// path is one way from a client to a server.
type path struct {
	name     string
	baseline string // the path of plain TCP between the same places; "" for that itself
	client   *netlab.Workload
	to       netip.AddrPort
	ends     [2]int // how many ends of a connection each node's daemon tells of
	via      admin.Path
}

// The names of the paths of plain TCP.
const (
	plainNear = "plain TCP, same node"
	plainFar  = "plain TCP, node to node"
)

// lab is two nodes with a client on the first, a server on either, and all of it twice: enrolled, and plain in namespaces
// and cgroups of the same shape that nodeproxy does not touch.
type lab struct {
	*meshlab.Mesh
	self  string // this executable
	paths []*path
	far   *path // from node to node through nodeproxy

	between admin.Path // the nodes
}

// newLab is running when it is returned. On error nothing of it remains.
func newLab(ctx context.Context, binary string, tunnels bool) (*lab, error) {
	raiseOpenFiles()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	mesh, err := meshlab.New(binary)
	if err != nil {
		return nil, err
	}
	l := &lab{Mesh: mesh, self: self, between: admin.PathTunnel}
	if !tunnels {
		l.between = admin.PathMTLS
		for _, d := range l.Daemons {
			d.Plain = true
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, fmt.Errorf("not done within %s", setupTimeout))
	defer cancel()
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("build the lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *lab) build(ctx context.Context) error {
	web, err := l.enrolled(ctx, 0, "web")
	if err != nil {
		return err
	}
	stranger, err := l.plain(ctx, 0, "plain-web")
	if err != nil {
		return err
	}
	targets := make(map[string]netip.AddrPort)
	for node, name := range []string{"near", "far"} {
		if _, err := l.enrolled(ctx, node, name); err != nil {
			return err
		}
		server, err := l.plain(ctx, node, "plain-"+name)
		if err != nil {
			return err
		}
		targets["plain-"+name] = netip.AddrPortFrom(server.IPv4, servicePort)
		if err := l.Intentions(name, meshlab.Allow("web")); err != nil {
			return err
		}
	}
	if err := l.start(ctx); err != nil {
		return err
	}
	for _, name := range []string{"near", "far"} {
		virtual, err := l.Daemons[0].Virtual(ctx, name)
		if err != nil {
			return err
		}
		targets[name] = netip.AddrPortFrom(virtual, servicePort)
	}
	l.far = &path{name: "nodeproxy, node to node", baseline: plainFar, client: web, to: targets["far"], ends: [2]int{1, 1}, via: l.between}
	l.paths = []*path{
		{name: plainNear, client: stranger, to: targets["plain-near"]},
		{name: "nodeproxy, same node", baseline: plainNear, client: web, to: targets["near"], ends: [2]int{1, 0}, via: admin.PathDirect},
		{name: plainFar, client: stranger, to: targets["plain-far"]},
		l.far,
	}
	return nil
}

// enrolled makes a workload of the mesh with a server in it. The client has one too: a workload is protected from the
// moment when it has a process.
func (l *lab) enrolled(ctx context.Context, node int, name string) (*netlab.Workload, error) {
	w, err := l.Place(node, name, servicePort)
	if err != nil {
		return nil, err
	}
	return w, l.serve(ctx, w)
}

func (l *lab) plain(ctx context.Context, node int, name string) (*netlab.Workload, error) {
	w, err := l.Nodes[node].Workload(name)
	if err != nil {
		return nil, err
	}
	return w, l.serve(ctx, w)
}

func (l *lab) serve(ctx context.Context, w *netlab.Workload) error {
	if err := recyclePorts(w.Namespace); err != nil {
		return err
	}
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), servicePort)
	p, err := w.Start(netlab.Command{Path: l.self, Args: []string{"serve", at.String()}})
	if err != nil {
		return err
	}
	return p.WaitOutput(ctx, "listening")
}

// recyclePorts keeps a round's connections from waiting for the ephemeral ports of the last one: plain TCP uses up the
// default range within seconds, and every port then stays taken for a minute (ip-sysctl.rst, tcp_tw_reuse).
func recyclePorts(ns *netlab.Namespace) error {
	return errors.Join(
		ns.Sysctl("net/ipv4/ip_local_port_range", "10000 65535"),
		ns.Sysctl("net/ipv4/tcp_tw_reuse", "1"),
	)
}

func (l *lab) start(ctx context.Context) error {
	for _, d := range l.Daemons {
		if err := d.Start(ctx); err != nil {
			return err
		}
	}
	for _, d := range l.Daemons {
		if _, err := d.AwaitProtected(ctx); err != nil {
			return err
		}
		for _, name := range []string{"near", "far"} {
			if err := d.AwaitInstances(ctx, name, 1); err != nil {
				return err
			}
		}
		_, err := d.Await(ctx, func(s *admin.Status) error {
			if s.SameNode.Settling {
				return errors.New("the direct path is not settled")
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// opened is how many ends of connections each daemon has opened since it started. It waits until none is open any more:
// closing is work too.
func (l *lab) opened(ctx context.Context) (n [2]int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, fmt.Errorf("not closed within %s", setupTimeout))
	defer cancel()
	for i, d := range l.Daemons {
		status, err := d.Await(ctx, func(s *admin.Status) error {
			if s.Connections.Active > 0 {
				return fmt.Errorf("%d connections are still open", s.Connections.Active)
			}
			return nil
		})
		if err != nil {
			return n, err
		}
		n[i] = int(status.Connections.Opened)
	}
	return n, nil
}

// raiseOpenFiles lets the lab's processes open as many files as the idle connections take, if this process may.
func raiseOpenFiles() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil && limit.Cur < openFiles {
		limit.Cur, limit.Max = openFiles, max(limit.Max, openFiles)
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) // what does not fit is left out, and said
	}
}

// fits says whether a daemon may have so many connections, at two open files each.
func fits(connections int) bool {
	const others = 1024
	var limit syscall.Rlimit
	return syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil && uint64(2*connections+others) <= limit.Cur
}

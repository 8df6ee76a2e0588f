package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

const (
	servicePort  = 8080
	setupTimeout = time.Minute
	openFiles    = 1 << 16 // enough for 10,000 connections, of which a daemon holds both ends
)

// path is one way from a client to a server.
type path struct {
	name     string
	baseline string // the path of plain TCP between the same places; "" for that itself
	peer     bool   // somebody else's proxies
	beside   string // somebody else's too, but a reference: the path that is compared with it
	lab      *lab
	client   *netlab.Workload
	to       netip.AddrPort
	ends     [2]int // how many ends of a connection each node's daemon tells of
	via      admin.Path
	proxies  proxies // on the client's side, on the server's
}

// rank puts the peers behind nodeproxy, and the references behind them.
func (p *path) rank() int {
	switch {
	case p.beside != "":
		return 2
	case p.peer:
		return 1
	}
	return 0
}

// The names of the paths.
const (
	plainNear = "plain TCP, same node"
	bare      = "plain TCP, a node without a daemon"
	plainFar  = "plain TCP, node to node"
	direct    = "nodeproxy, same node"
	tunnels   = "nodeproxy, tunnels"
	mtls      = "nodeproxy, plain Connect"
)

// lab is two nodes with a client on the first, a server on either, and all of it twice: enrolled, and plain in namespaces
// and cgroups of the same shape that nodeproxy does not touch. One node more, of the same shape, has no daemon.
type lab struct {
	*meshlab.Mesh
	self  string // this executable
	paths []*path
	far   *path // from node to node through nodeproxy
}

// newLab is running when it is returned. between is how its nodes speak with each other. One with tunnels has the paths of plain
// TCP and those of the peers too. On error nothing of it remains.
func newLab(ctx context.Context, binary string, between admin.Path) (*lab, error) {
	raiseOpenFiles()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	mesh, err := meshlab.New(binary)
	if err != nil {
		return nil, err
	}
	l := &lab{Mesh: mesh, self: self}
	for _, d := range l.Daemons {
		d.Plain = between != admin.PathTunnel
	}
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, fmt.Errorf("not done within %s", setupTimeout))
	defer cancel()
	if err := l.build(ctx, between); err != nil {
		return nil, errors.Join(fmt.Errorf("build the lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *lab) build(ctx context.Context, between admin.Path) error {
	web, err := l.enrolled(ctx, 0, "web")
	if err != nil {
		return err
	}
	for node, name := range []string{"near", "far"} {
		if _, err := l.enrolled(ctx, node, name); err != nil {
			return err
		}
		if err := l.Intentions(name, meshlab.Allow("web")); err != nil {
			return err
		}
	}
	if err := l.start(ctx); err != nil {
		return err
	}
	daemons, err := proxiesOf(l.Daemons[0].Process, l.Daemons[1].Process)
	if err != nil {
		return err
	}
	to := func(service string) (netip.AddrPort, error) {
		virtual, err := l.Daemons[0].Virtual(ctx, service)
		return netip.AddrPortFrom(virtual, servicePort), err
	}
	l.far = &path{name: mtls, baseline: plainFar, lab: l, client: web, ends: [2]int{1, 1}, via: between, proxies: daemons}
	if l.far.to, err = to("far"); err != nil || between != admin.PathTunnel {
		l.paths = []*path{l.far}
		return err
	}
	l.far.name = tunnels
	near := &path{name: direct, baseline: plainNear, lab: l, client: web, ends: [2]int{1, 0}, via: admin.PathDirect, proxies: daemons}
	if near.to, err = to("near"); err != nil {
		return err
	}
	return l.others(ctx, near)
}

// others adds what nodeproxy is compared with.
func (l *lab) others(ctx context.Context, near *path) error {
	lone, err := l.Lone()
	if err != nil {
		return err
	}
	plain := make(map[string]*netlab.Workload)
	for _, place := range []struct {
		node *netlab.Node
		name string
	}{{l.Nodes[0], "plain-web"}, {l.Nodes[0], "plain-near"}, {l.Nodes[1], "plain-far"}, {lone, "bare-web"}, {lone, "bare-near"}} {
		if plain[place.name], err = l.plain(ctx, place.node, place.name); err != nil {
			return err
		}
	}
	way := func(name, baseline, client, server string) *path {
		return &path{name: name, baseline: baseline, lab: l, client: plain[client], to: netip.AddrPortFrom(plain[server].IPv4, servicePort)}
	}
	l.paths = []*path{
		way(bare, plainNear, "bare-web", "bare-near"), way(plainNear, "", "plain-web", "plain-near"), near,
		way(plainFar, "", "plain-web", "plain-far"), l.far,
	}
	peers, err := l.startPeers(ctx, plain["plain-web"], plain["plain-far"])
	l.paths = append(l.paths, peers...)
	return err
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

func (l *lab) plain(ctx context.Context, node *netlab.Node, name string) (*netlab.Workload, error) {
	w, err := node.Workload(name)
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

// told is what a daemon tells of connections since its start.
type told struct {
	opened int
	lost   int // news from the kernel, of which it may not have heard that one was opened
}

// opened is how many ends of connections each daemon has opened since it started. It waits until none is open any more:
// closing is work too.
func (l *lab) opened(ctx context.Context) (n [2]told, err error) {
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
		n[i] = told{int(status.Connections.Opened), int(status.Kernel.Counters[admin.CounterEventsLost])}
	}
	return n, nil
}

// raiseOpenFiles lets the lab's processes open as many files as the idle connections take, if this process may.
func raiseOpenFiles() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil && limit.Cur < openFiles {
		limit.Cur, limit.Max = openFiles, max(limit.Max, openFiles)
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) // see fitting
	}
}

// otherFiles are those of a proxy that are no connections, and what a daemon keeps free for them (see check.FittingConnections).
const otherFiles = 2560

// fitting is connections, each cut down to as many thousands as a daemon may have with limit open files, at two for each.
func fitting(connections []int, limit int) []int {
	var all []int
	for _, n := range connections {
		if 2*n+otherFiles > limit {
			n = (limit - otherFiles) / 2 / 1000 * 1000
		}
		all = append(all, max(n, 0))
	}
	return slices.Compact(all)
}

// openFilesLimit is how many files each process of the lab may open.
func openFilesLimit() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return otherFiles
	}
	return int(min(limit.Cur, openFiles))
}

package containers

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/netlab"
)

func TestContainersOfContainerdAreClaimed(t *testing.T) {
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: runs a container engine")
	}
	netlab.Lacks(t, enginelab.Missing()...)
	nodes, err := netlab.NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nodes.Close(); err != nil {
			t.Error(err)
		}
		if leaks := nodes.Leaks(); len(leaks) > 0 {
			t.Errorf("left behind: %v", leaks)
		}
	})
	l := &labelled{t: t, claims: make(chan []workload.Claim, 1<<12)}
	c, err := enginelab.NewContainerd(nodes.Lab, nodes.Nodes[0], buildApp(t, nodes.Dir()))
	l.must(err)
	l.must(c.Start(l.ctx()))
	mount, err := netlab.Cgroup2()
	l.must(err)
	l.provider = New(Config{API: Containerd, Socket: c.Socket, Allow: []string{"web", "shop"}, Mount: mount, StateFile: filepath.Join(nodes.Dir(), "containers.json"), Log: slog.New(slog.DiscardHandler)})
	run := func(id string, flags ...string) {
		t.Helper()
		l.must(c.Run(l.ctx(), id, flags, "serve", ":80"))
	}
	ctr := func(args ...string) {
		t.Helper()
		_, err := c.Ctr(l.ctx(), args...)
		l.must(err)
	}
	run("plain")
	run("early", web)
	l.run()
	l.await("default/early=web@early")

	create := func(namespace, id string, flags ...string) { // it is not run: its cgroup would not be the lab's
		t.Helper()
		ctr(append(append([]string{"--namespace", namespace, "containers", "create", "--rootfs"}, flags...), filepath.Dir(c.Socket), id, "/app")...)
	}
	create("default", "late", "--label=nodeproxy.io/service=shop", "--label=nerdctl/name=named")
	l.await("default/early=web@early", "named=shop@late") // before it runs
	run("thief", "--label=nodeproxy.io/service=bank")
	refused := `default/thief!it asks to be service "bank", which containers may not be: if they may, add it to workloads.containers.allow in nodeproxy's configuration`
	l.await("default/early=web@early", "named=shop@late", refused)
	ctr("containers", "label", "thief", "nodeproxy.io/service=web")
	l.await("default/early=web@early", "default/thief=web@thief", "named=shop@late")
	ctr("containers", "label", "thief", "nodeproxy.io/service=")
	l.await("default/early=web@early", "named=shop@late")
	create("other", "early", web)
	l.await("default/early=web@early", "named=shop@late", "other/early=web@early")
	if early, other := l.last[1].Cgroup, l.last[2].Cgroup; early == other {
		t.Errorf("both are claimed in %s", early)
	}
	ctr("--namespace", "other", "containers", "rm", "early")
	l.await("default/early=web@early", "named=shop@late")

	l.must(c.Stop(l.ctx()))
	l.awaitProblem(func(err error) bool { return err != nil && strings.Contains(err.Error(), "see that the engine runs") })
	l.stop()
	l.provider = New(l.provider.cfg)
	l.run()
	l.await("default/early=web@early", "named=shop@late") // as an earlier daemon knew them
	l.must(c.Start(l.ctx()))
	l.awaitProblem(func(err error) bool { return err == nil })
	ctr("containers", "rm", "late")
	l.await("default/early=web@early")
	ctr("tasks", "rm", "--force", "early")
	ctr("containers", "rm", "early")
	l.await()
}

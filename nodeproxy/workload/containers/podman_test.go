package containers

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/netlab"
)

// Debian's package podman has it there.
const podman = "/usr/bin/podman"

// podmanView leaves podman the machine's cgroups and a /run of its own.
const podmanView = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && exec sleep infinity"

func TestContainersOfPodmanAreClaimed(t *testing.T) {
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: runs a container engine")
	}
	if _, err := os.Stat(podman); err != nil {
		netlab.Lacks(t, podman)
	}
	nodes, err := netlab.NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	node, l := nodes.Nodes[0], &labelled{t: t, claims: make(chan []workload.Claim, 1<<12)}
	mount, err := netlab.Cgroup2()
	l.must(err)
	t.Cleanup(func() {
		if err := nodes.Close(); err != nil {
			t.Error(err)
		}
		removeHybrid(filepath.Dir(mount), nodes.Name())
	})
	parent := strings.TrimPrefix(node.Cgroup.Path(), mount) + "/containers"
	view, err := nodes.Start(netlab.Command{Path: "/usr/bin/unshare", Args: []string{"--mount", "/bin/sh", "-c", podmanView}, Namespace: node.Namespace, Cgroup: node.Cgroup})
	l.must(err)
	in := func(name string) string { return filepath.Join(node.Dir, name) }
	command := func(args ...string) netlab.Command {
		global := []string{"--root", in("root"), "--runroot", in("run"), "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--storage-driver", "vfs"}
		return netlab.Command{
			Path: "/usr/bin/nsenter", Args: slices.Concat([]string{"--target", strconv.Itoa(view.PID()), "--mount", podman}, global, args),
			Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Namespace: node.Namespace, Cgroup: node.Cgroup,
		}
	}
	do := func(args ...string) string {
		t.Helper()
		out, err := nodes.Run(l.ctx(), command(args...))
		l.must(err)
		return strings.TrimSpace(out)
	}
	run := func(name string, args ...string) (id string) {
		t.Helper()
		do(slices.Concat([]string{"run", "--detach", "--name", name, "--cgroup-parent", parent, "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"}, args, []string{"localhost/app", "/app", "serve", ":80"})...)
		return "libpod-" + do("inspect", "--format", "{{.Id}}", name)
	}
	layer, err := enginelab.Layer(buildApp(t, nodes.Dir()))
	l.must(err)
	l.must(os.WriteFile(in("app.tar"), layer, 0o600))
	do("import", in("app.tar"), "app")
	socket := in("podman.sock")
	_, err = nodes.Start(command("system", "service", "--time=0", "unix://"+socket))
	l.must(err)
	l.provider = New(Config{API: Docker, Socket: socket, Allow: []string{"web"}, Mount: mount, Log: slog.New(slog.DiscardHandler)})
	l.run()

	bridge := run("bridge", web, "--publish", "8080:80")
	host := run("host", web, "--network", "host", "--label=nodeproxy.io/ports=7000") // podman does not tell what is exposed there
	run("thief", "--label=nodeproxy.io/service=bank")
	refused := `thief!it asks to be service "bank", which containers may not be: if they may, add it to workloads.containers.allow in nodeproxy's configuration`
	l.await("bridge=web@"+bridge, "host=web@"+host, refused)
	for _, c := range l.last {
		switch c.Name {
		case "container bridge":
			if !slices.ContainsFunc(c.Mapped, func(m workload.Mapping) bool { return m.Node.String() == "0.0.0.0:8080" && m.To.Port() == 80 }) {
				t.Errorf("mapped are %v", c.Mapped)
			}
		case "container host":
			if !slices.Equal(c.Ports, []uint16{7000}) {
				t.Errorf("ports %v are guarded", c.Ports)
			}
		}
	}
	do("rm", "--force", "--time=0", "thief", "host")
	l.await("bridge=web@" + bridge)
	do("stop", "--time=0", "bridge")
	marker := run("marker", web)
	l.await("bridge=web@"+bridge, "marker=web@"+marker)
	do("rm", "--force", "--time=0", "bridge", "marker")
	l.await()
}

// removeHybrid removes the cgroups that were made beside the lab's on a hybrid layout.
func removeHybrid(root, name string) {
	var dirs []string
	tops, _ := filepath.Glob(filepath.Join(root, "*", name))
	for _, top := range tops {
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	for _, dir := range slices.Backward(dirs) {
		_ = os.Remove(dir)
	}
}

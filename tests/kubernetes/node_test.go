package kubernetes

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/tests/netlab"
)

func TestPodsOfANode(t *testing.T) {
	m := newMesh(t, false)
	m.install()
	m.intentions("api", map[string]string{"web": "allow", "edge": "allow"})
	m.create(
		pod{name: "web", account: "web", labels: meshed},
		pod{name: "api", account: "api", labels: meshed, annotations: map[string]string{"nodeproxy.io/exclude-inbound-ports": "9090"}, args: []string{"serve", ":8080", ":9090"}},
		pod{name: "other", account: "other", labels: meshed}, pod{name: "stranger", account: "default"})
	m.protected("shop/web", "shop/api", "shop/other")
	node := m.Members[0]
	vip, api := m.vip("api", 1), m.at("shop", "api")

	run := func(name string, test func(*mesh)) {
		t.Helper()
		t.Run(name, func(t *testing.T) { test(m.within(t)) })
	}
	run("an allowed pod reaches another, a denied one and a stranger do not", func(m *mesh) {
		m.reaches("shop/web", vip)
		m.reaches("shop/web", api)
		m.refused("shop/other", vip)
		m.refused("shop/other", api)
		m.refused("shop/stranger", api)
		m.takes(node, vip, "direct")
	})
	run("by mTLS, where a pod asks for it", func(m *mesh) {
		m.kubectl("-n", "shop", "label", "pod", "web", "nodeproxy.io/same-node=mtls")
		m.takes(node, vip, "mtls", "tunnel")
		m.refused("shop/other", vip)
	})
	run("the kubelet's probe is let in, a process of the node is not", func(m *mesh) {
		if out := m.dialFromNode(api); reached(out) {
			m.t.Errorf("a process of the node reaches the pod: %s", out)
		}
		m.kubectl("-n", "shop", "wait", "pod", "api", "--for", "condition=Ready", "--timeout", "1s")
	})
	run("an excluded port is everybody's", func(m *mesh) { m.reaches("shop/stranger", strings.Replace(api, ":8080", ":9090", 1)) })
	run("an intention that is changed holds at once", func(m *mesh) {
		m.intentions("api", map[string]string{"web": "deny", "edge": "allow"})
		m.refused("shop/web", vip)
		m.intentions("api", map[string]string{"web": "allow", "edge": "allow"})
		m.reaches("shop/web", vip)
	})
	run("a ClusterIP stands for its service", func(m *mesh) {
		m.kubectl("-n", "shop", "label", "pod", "api", "app=api")
		m.kubectl("create", "-f", m.write("service.json", `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "api", "namespace": "shop"},
"spec": {"clusterIP": "10.96.7.7", "selector": {"app": "api"}, "ports": [{"port": 80, "targetPort": 8080}]}}`))
		m.reaches("shop/web", "10.96.7.7:80")
		m.refused("shop/other", "10.96.7.7:80")
	})
	run("a label is removed and added while pods run", func(m *mesh) {
		m.kubectl("-n", "shop", "label", "pod", "api", "nodeproxy.io/mesh-")
		m.reaches("shop/stranger", api)
		m.kubectl("-n", "shop", "label", "pod", "api", "nodeproxy.io/mesh=enabled")
		m.refused("shop/stranger", api)
		m.reaches("shop/web", vip)
	})
	run("a namespace is labelled", func(m *mesh) {
		m.create(pod{name: "cart", namespace: "meshed", account: "cart"})
		cart := m.at("meshed", "cart")
		m.reaches("shop/stranger", cart)
		m.intentions("cart", map[string]string{"web": "allow"})
		m.kubectl("label", "namespace", "meshed", "nodeproxy.io/mesh=enabled")
		m.refused("shop/stranger", cart)
		m.reaches("shop/web", m.vip("cart", 1))
	})
	run("a pod with the node's network", func(m *mesh) {
		m.intentions("edge", map[string]string{"web": "allow"})
		m.create(pod{name: "edge", account: "edge", labels: meshed, more: `"hostNetwork": true,`, args: []string{"serve", ":7070"}})
		m.protected("shop/edge")
		m.reaches("shop/edge", vip)
		m.reaches("shop/web", m.vip("edge", 1))
		address := node.IPv4.String() + ":7070"
		m.refused("shop/stranger", address)
		if out := m.dialFromNode(address); reached(out) {
			m.t.Errorf("a process of the node reaches its guarded port: %s", out)
		}
	})
	run("a pod is replaced", func(m *mesh) {
		m.kubectl("-n", "shop", "delete", "pod", "api")
		m.create(pod{name: "api", account: "api", labels: meshed})
		m.protected("shop/api")
		m.refused("shop/stranger", m.at("shop", "api"))
		m.reaches("shop/web", m.vip("api", 1))
	})
	run("a Deployment is rolled over while it is called", testRollout)
	run("the daemon's pod is replaced, and what is pinned holds", testReplaced)
	run("the daemon hands over to the next pod while it is called", testSurge)
	run("the DaemonSet alone is deleted while Consul is away", testDaemonSetDeleted)
	run("what is deleted leaves nothing, while a daemon takes over", func(m *mesh) {
		m.update("and deleted at once", "started", "true") // it may not ask any more whether it is deleted
		m.uninstall()
		m.install()
		m.protected("shop/web")
	})
	run("what is deleted leaves nothing, after a hand-over", testDeleted)
}

const deployment = `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "api", "namespace": "shop"}, "spec": {"replicas": 2,
"selector": {"matchLabels": {"app": "replica"}}, "template": {"metadata": {"labels": {"app": "replica", "nodeproxy.io/mesh": "enabled"}}, "spec": {
"serviceAccountName": "api", "terminationGracePeriodSeconds": 10, "containers": [{"name": "app", "image": "app:lab", "args": ["serve", ":8080"], "ports": [{"containerPort": 8080}],
"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}, "lifecycle": {"preStop": {"sleep": {"seconds": 3}}}}]}}}}`

// testRollout replaces every instance of api, as a Deployment does, under load.
func testRollout(m *mesh) {
	m.kubectl("create", "-f", m.write("deployment.json", deployment))
	m.kubectl("-n", "shop", "delete", "pod", "api")
	m.kubectl("-n", "shop", "rollout", "status", "deployment/api", "--timeout", patience.String())
	vip := m.vip("api", 2)
	for _, same := range []string{"mtls", "direct"} {
		m.kubectl("-n", "shop", "label", "--overwrite", "pod", "web", "nodeproxy.io/same-node="+same)
		m.reaches("shop/web", vip)
		noneFailed := m.load(vip)
		m.kubectl("-n", "shop", "rollout", "restart", "deployment/api")
		m.kubectl("-n", "shop", "rollout", "status", "deployment/api", "--timeout", patience.String())
		m.await("the old pods are gone", func() error {
			if left := strings.Fields(m.kubectl("-n", "shop", "get", "pods", "-l", "app=replica", "-o", "name")); len(left) != 2 {
				return fmt.Errorf("there are %v", left)
			}
			return nil
		})
		m.t.Logf("same-node=%s: %s", same, noneFailed())
	}
}

// load has web make new connections to an address until noneFailed is called, which returns what it has to say.
func (m *mesh) load(to string) (noneFailed func() string) {
	m.t.Helper()
	stdin, stop := io.Pipe()
	load, err := m.StartKubectl(stdin, "-n", "shop", "exec", "-i", "web", "--", "/app", "load", "-n", "0", "-c", "2", "-pause", "20ms", to)
	m.must(err)
	return func() string {
		m.t.Helper()
		m.must(stop.Close())
		m.must(load.Wait(m.ctx()))
		out := load.Output()
		if !strings.Contains(out, " failed 0\n") {
			m.t.Errorf("connections failed: %s", out)
		}
		return out
	}
}

// stream opens a connection from web to an address, on which lines arrive until it is killed.
func (m *mesh) stream(to string) *netlab.Process {
	m.t.Helper()
	stream, err := m.StartKubectl(nil, "-n", "shop", "exec", "web", "--", "/app", "dial", "-timeout", "5m", to, "stream")
	m.must(err)
	m.must(stream.WaitOutput(m.ctx(), "a line"))
	return stream
}

// goesOn waits for more of a stream.
func (m *mesh) goesOn(stream *netlab.Process) {
	m.t.Helper()
	lines := strings.Count(stream.Output(), "a line")
	m.await("a live connection goes on", func() error {
		out := stream.Output()
		if strings.Count(out, "a line") < lines+100 {
			return errors.New(out[max(0, len(out)-300):])
		}
		return nil
	})
}

// surge rolls out a change of mesh.hcl, and returns when the next daemon of the node has taken over, and is ready.
func (m *mesh) surge(change string) {
	m.t.Helper()
	m.update(change, "ready", "true") // "rollout status" waits until the one before is gone
}

// update rolls out a change of mesh.hcl, and returns when a field of the next pod's status has a value.
func (m *mesh) update(change, field, value string) {
	m.t.Helper()
	before := m.kubectl("-n", "nodeproxy", "get", "pods", "-o", "jsonpath={.items[*].metadata.name}")
	path := filepath.Join(m.overlay, "mesh.hcl")
	text, err := os.ReadFile(path)
	m.must(err)
	m.must(os.WriteFile(path, append(text, "# "+change+"\n"...), 0o600))
	m.kubectl("apply", "-k", m.overlay)
	m.await("the next pod is "+field, func() error {
		out, err := m.Kubectl(m.ctx(), "-n", "nodeproxy", "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].`+field+`}{"\n"}{end}`)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if name, ok := strings.CutSuffix(line, " "+value+"\n"); ok && !strings.Contains(before, name) {
				return nil
			}
		}
		return fmt.Errorf("before there was %s, and now there are %s", before, out)
	})
}

// testSurge replaces the node's daemon while there are new and live connections, which it hands over.
func testSurge(m *mesh) {
	node, vip := m.Members[0], m.vip("api", 2)
	for _, same := range []string{"mtls", "direct"} {
		m.kubectl("-n", "shop", "label", "--overwrite", "pod", "web", "nodeproxy.io/same-node="+same)
		m.takes(node, vip, map[string][]string{"mtls": {"mtls", "tunnel"}, "direct": {"direct"}}[same]...)
		before, err := m.status(node)
		m.must(err)
		live := m.stream(vip)
		noneFailed := m.load(vip)
		m.surge(same)
		m.goesOn(live)
		live.Kill()
		m.await("the pod before is gone", func() error {
			if pods := strings.Fields(m.kubectl("-n", "nodeproxy", "get", "pods", "-o", "name")); len(pods) != 1 {
				return fmt.Errorf("there are %v", pods)
			}
			return nil
		})
		m.t.Logf("same-node=%s: %s", same, noneFailed())
		after, err := m.status(node)
		m.must(err)
		if h := after.Handover; h == nil || h.PID != before.PID || h.Draining {
			m.t.Errorf("process %d has the node from %+v, which was %d", after.PID, h, before.PID)
		}
		if restarts := m.kubectl("-n", "nodeproxy", "get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"); restarts != "0" {
			m.t.Errorf("containers of the pod were restarted %s times", restarts)
		}
	}
}

// testReplaced deletes the daemon's pod, which its DaemonSet makes anew.
func testReplaced(m *mesh) {
	api := m.kubectl("-n", "shop", "get", "pods", "-l", "app=replica", "-o", "jsonpath={.items[0].status.podIP}") + ":8080"
	stream := m.stream(m.vip("api", 2))
	before := m.kubectl("-n", "nodeproxy", "get", "pods", "-o", "name")
	m.kubectl("-n", "nodeproxy", "delete", "--wait=false", before)
	m.await("another daemon is ready", func() error {
		if out := m.dial("shop/stranger", api); reached(out) {
			m.t.Fatalf("meanwhile a stranger reaches a pod of the mesh: %s", out)
		}
		out, err := m.Kubectl(m.ctx(), "-n", "nodeproxy", "get", "pods", "-o", "jsonpath={range .items[*]}pod/{.metadata.name} {.status.containerStatuses[0].ready}{end}")
		if err == nil && (strings.Contains(out, before) || !strings.HasSuffix(out, " true")) {
			err = errors.New(out)
		}
		return err
	})
	m.reaches("shop/web", m.vip("api", 2))
	m.goesOn(stream)
	stream.Kill()
}

// testDaemonSetDeleted has the pod learn that it ends for good from its DaemonSet, which it may follow.
func testDaemonSetDeleted(m *mesh) {
	status, err := m.status(m.Members[0])
	m.must(err)
	for _, p := range status.Problems {
		if p.Kind == "kubernetes" {
			m.t.Errorf("there is a problem before: %+v", p)
		}
	}
	api := m.kubectl("-n", "shop", "get", "pods", "-l", "app=replica", "-o", "jsonpath={.items[0].status.podIP}") + ":8080"
	m.must(m.consul.Process.Signal(unix.SIGSTOP))
	m.kubectl("-n", "nodeproxy", "delete", "daemonset", "nodeproxy")
	m.unpinned()
	m.reaches("shop/stranger", api)
	m.must(m.consul.Process.Signal(unix.SIGCONT))
	m.install()
	m.refused("shop/stranger", api)
}

// unpinned waits until the first node has no pins.
func (m *mesh) unpinned() {
	m.t.Helper()
	m.await("the pins are gone", func() error {
		if _, err := os.Stat(m.Members[0].Inside("/sys/fs/bpf/nodeproxy")); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("they are there: %w", err)
		}
		return nil
	})
}

// testDeleted removes all that was installed, while a daemon that has handed over carries a connection still.
func testDeleted(m *mesh) {
	m.kubectl("-n", "shop", "label", "--overwrite", "pod", "web", "nodeproxy.io/same-node=mtls")
	m.takes(m.Members[0], m.vip("api", 2), "mtls", "tunnel")
	live := m.stream(m.vip("api", 2))
	defer live.Kill()
	m.surge("and deleted")
	m.goesOn(live)
	api := m.kubectl("-n", "shop", "get", "pods", "-l", "app=replica", "-o", "jsonpath={.items[0].status.podIP}") + ":8080"
	m.refused("shop/stranger", api)
	m.uninstall(func() {
		m.unpinned() // by the daemon that has the node
		live.Kill()
	})
	m.reaches("shop/stranger", api)
}

// uninstall deletes what was installed, and asserts that nothing of it is left on the nodes and in Consul.
func (m *mesh) uninstall(meanwhile ...func()) {
	m.t.Helper()
	var objects []netlab.BPFObject
	for _, n := range m.Members {
		if _, err := os.Stat(filepath.Join(n.Cgroups(), "nodeproxy-"+n.Name)); err == nil {
			m.t.Errorf("the daemon of %s did not find the cgroup of its container, and made another", n.Name)
		}
		pinned, err := netlab.Pinned(n.Inside("/sys/fs/bpf/nodeproxy"))
		m.must(err)
		if len(pinned) == 0 {
			m.t.Errorf("nothing is pinned at %s before", n.Name)
		}
		objects = append(objects, pinned...)
	}
	deleting, err := m.StartKubectl(nil, "delete", "-k", m.overlay, "--timeout", "2m")
	m.must(err)
	for _, f := range meanwhile {
		f()
	}
	m.must(deleting.Wait(m.ctx()))
	for _, n := range m.Members {
		if _, err := os.Stat(n.Inside("/sys/fs/bpf/nodeproxy")); !errors.Is(err, os.ErrNotExist) {
			left, _ := netlab.Pinned(n.Inside("/sys/fs/bpf/nodeproxy"))
			m.t.Errorf("%s has pins: %v, %v", n.Name, left, err)
		}
		m.must(filepath.WalkDir(n.Cgroups(), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return err
			}
			names := make([]byte, 4096)
			size, err := unix.Listxattr(path, names)
			if err == nil && strings.Contains(string(names[:size]), "nodeproxy") {
				m.t.Errorf("%s has attributes %q", path, names[:size])
			}
			if strings.HasPrefix(d.Name(), "nodeproxy-") {
				m.t.Errorf("there is a cgroup %s", path)
			}
			return nil
		}))
	}
	m.await("the kernel has nothing of it", func() error {
		for _, o := range objects {
			if o.Exists() {
				return fmt.Errorf("it has %s", o)
			}
		}
		return nil
	})
	var nodes []struct{ Node string }
	m.must(m.consul.Do(m.ctx(), http.MethodGet, "/v1/catalog/nodes", nil, &nodes))
	if len(nodes) != 1 {
		m.t.Errorf("Consul has the nodes %v", nodes)
	}
}

package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/kubelab"
)

// TestPodsOfTwoNodes is on a second node that has hierarchies of cgroups of version 1 beside version 2, where the machine has them.
func TestPodsOfTwoNodes(t *testing.T) {
	hybrid := len(kubelab.Hierarchies()) > 0
	if !hybrid {
		t.Log("the machine has cgroup2 alone, and so has the second node")
	}
	m := newMesh(t, false, hybrid)
	m.holding()
	m.install()
	m.intentions("api", map[string]string{"web": "allow"})
	m.create(
		pod{name: "web", account: "web", labels: meshed}, pod{name: "web-2", account: "web", labels: meshed, node: "node-2"},
		pod{name: "api", account: "api", labels: meshed, node: "node-2", more: `"readinessGates": [{"conditionType": "nodeproxy.io/protected"}],`},
		pod{name: "other", account: "other", labels: meshed}, pod{name: "stranger", account: "default"}, pod{name: "stranger-2", account: "default", node: "node-2"})
	m.protected("shop/web", "shop/other")
	second := m.Members[1]
	m.protectedAt(second, "shop/web-2", "shop/api")
	vip, api := m.vip("api", 1), m.at("shop", "api")

	run := func(name string, test func(*mesh)) {
		t.Helper()
		t.Run(name, func(t *testing.T) { test(m.within(t)) })
	}
	run("from node to node, by mTLS", func(m *mesh) {
		m.reaches("shop/web", vip)
		m.reaches("shop/web", api)
		m.refused("shop/other", vip)
		m.refused("shop/stranger", api)
		if paths := m.opened(second, "web", "api"); paths["mtls"]+paths["tunnel"] == 0 || paths["direct"]+paths["plaintext"] > 0 {
			m.t.Errorf("paths are %v", paths)
		}
	})
	run("within the second node", func(m *mesh) {
		m.reaches("shop/web-2", vip)
		m.refused("shop/stranger-2", api)
		m.kubectl("-n", "shop", "label", "pod", "api", "nodeproxy.io/mesh-")
		m.reaches("shop/stranger-2", api)
		m.kubectl("-n", "shop", "wait", "pod", "api", "--for", "condition=Ready=false", "--timeout", patience.String()) // its readiness gate
		m.kubectl("-n", "shop", "label", "pod", "api", "nodeproxy.io/mesh=enabled")
		m.refused("shop/stranger-2", api)
		m.reaches("shop/web", vip)
		m.kubectl("-n", "shop", "wait", "pod", "api", "--for", "condition=Ready", "--timeout", patience.String())
	})
	run("a pod starts protected", testStart)
	run("a pod ends", testEnd)
	run("the network configuration is rewritten", testRewritten)
	run("the runtime is restarted while no daemon runs", testRuntimeRestarted)
	run("a daemon that ends while the API server does not answer leaves what is pinned", testUnknown)
	run("what is deleted leaves nothing", func(m *mesh) {
		m.uninstall()
		for _, n := range m.Members {
			if text, err := os.ReadFile(n.Inside(kubelab.Network)); err != nil || !bytes.Equal(text, n.NetworkConfiguration()) {
				m.t.Errorf("the network configuration of %s is not what it was: %s, %v", n.Name, text, err)
			}
			if _, err := os.Stat(n.Inside("/opt/cni/bin/nodeproxy")); !errors.Is(err, os.ErrNotExist) {
				m.t.Errorf("the plugin is there on %s: %v", n.Name, err)
			}
		}
		m.reaches("shop/stranger", api)
		m.reaches("shop/stranger-2", api)
	})
}

// daemons prints the process ids of the daemons of the node, as the node has them.
const daemons = `for process in /proc/[0-9]*; do
  [ "$(readlink "$process/exe")" != /usr/bin/nodeproxy ] || echo "${process#/proc/}"
done
`

// testUnknown has the kubelet restart the daemon's container of the second node while nobody can say whether that is the end.
func testUnknown(m *mesh) {
	node, api := m.Members[1], m.at("shop", "api")
	name := m.kubectl("-n", "nodeproxy", "get", "pods", "--field-selector", "spec.nodeName="+node.Name, "-o", "jsonpath={.items[0].metadata.name}")
	before, err := node.Run(m.ctx(), "sh", "-c", daemons)
	m.must(err)
	m.must(m.SignalAPIServer(m.ctx(), syscall.SIGSTOP))
	defer func() { m.must(m.SignalAPIServer(m.ctx(), syscall.SIGCONT)) }()
	_, err = node.Run(m.ctx(), "kill", strings.TrimSpace(before))
	m.must(err)
	m.await("another daemon serves", func() error {
		out, err := node.Run(m.ctx(), built.program, "dial", "-timeout", "5s", api, "peer")
		if err == nil && reached(out) {
			m.t.Fatalf("meanwhile a process of the node reaches a pod of the mesh: %s", out)
		}
		return m.restarted(node, before)
	})
	m.await("its status names the outage, and has the pod as it was", func() error {
		out, err := node.Run(m.ctx(), built.nodeproxy, "status", "--json", "--socket", "/run/nodeproxy/admin.sock")
		if err != nil {
			return err
		}
		status := new(admin.Status)
		m.must(json.Unmarshal([]byte(out), status))
		isPod := func(w admin.Workload) bool { return w.Name == "pod shop/api" && w.State == "protected" }
		isOutage := func(p admin.Problem) bool { return p.Kind == "kubernetes" && strings.Contains(p.Text, "see that ") }
		if !slices.ContainsFunc(status.Workloads, isPod) || !slices.ContainsFunc(status.Problems, isOutage) {
			return fmt.Errorf("workloads are %+v, problems %+v", status.Workloads, status.Problems)
		}
		return nil
	})
	m.must(m.SignalAPIServer(m.ctx(), syscall.SIGCONT))
	m.await("the log says what would remove it", func() error {
		out, err := m.Kubectl(m.ctx(), "-n", "nodeproxy", "logs", "--previous", name)
		if err == nil && !strings.Contains(out, "nodeproxy cleanup --pins /sys/fs/bpf/nodeproxy --node node-2") {
			err = errors.New(out)
		}
		return err
	})
	m.protectedAt(node, "shop/api")
	m.reaches("shop/web", m.vip("api", 1))
}

// restarted is nil once a daemon that is not the one before serves the node.
func (m *mesh) restarted(node *kubelab.Node, before string) error {
	now, err := node.Run(m.ctx(), "sh", "-c", daemons)
	if err != nil || now == "" || strings.Contains(now, before) {
		return fmt.Errorf("daemons were %q and are %q: %w", before, now, err)
	}
	conn, err := node.Namespace.Dial(m.ctx(), "tcp", "127.0.0.1:20210")
	if err != nil {
		return err
	}
	return conn.Close()
}

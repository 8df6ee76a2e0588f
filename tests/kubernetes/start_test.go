package kubernetes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"nodeproxy.io/tests/kubelab"
)

// holding adds both components of deploy/kubernetes to the overlay, cni with the directory of the nodes' network configuration.
func (m *mesh) holding() {
	m.t.Helper()
	path := filepath.Join(m.overlay, "kustomization.yaml")
	text, err := os.ReadFile(path)
	m.must(err)
	m.must(os.WriteFile(path, append(text, `components: [../kubernetes/cni, ../kubernetes/readiness]
patches:
  - target: {kind: DaemonSet, name: nodeproxy}
    patch: |-
      apiVersion: apps/v1
      kind: DaemonSet
      metadata: {name: nodeproxy}
      spec: {template: {spec: {volumes: [{name: cni-conf, hostPath: {path: `+filepath.Dir(kubelab.Network)+`}}]}}}
`...), 0o600))
}

// plugins are the types of a node's network configuration, in order.
func (m *mesh) plugins(node *kubelab.Node) []string {
	m.t.Helper()
	text, err := os.ReadFile(node.Inside(kubelab.Network))
	m.must(err)
	var list struct{ Plugins []struct{ Type string } }
	m.must(json.Unmarshal(text, &list))
	var all []string
	for _, p := range list.Plugins {
		all = append(all, p.Type)
	}
	return all
}

// held waits until the nodes hold the start of pods.
func (m *mesh) held() {
	m.t.Helper()
	for _, n := range m.Members {
		m.await(n.Name+" holds the start of pods", func() error {
			if all := m.plugins(n); !slices.Equal(all, []string{"bridge", "nodeproxy"}) {
				return fmt.Errorf("its plugins are %v", all)
			}
			return nil
		})
	}
}

// knock calls every address of a node's pods from the node, in plaintext, over and over until answered is called, which returns who
// has answered.
func (m *mesh) knock(node *kubelab.Node) (answered func() []string) {
	ctx, stop := context.WithCancel(context.Background())
	var knocking sync.WaitGroup
	var mu sync.Mutex
	found := make(map[string]bool)
	address := node.Pods().Addr()
	for range 24 {
		address = address.Next()
		at := netip.AddrPortFrom(address, port).String()
		knocking.Go(func() {
			for ctx.Err() == nil {
				if answers(ctx, node, at) {
					mu.Lock()
					found[at] = true
					mu.Unlock()
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	return func() (all []string) {
		stop()
		knocking.Wait()
		for at := range found {
			all = append(all, at)
		}
		return all
	}
}

func answers(ctx context.Context, node *kubelab.Node, at string) bool {
	ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
	defer cancel()
	conn, err := node.Namespace.Dial(ctx, "tcp", at)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return false
	}
	text, _ := io.ReadAll(conn)
	return reached(string(text))
}

// testStart has pods start while somebody calls them, and pods that call at once.
func testStart(m *mesh) {
	m.held()
	for _, node := range m.Members {
		before := m.strangers(node)
		answered := m.knock(node)
		for n := range 2 {
			name := fmt.Sprintf("late-%d-%s", n, node.Name)
			m.create(pod{name: name, account: "edge", labels: meshed, node: node.Name})
			m.kubectl("-n", "shop", "delete", "--wait=false", "pod", name)
		}
		for _, at := range answered() {
			if !slices.Contains(before, at) {
				m.t.Errorf("%s: a pod at %s has answered in plaintext", node.Name, at)
			}
		}
	}
	for n := range 2 {
		name := fmt.Sprintf("eager-%d", n)
		m.kubectl("create", "-f", m.write("pod.json", pod{name: name, account: "web", labels: meshed, more: `"restartPolicy": "Never",`,
			args: []string{"dial", m.vip("api", 1), "peer"}}.manifest()))
		m.await(name+" has ended", func() error {
			out, err := m.Kubectl(m.ctx(), "-n", "shop", "get", "pod", name, "-o", "jsonpath={.status.phase}")
			if err == nil && out != "Succeeded" && out != "Failed" {
				err = errors.New(out)
			}
			return err
		})
		if out := m.kubectl("-n", "shop", "logs", name); !reached(out) {
			m.t.Errorf("the first call of %s failed: %s", name, out)
		}
		m.kubectl("-n", "shop", "delete", "--wait=false", "pod", name)
	}
}

// strangers are the addresses of a node's pods outside the mesh.
func (m *mesh) strangers(node *kubelab.Node) (all []string) {
	m.t.Helper()
	for ip := range strings.FieldsSeq(m.kubectl("-n", "shop", "get", "pods", "-l", "!nodeproxy.io/mesh", "--field-selector", "spec.nodeName="+node.Name, "-o", "jsonpath={.items[*].status.podIP}")) {
		all = append(all, fmt.Sprintf("%s:%d", ip, port))
	}
	return all
}

// testEnd deletes a pod that has a live connection, and takes its time to end, while another goes on.
func testEnd(m *mesh) {
	first, second := m.Members[0], m.Members[1]
	m.intentions("edge", map[string]string{"web": "allow"})
	m.create(pod{name: "stays", account: "edge", labels: meshed, node: second.Name})
	m.protectedAt(second, "shop/stays")
	m.vip("edge", 1) // those before are gone
	before := m.namespaces(second)
	m.create(pod{name: "ends", account: "edge", labels: meshed, node: second.Name, more: `"terminationGracePeriodSeconds": 60,`, preStop: 20})
	vip, callers := m.vip("edge", 2), []string{"web", "web-2"}
	live := m.stream(m.at("shop", "ends"))
	defer live.Kill()
	m.await("both pods are called from both nodes", func() error {
		for _, caller := range callers {
			m.noneFails(caller, vip, 20)
		}
		if ends, stays := m.answered("ends"), m.answered("stays"); ends == 0 || stays == 0 {
			return fmt.Errorf("%d and %d calls", ends, stays)
		}
		return nil
	})
	noneFailed := m.load(vip)
	m.kubectl("-n", "shop", "delete", "--wait=false", "pod", "ends")
	m.await("the other node knows that it ends", func() error {
		status, err := m.status(first)
		if err != nil {
			return err
		}
		for _, s := range status.Services {
			for _, i := range s.Instances {
				if s.Name == "edge" && !i.Healthy {
					return nil
				}
			}
		}
		return errors.New("it has no unhealthy instance")
	})
	m.t.Log(noneFailed())
	called := m.answered("ends")
	for _, caller := range callers {
		m.noneFails(caller, vip, 50)
	}
	if n := m.answered("ends") - called; n > 0 {
		m.t.Errorf("%d of 100 calls went to the pod that ends", n)
	}
	m.goesOn(live)
	if out := m.kubectl("-n", "shop", "get", "pod", "ends", "-o", "jsonpath={.metadata.deletionTimestamp} {.status.phase}"); !strings.HasSuffix(out, " Running") || strings.HasPrefix(out, " ") {
		m.t.Errorf("meanwhile the pod is %q", out)
	}
	m.await("nothing keeps its network namespace", func() error {
		_, err := m.Kubectl(m.ctx(), "-n", "shop", "get", "pod", "ends")
		if now := m.namespaces(second); err == nil || now != before {
			return fmt.Errorf("the daemon has %d, before it had %d; its pod: %w", now, before, err)
		}
		return nil
	})
}

// noneFails has a pod call an address a number of times.
func (m *mesh) noneFails(from, to string, n int) {
	m.t.Helper()
	out := m.kubectl("-n", "shop", "exec", from, "--", "/app", "load", "-n", fmt.Sprint(n), to)
	if want := fmt.Sprintf("done %d failed 0", n); out != want {
		m.t.Errorf("%s says %q, want %q", from, out, want)
	}
}

// answered is how many calls a pod has answered, probes not counted.
func (m *mesh) answered(name string) int {
	m.t.Helper()
	return strings.Count(m.kubectl("-n", "shop", "logs", name), " by peer: ")
}

// namespaces is how many network namespaces the daemon of a node keeps.
func (m *mesh) namespaces(node *kubelab.Node) (n int) {
	m.t.Helper()
	out, err := node.Run(m.ctx(), "sh", "-c", "for pid in $("+daemons+"); do for file in /proc/$pid/fd/*; do readlink $file || true; done; done") // one may be closed meanwhile
	m.must(err)
	return strings.Count(out, "net:[")
}

// testRewritten has somebody else replace the network configuration, as the installers of networks do.
func testRewritten(m *mesh) {
	node := m.Members[0]
	text, err := os.ReadFile(node.Inside(kubelab.Network))
	m.must(err)
	m.must(os.WriteFile(node.Inside(kubelab.Network), bytes.Replace(text, []byte(`"nodeproxy"`), []byte(`"loopback"`), 1), 0o600))
	m.await("it is added again, after what the other one has added", func() error {
		if all := m.plugins(node); !slices.Equal(all, []string{"bridge", "loopback", "nodeproxy"}) {
			return fmt.Errorf("plugins are %v", all)
		}
		return nil
	})
	m.must(os.WriteFile(node.Inside(kubelab.Network), node.NetworkConfiguration(), 0o600))
	m.held()
}

// testRuntimeRestarted has the pods of a node made anew while no daemon runs there.
func testRuntimeRestarted(m *mesh) {
	node := m.Members[0]
	strangers := m.strangers(node)
	m.absent(node, true)
	answered := m.knock(node)
	m.must(node.RestartRuntime(m.ctx()))
	m.create(pod{name: "newcomer", account: "default"})
	m.kubectl("create", "-f", m.write("pod.json", pod{name: "held", account: "edge", labels: meshed}.manifest()))
	m.await("who is not labelled runs again", func() error {
		for _, at := range m.strangers(node) {
			if !answers(m.ctx(), node, at) {
				return fmt.Errorf("%s does not answer", at)
			}
		}
		return nil
	})
	for _, name := range []string{"held", "web", "other"} {
		m.await(name+" does not start, and an event says why", func() error {
			out, err := m.Kubectl(m.ctx(), "-n", "shop", "get", "events", "--field-selector", "reason=FailedCreatePodSandBox,involvedObject.name="+name, "-o", "jsonpath={.items[*].message}")
			if err == nil && !strings.Contains(out, "no nodeproxy runs on this node: see that the pod of DaemonSet nodeproxy") {
				err = errors.New(out)
			}
			return err
		})
	}
	strangers = append(strangers, m.strangers(node)...)
	for _, at := range answered() {
		if !slices.Contains(strangers, at) {
			m.t.Errorf("%s has answered in plaintext; strangers are %v", at, strangers)
		}
	}
	m.absent(node, false)
	m.protected("shop/web", "shop/other", "shop/held")
	m.refused("shop/stranger", m.at("shop", "held"))
	m.kubectl("-n", "shop", "delete", "pod", "held", "newcomer")
	m.reaches("shop/web", m.vip("api", 1))
}

// absent keeps the DaemonSet from a node, or no more.
func (m *mesh) absent(node *kubelab.Node, absent bool) {
	m.t.Helper()
	value := `null`
	if absent {
		value = `{"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [
{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["` + node.Name + `"]}]}]}}}`
	}
	m.kubectl("-n", "nodeproxy", "patch", "daemonset", "nodeproxy", "--patch", `{"spec": {"template": {"spec": {"affinity": `+value+`}}}}`)
	m.kubectl("-n", "nodeproxy", "rollout", "status", "daemonset/nodeproxy", "--timeout", patience.String())
	if absent {
		m.await("no daemon runs", func() error {
			if out, err := node.Run(m.ctx(), "sh", "-c", daemons); err != nil || out != "" {
				return fmt.Errorf("%s: %w", out, err)
			}
			return nil
		})
	}
}

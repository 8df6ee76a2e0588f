package kubernetes

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/tests/netlab"
)

const node = "node-1.internal"

// cluster is an API server, a Cluster that follows it, and cgroups made as a kubelet makes them.
type cluster struct {
	*apiServer
	*Cluster
	mount string
	t     *testing.T

	mu     sync.Mutex
	claims []workload.Claim
	spoken bool
	defs   catalog.Definitions
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes a Kubernetes API server")
	}
	lab := netlab.ForTest(t)
	c := &cluster{t: t, apiServer: startAPIServer(t), mount: lab.Cgroup().Path()}
	c.mkdir("kubelet/kubepods")
	var err error
	c.Cluster, err = New(Config{
		Node: node, Kubeconfig: c.kubeconfig, Mount: c.mount, Log: slog.New(slog.DiscardHandler), StateFile: c.stateFile(),
		DaemonSet:  DaemonSet{"elsewhere", "nodeproxy"},
		Namespaces: map[string][]string{"shop": {"web", "cart"}, "meshed": {"web"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		err := c.Run(ctx, func(claims []workload.Claim) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.claims, c.spoken = slices.Clone(claims), true
		})
		if err != nil {
			t.Error(err)
		}
	})
	running.Go(func() { c.FollowDaemonSet(ctx) })
	running.Go(func() {
		c.Definitions().Run(ctx, func(defs catalog.Definitions) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.defs = defs
		})
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return c
}

func (c *cluster) mkdir(below string) string {
	c.t.Helper()
	path := filepath.Join(c.mount, below)
	if err := os.MkdirAll(path, 0o755); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// of returns the claims of a pod.
func (c *cluster) of(p *corev1.Pod) (all []workload.Claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dashed, uid := string(p.UID), strings.ReplaceAll(string(p.UID), "-", "_")
	for _, claim := range c.claims {
		if strings.Contains(claim.Cgroup, dashed) || strings.Contains(claim.Cgroup, uid) {
			all = append(all, claim)
		}
	}
	return all
}

func (c *cluster) expect(t *testing.T, p *corev1.Pod, what string, holds func([]workload.Claim) bool) workload.Claim {
	t.Helper()
	var got []workload.Claim
	defer func() {
		if t.Failed() {
			t.Logf("%s: %+v; problem: %v", p.Name, got, c.Problem())
		}
	}()
	within(t, patience, what, func() bool {
		got = c.of(p)
		return holds(got)
	})
	if len(got) == 0 {
		return workload.Claim{}
	}
	return got[0]
}

func (c *cluster) granted(t *testing.T, p *corev1.Pod, service string) workload.Claim {
	t.Helper()
	return c.expect(t, p, fmt.Sprintf("pod %s is claimed as %s", p.Name, service), func(all []workload.Claim) bool {
		return len(all) == 1 && all[0].Service == service && all[0].Denied == "" && all[0].Invalid == ""
	})
}

func (c *cluster) denied(t *testing.T, p *corev1.Pod, why ...string) {
	t.Helper()
	claim := c.expect(t, p, "a refusal is claimed", func(all []workload.Claim) bool { return len(all) == 1 && all[0].Denied+all[0].Invalid != "" })
	if want := "pod " + p.Namespace + "/" + p.Name; claim.Name != want {
		t.Errorf("it is called %q, want %q", claim.Name, want)
	}
	for _, want := range why {
		if !strings.Contains(claim.Denied+claim.Invalid, want) {
			t.Errorf("the reason is %q, want one with %q", claim.Denied+claim.Invalid, want)
		}
	}
}

func (c *cluster) unclaimed(t *testing.T, p *corev1.Pod) {
	t.Helper()
	c.expect(t, p, fmt.Sprintf("pod %s is not claimed", p.Name), func(all []workload.Claim) bool { return len(all) == 0 })
}

// TestPods shares one API server among its cases: it takes seconds to start.
func TestPods(t *testing.T) {
	c := startCluster(t)
	c.namespace("shop", nil)
	c.namespace("meshed", map[string]string{prefix + "mesh": "enabled", prefix + "mode": "permissive"})
	c.namespace("elsewhere", nil)
	for _, part := range []struct {
		name string
		run  func(*testing.T, *cluster)
	}{
		{"a label at the pod", testPodLabel},
		{"a label at the namespace", testNamespaceLabel},
		{"who may be what", testRefusals},
		{"a sidecar of its own", testInjected},
		{"cgroups of both drivers", testCgroups},
		{"a pod that is gone with a process that is not", testLingering},
		{"ports and probes", testPorts},
		{"registered as instances", testDefinitions},
		{"ClusterIPs", testClusterIPs},
		{"the API server stops and starts", testOutage},
		{"pods start", testStarting},
		{"readiness gates", testGates},
		{"the DaemonSet of its own", testDaemonSet},
		{"the DaemonSet, which it may not follow", testDaemonSetForbidden},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(t, c) })
	}
}

func testPodLabel(t *testing.T, c *cluster) {
	p := c.pod("shop", "web-1", "web", labelled("mesh=observe"), annotated("exclude-outbound-ports=3306,5432"))
	claim := c.granted(t, p, "web")
	if claim.Mesh != workload.Observe || !slices.Equal(claim.Exclude.OutboundPorts, []uint16{3306, 5432}) || claim.Provider != "kubernetes" {
		t.Errorf("claim = %+v", claim)
	}
	c.patch("shop", "pods", "web-1", `{"metadata": {"labels": {"nodeproxy.io/mesh": "enabled"}}}`, p)
	c.expect(t, p, "it is in the mesh", func(all []workload.Claim) bool { return len(all) == 1 && all[0].Mesh == workload.Enabled })
	c.patch("shop", "pods", "web-1", `{"metadata": {"labels": {"nodeproxy.io/mesh": null}}}`, p)
	c.unclaimed(t, p)
	c.patch("shop", "pods", "web-1", `{"metadata": {"labels": {"nodeproxy.io/mesh": "yes"}}}`, p)
	c.denied(t, p, `"yes"`, "enabled or observe or disabled")
	c.remove(p)
	c.unclaimed(t, p)
}

func testNamespaceLabel(t *testing.T, c *cluster) {
	p := c.pod("meshed", "web-2", "web")
	out := c.pod("meshed", "web-3", "web", labelled("mesh=disabled"))
	strict := c.pod("meshed", "web-4", "web", labelled("mode=strict"))
	if claim := c.granted(t, p, "web"); claim.Mode == nil || *claim.Mode != workload.Permissive {
		t.Errorf("the namespace's mode does not hold: %+v", claim)
	}
	if claim := c.granted(t, strict, "web"); claim.Mode == nil || *claim.Mode != workload.Strict {
		t.Errorf("the pod's mode does not hold: %+v", claim)
	}
	c.unclaimed(t, out)
	c.patch("", "namespaces", "meshed", `{"metadata": {"labels": {"nodeproxy.io/mesh": null}}}`, nil)
	c.unclaimed(t, p)
	c.patch("", "namespaces", "meshed", `{"metadata": {"labels": {"nodeproxy.io/mesh": "enabled"}}}`, nil)
	c.granted(t, p, "web")
	for _, p := range []*corev1.Pod{p, out, strict} {
		c.remove(p)
	}
}

func testRefusals(t *testing.T, c *cluster) {
	account := c.pod("shop", "thief-1", "intruder", labelled("mesh=enabled"))
	named := c.pod("shop", "thief-2", "cart", labelled("mesh=enabled", "service=web"))
	foreign := c.pod("elsewhere", "thief-3", "web", labelled("mesh=enabled"))
	further := c.pod("shop", "thief-4", "cart", labelled("mesh=enabled"), annotated("service=cart,web"))
	unknown := c.pod("shop", "typo-1", "cart", labelled("mesh=enabled", "mod=strict"))
	c.denied(t, account, `service account "intruder"`, `namespace "shop"`)
	c.denied(t, named, `service "web"`, `service account "cart"`)
	c.denied(t, foreign, `namespace "elsewhere"`)
	c.denied(t, further, `service "cart,web"`)
	c.denied(t, unknown, `label "mod" is unknown`)
	own := c.pod("shop", "cart-1", "cart", labelled("mesh=enabled", "service=cart"))
	c.granted(t, own, "cart")
	for _, p := range []*corev1.Pod{account, named, foreign, further, unknown, own} {
		c.remove(p)
	}
}

func testInjected(t *testing.T, c *cluster) {
	consul := c.pod("shop", "injected-1", "web", labelled("mesh=enabled"), annotated("consul.hashicorp.com/connect-inject-status=injected"))
	istio := c.pod("shop", "injected-2", "web", labelled("mesh=enabled"), func(p *corev1.Pod) {
		p.Spec.InitContainers = []corev1.Container{{Name: "istio-proxy", Image: "proxy", RestartPolicy: new(corev1.ContainerRestartPolicyAlways)}}
	})
	c.denied(t, consul, "consul-k8s")
	c.denied(t, istio, "Istio")
	c.remove(consul)
	c.remove(istio)
}

func testCgroups(t *testing.T, c *cluster) {
	burstable := func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("8Mi")}
	}
	guaranteed := func(p *corev1.Pod) {
		all := corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("8Mi"), corev1.ResourceCPU: resource.MustParse("10m")}
		p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: all, Limits: all}
	}
	for below, option := range map[string]func(*corev1.Pod){
		"besteffort/pod%s": func(*corev1.Pod) {}, "burstable/pod%s": burstable, "pod%s": guaranteed,
	} {
		p := c.pod("shop", "placed", "web", labelled("mesh=enabled"), option)
		want := filepath.Join(c.mount, "kubelet/kubepods", fmt.Sprintf(below, p.UID))
		if claim := c.granted(t, p, "web"); claim.Cgroup != want { // before it exists
			t.Errorf("cgroup = %s, want %s", claim.Cgroup, want)
		}
		c.mkdir("kubelet/kubepods/" + fmt.Sprintf(below, p.UID) + "/container")
		if claim := c.granted(t, p, "web"); claim.Cgroup != want {
			t.Errorf("cgroup = %s, want %s", claim.Cgroup, want)
		}
		c.remove(p)
		c.unclaimed(t, p)
	}
	// With another kubelet's directory it may be in either, until it is there.
	systemd := c.mkdir("node2.slice/node2-kubepods.slice")
	p := c.pod("shop", "placed", "web", labelled("mesh=enabled"), burstable)
	want := filepath.Join(systemd, "node2-kubepods-burstable.slice", "node2-kubepods-burstable-pod"+strings.ReplaceAll(string(p.UID), "-", "_")+".slice")
	c.expect(t, p, "both places are claimed", func(all []workload.Claim) bool { return len(all) == 2 && all[1].Cgroup == want })
	if err := os.MkdirAll(want, 0o755); err != nil {
		t.Fatal(err)
	}
	if claim := c.granted(t, p, "web"); claim.Cgroup != want {
		t.Errorf("cgroup = %s, want %s", claim.Cgroup, want)
	}
	c.remove(p)
	for dir := want; dir != c.mount; dir = filepath.Dir(dir) {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}
}

func testLingering(t *testing.T, c *cluster) {
	for _, end := range []func(*corev1.Pod){c.remove, func(p *corev1.Pod) { c.patchStatus(p, `{"status": {"phase": "Failed"}}`) }} {
		p := c.pod("shop", "ending", "web", labelled("mesh=enabled"))
		process := c.process(t, c.mkdir("kubelet/kubepods/besteffort/pod"+string(p.UID)+"/container"))
		c.granted(t, p, "web")
		other := c.pod("shop", "marker", "cart", labelled("mesh=enabled"))
		end(p)
		c.remove(other)
		c.unclaimed(t, other) // by now its end is known too
		c.granted(t, p, "web")
		stop(process)
		c.unclaimed(t, p)
		if p.Status.Phase == corev1.PodFailed {
			c.remove(p)
		}
	}
}

// process is one that does nothing, in a cgroup.
func (c *cluster) process(t *testing.T, cgroup string) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(cmd) })
	return cmd
}

func testPorts(t *testing.T, c *cluster) {
	p := c.pod("shop", "ports", "web", labelled("mesh=enabled", "ports=9999"), func(p *corev1.Pod) {
		app := &p.Spec.Containers[0]
		app.Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {ContainerPort: 53, Protocol: corev1.ProtocolUDP}}
		app.ReadinessProbe = probe(corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("http")}})
		app.LivenessProbe = probe(corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8081)}})
		app.StartupProbe = probe(corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 8082}})
		p.Spec.InitContainers = []corev1.Container{{Name: "sidecar", Image: "sidecar", RestartPolicy: new(corev1.ContainerRestartPolicyAlways),
			LivenessProbe: probe(corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(8083), Host: "192.0.2.1"}})}}
	})
	claim := c.granted(t, p, "web")
	if want := []uint16{8080, 9999}; !slices.Equal(claim.Ports, want) {
		t.Errorf("ports = %v, want %v", claim.Ports, want)
	}
	if want := []uint16{8080, 8081, 8082}; !slices.Equal(claim.Probed, want) {
		t.Errorf("probed = %v, want %v", claim.Probed, want)
	}
	c.remove(p)
}

func probe(h corev1.ProbeHandler) *corev1.Probe { return &corev1.Probe{ProbeHandler: h} }

func testOutage(t *testing.T, c *cluster) {
	p := c.pod("shop", "survivor", "web", labelled("mesh=enabled", "mode=permissive"))
	c.process(t, c.mkdir("kubelet/kubepods/besteffort/pod"+string(p.UID)+"/container"))
	c.granted(t, p, "web")
	other := c.pod("shop", "outcast", "cart", labelled("mesh=enabled"))
	c.mkdir("kubelet/kubepods/besteffort/pod" + string(other.UID))
	c.granted(t, other, "cart")
	if err := c.Problem(); err != nil {
		t.Fatalf("there is a problem before there should be: %v", err)
	}
	c.stopServer()
	within(t, patience, "the problem is reported", func() bool { return c.Problem() != nil })
	if err := c.Problem(); !strings.Contains(err.Error(), "enrolled pods stay enrolled") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("the problem does not say what to do: %v", err)
	}
	c.granted(t, p, "web")
	c.recalled(t, p)
	c.startServer()
	if err := c.Check(t.Context()); err != nil {
		t.Error(err)
	}
	late := c.pod("shop", "latecomer", "cart", labelled("mesh=enabled"))
	c.granted(t, late, "cart")
	c.granted(t, p, "web")
	within(t, patience, "the problem is over", func() bool { return c.Problem() == nil })
}

func (c *cluster) stateFile() string { return filepath.Join(c.dir, "pods.json") }

// recalled asserts what a daemon claims that starts now, while the API server is away, and may not claim all that is
// remembered: p alone.
func (c *cluster) recalled(t *testing.T, p *corev1.Pod) {
	t.Helper()
	next, err := New(Config{Node: node, Kubeconfig: c.kubeconfig, Mount: c.mount, Log: slog.New(slog.DiscardHandler), StateFile: c.stateFile(),
		Namespaces: map[string][]string{"shop": {"web"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "may list and watch") {
		t.Errorf("a check says %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan []workload.Claim, 1)
	var running sync.WaitGroup
	running.Go(func() {
		if err := next.Run(ctx, func(claims []workload.Claim) { told <- claims }); err != nil {
			t.Error(err)
		}
	})
	select {
	case claims := <-told:
		if want := c.of(p); len(want) != 1 || !reflect.DeepEqual(claims, want) {
			t.Errorf("it claims %+v, want %+v", claims, want)
		}
	case <-time.After(patience):
		t.Error("it claims nothing")
	}
	within(t, patience, "it says that the API server is away", func() bool { return next.Problem() != nil })
	cancel()
	running.Wait()
}

package consul

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/kubelab"
	"nodeproxy.io/tests/netlab"
)

// pods is an agentless mesh on whose second node a Kubernetes API server runs. There is no kubelet: the tests bind pods to
// the node, make their cgroups, and listen where a kubelet would.
type pods struct {
	*agentless
	cgroup  *netlab.Cgroup // of pods without resources
	dir     string
	server  func(port int) *netlab.Process // starts an API server, and returns when it is ready
	serving *netlab.Process                // the one that the daemon asks
}

// apiPort is where the daemon asks.
const apiPort = 6443

func newPods(t *testing.T) *pods {
	m := newAgentless(t, Config{Open: true}, fmt.Sprintf("addresses = [\"http://%s:8500\"]", firstNode))
	return m.withPods("api")
}

// withPods starts an API server, whose pods in namespace shop may be one service.
func (m *agentless) withPods(service string) *pods {
	m.t.Helper()
	t, p := m.t, &pods{agentless: m, dir: m.t.TempDir()}
	node := p.Nodes[1]
	start := func(path string, args ...string) *netlab.Process {
		started, err := p.Lab.Start(netlab.Command{Path: path, Args: args, Namespace: node.Namespace})
		p.must(err)
		return started
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	p.must(err)
	accounts := p.write("accounts.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	p.write("kubeconfig", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "test",
"clusters": [{"name": "test", "cluster": {"server": "https://127.0.0.1:%d", "insecure-skip-tls-verify": true}}],
"users": [{"name": "test", "user": {"token": "secret"}}],
"contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}`, apiPort))
	start("etcd", "--data-dir", filepath.Join(p.dir, "etcd"), "--unsafe-no-fsync")
	tokens := p.write("tokens", "secret,admin,1,system:masters\n")
	p.server = func(port int) *netlab.Process {
		server := start(kubelab.Program(t, "kube-apiserver"), "--etcd-servers", "http://127.0.0.1:2379", "--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(port),
			"--cert-dir", filepath.Join(p.dir, "certificates"), "--service-cluster-ip-range", "10.96.0.0/16", "--endpoint-reconciler-type", "none",
			"--service-account-key-file", accounts, "--service-account-signing-key-file", accounts, "--service-account-issuer", "https://kubernetes.test",
			"--token-auth-file", tokens, "--authorization-mode", "RBAC",
			"--advertise-address", node.IPv4.String(), "--disable-admission-plugins", "ServiceAccount")
		p.await("the API server is ready", func() error {
			_, err := p.kubectl("--server", fmt.Sprintf("https://127.0.0.1:%d", port), "get", "--raw", "/readyz")
			return err
		})
		return server
	}
	p.Daemons[1].Labels += fmt.Sprintf("  kubernetes {\n    enabled    = true\n    kubeconfig = %q\n    namespace \"shop\" {\n      services = [%q]\n    }\n  }\n",
		filepath.Join(p.dir, "kubeconfig"), service)
	p.serving = p.server(apiPort)
	kubepods, err := node.Cgroup.Child("kubepods")
	p.must(err)
	p.cgroup, err = kubepods.Child("besteffort")
	p.must(err)
	p.do("create", "namespace", "shop")
	return p
}

func (p *pods) write(name, text string) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	p.must(os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (p *pods) kubectl(args ...string) (string, error) {
	args = append([]string{"--kubeconfig", filepath.Join(p.dir, "kubeconfig")}, args...)
	return p.Lab.Run(p.ctx(), netlab.Command{Path: kubelab.Program(p.t, "kubectl"), Args: args, Namespace: p.Nodes[1].Namespace})
}

func (p *pods) do(args ...string) string {
	p.t.Helper()
	out, err := p.kubectl(args...)
	if err != nil {
		p.t.Fatalf("kubectl %s: %v: %s", args, err, out)
	}
	return out
}

// pod makes a pod on the second node, in the mesh, with a readiness probe at port.
func (p *pods) pod(name, account string) *netlab.Workload {
	p.t.Helper()
	node := p.Nodes[1]
	ns, ip, _, err := node.Pod()
	p.must(err)
	p.do("create", "-f", p.write(name+".json", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod",
"metadata": {"name": %q, "namespace": "shop", "labels": {"nodeproxy.io/mesh": "enabled"}},
"spec": {"nodeName": %q, "serviceAccountName": %q, "containers": [{"name": "app", "image": "app", "ports": [{"containerPort": %[4]d}], "readinessProbe": {"tcpSocket": {"port": %[4]d}}}]}}`,
		name, node.Name, account, port)))
	uid := p.do("-n", "shop", "get", "pod", name, "-o", "jsonpath={.metadata.uid}")
	cgroup, err := p.cgroup.Child("pod" + uid)
	p.must(err)
	return &netlab.Workload{Name: name, Node: node, Namespace: ns, Cgroup: cgroup, IPv4: ip}
}

// status says of a pod what its kubelet would.
func (p *pods) status(w *netlab.Workload, ready string) {
	p.t.Helper()
	p.do("-n", "shop", "patch", "pod", w.Name, "--subresource=status", "--type=merge", "-p",
		fmt.Sprintf(`{"status": {"phase": "Running", "podIP": %[1]q, "podIPs": [{"ip": %[1]q}], "conditions": [{"type": "Ready", "status": %[2]q}]}}`, w.IPv4, ready))
}

// web makes a workload on the first node that may call api, and may be called by it.
func (p *pods) web() *netlab.Workload {
	p.t.Helper()
	p.must(p.agents[0].Intentions(p.ctx(), "api", map[string]string{"web": "allow"}))
	p.must(p.agents[0].Intentions(p.ctx(), "web", map[string]string{"api": "allow"}))
	token, err := p.agents[0].NewToken(p.ctx(), "node-1", rules(p.t, "node-1", "web"))
	p.must(err)
	p.must(os.WriteFile(p.tokenFile(0), []byte(token), 0o600))
	p.Daemons[0].Source = fmt.Sprintf("source \"consul\" {\n  token_file = %q\n}\n", p.tokenFile(0))
	return p.place(0, "web")
}

func TestPodsAreInstancesOfTheirServices(t *testing.T) {
	m := newPods(t)
	web := m.web()
	kubelet, err := m.Nodes[1].HostWorkload("kubelet")
	m.must(err)
	stranger, err := m.Nodes[1].HostWorkload("stranger")
	m.must(err)
	m.serves(kubelet, programs.app, "serve", ":10250")
	api := m.pod("api-0", "api")
	m.serves(api, programs.app, "serve", fmt.Sprintf(":%d", port))
	m.serves(api, programs.app, "serve", fmt.Sprintf(":%d", unchecked))
	m.do("create", "-f", m.write("service.json", fmt.Sprintf(`{"apiVersion": "v1", "kind": "List", "items": [
{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "10.96.5.5", "ports": [{"port": 80, "targetPort": %[1]d}]}},
{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
"addressType": "IPv4", "ports": [{"port": %[1]d, "name": ""}], "endpoints": [{"addresses": [%[2]q]}]}]}`, port, web.IPv4)))
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
	}
	m.status(api, "True")

	m.inCatalog("node-proxy", "api-0-api", "api-0-api-sidecar-proxy")
	m.statusesAre(map[string]string{"nodeproxy": "passing", "api-0-api:0": "passing", "api-0-api-sidecar-proxy-app": "passing"})
	m.eventually("web reaches api", web, m.vip(0, "api"), reached)
	m.eventually("api reaches web", api, m.vip(1, "web"), reached)
	m.eventually("api reaches web by its ClusterIP", api, "10.96.5.5:80", reached)

	at := func(port int) string { return netip.AddrPortFrom(api.IPv4, uint16(port)).String() }
	m.await("the kubelet's probe passes", func() error {
		if ok, out := m.echoes(kubelet, at(port)); !ok {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if ok, out := m.echoes(stranger, at(port)); ok {
		t.Errorf("a process of the node reaches the pod: %s", out)
	}
	if ok, out := m.echoes(kubelet, at(unchecked)); ok {
		t.Errorf("the kubelet reaches a port without a probe: %s", out)
	}

	m.status(api, "False")
	m.statusesAre(map[string]string{"nodeproxy": "passing", "api-0-api:0": "critical", "api-0-api-sidecar-proxy-app": "critical"})
	m.do("-n", "shop", "label", "pod", "api-0", "nodeproxy.io/mesh-")
	m.inCatalog("node-proxy")
	m.await("the pod is left alone", func() error {
		if ok, out := m.echoes(stranger, at(port)); !ok {
			return fmt.Errorf("%s", out)
		}
		return nil
	})

	m.thief("shop", "thief", "web", "")
	status, err := m.Daemons[1].Await(m.ctx(), func(s *admin.Status) error {
		for _, r := range s.Refused {
			if r.Name == "pod shop/thief" && strings.Contains(r.Why, `service account "web"`) {
				return nil
			}
		}
		return fmt.Errorf("refused are %+v", s.Refused)
	})
	m.must(err)
	for _, c := range status.Certificates {
		if c.Service == "web" {
			t.Errorf("a certificate was fetched for a pod that may not be web: %+v", c)
		}
	}
}

// thief makes a pod that asks for what the configuration does not grant it: with a service account, and a label that names a service
// unless that is "".
func (p *pods) thief(namespace, name, account, service string) {
	p.t.Helper()
	labels := `"nodeproxy.io/mesh": "enabled"`
	if service != "" {
		labels += fmt.Sprintf(`, "nodeproxy.io/service": %q`, service)
	}
	p.do("create", "-f", p.write(name+".json", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": %q, "namespace": %q, "labels": {%s}},
"spec": {"nodeName": %q, "serviceAccountName": %q, "containers": [{"name": "app", "image": "app"}]}}`, name, namespace, labels, p.Nodes[1].Name, account)))
}

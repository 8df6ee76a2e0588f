package kubernetes

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/kubelab"
	"nodeproxy.io/tests/netlab"
)

// patience is how long a test waits for what must happen. It is long because the machine may be busy.
const patience = 60 * time.Second

const port = 8080

// services are what pods of the namespace shop may be.
var services = []string{"web", "api", "other", "edge"}

// mesh is a cluster with a Consul server on its first node, whose ACLs deny by default, and deploy/kubernetes.
type mesh struct {
	*kubelab.Cluster
	t       *testing.T
	consul  *consul.Agent
	overlay string // the directory of the kustomization
}

func newMesh(t *testing.T, hybrid ...bool) *mesh {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: a Kubernetes cluster")
	}
	netlab.Lacks(t, kubelab.Missing()...)
	consul.Require(t)
	m := &mesh{t: t}
	var err error
	m.Cluster, err = kubelab.Start(m.ctx(), kubelab.Config{Hybrid: hybrid, Images: []string{built.image, built.app}})
	m.must(err)
	t.Cleanup(m.finish)
	m.startConsul()
	m.overlay = filepath.Join(m.Dir(), "overlay")
	m.must(os.CopyFS(filepath.Join(m.Dir(), "kubernetes"), os.DirFS("../../deploy/kubernetes")))
	m.write("overlay/kustomization.yaml", fmt.Sprintf(`resources: [../kubernetes]
images: [{name: nodeproxy, newTag: %q}]
configMapGenerator: [{name: nodeproxy-config, namespace: nodeproxy, behavior: merge, files: [mesh.hcl]}]
`, version))
	m.write("overlay/mesh.hcl", fmt.Sprintf(`source "consul" {
  mode              = "servers"
  addresses         = ["http://%s:8500"]
  auth_method       = "nodeproxy"
  bearer_token_file = "/var/run/secrets/nodeproxy/token"
}
workloads {
  kubernetes {
    namespace "shop" { services = ["%s"] }
    namespace "meshed" { services = ["cart"] }
  }
}
`, m.Nodes[0].IPv4, strings.Join(services, `", "`)))
	m.kubectl("create", "namespace", "shop")
	m.kubectl("create", "namespace", "meshed")
	for _, account := range services {
		m.kubectl("-n", "shop", "create", "serviceaccount", account)
	}
	m.kubectl("-n", "meshed", "create", "serviceaccount", "cart")
	return m
}

// within is m for a subtest.
func (m *mesh) within(t *testing.T) *mesh {
	sub := *m
	sub.t = t
	return &sub
}

func (m *mesh) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(context.Background(), 2*patience, errors.New("the test's patience has ended"))
	m.t.Cleanup(cancel)
	return ctx
}

func (m *mesh) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *mesh) write(name, text string) string {
	m.t.Helper()
	path := filepath.Join(m.Dir(), name)
	m.must(errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)))
	return path
}

func (m *mesh) finish() {
	if m.t.Failed() {
		for _, args := range [][]string{
			{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A"}, {"-n", "nodeproxy", "logs", "daemonset/nodeproxy", "--tail", "60"},
			{"-n", "nodeproxy", "logs", "daemonset/nodeproxy", "--tail", "60", "--previous"}, {"-n", "nodeproxy", "exec", "daemonset/nodeproxy", "--", "nodeproxy", "status"},
		} {
			out, _ := m.Kubectl(m.ctx(), args...)
			m.t.Logf("kubectl %s:\n%s", strings.Join(args, " "), out)
		}
		m.t.Log(m.Logs())
	}
	if err := m.Close(); err != nil {
		m.t.Errorf("close the lab: %v", err)
	}
	if leaks := m.Leaks(); len(leaks) > 0 {
		m.t.Errorf("left behind: %v", leaks)
	}
}

// startConsul starts the server, and has it know the pods of nodeproxy as docs/kubernetes.md says.
func (m *mesh) startConsul() {
	m.t.Helper()
	node := m.Nodes[0]
	cgroup, err := node.Cgroup.Child("consul.service")
	m.must(err)
	m.consul, err = consul.Start(m.ctx(), m.Lab, consul.Config{
		Node: "server", Namespace: node.Namespace, Cgroup: cgroup, Address: node.IPv4.String(), Open: true, HCL: consul.WithACLs, Token: consul.Management,
	})
	m.must(err)
	m.kubectl("create", "clusterrolebinding", "nodeproxy-issuer", "--clusterrole", "system:service-account-issuer-discovery", "--group", "system:unauthenticated")
	authority, err := base64.StdEncoding.DecodeString(m.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "jsonpath={.clusters[0].cluster.certificate-authority-data}"))
	m.must(err)
	m.put("/v1/acl/auth-method", map[string]any{"Name": "nodeproxy", "Type": "jwt", "MaxTokenTTL": "1h", "Config": map[string]any{
		"JWKSURL":     m.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}") + "/openid/v1/jwks",
		"JWKSCACert":  string(authority),
		"BoundIssuer": kubelab.Issuer, "BoundAudiences": []string{"consul"},
		"ClaimMappings": map[string]string{"/kubernetes.io/namespace": "namespace", "/kubernetes.io/serviceaccount/name": "account", "/kubernetes.io/node/name": "node"},
	}})
	m.put("/v1/acl/binding-rule", map[string]any{
		"AuthMethod": "nodeproxy", "Selector": "value.namespace==nodeproxy and value.account==nodeproxy", "BindType": "policy", "BindName": "nodeproxy-${value.node}",
	})
	for _, n := range m.Members {
		m.put("/v1/acl/policy", map[string]any{"Name": "nodeproxy-" + n.Name, "Rules": documentedRules(m.t, n.Name, append(services, "cart")...)})
	}
}

func (m *mesh) put(path string, body map[string]any) {
	m.t.Helper()
	m.must(m.consul.Do(m.ctx(), http.MethodPut, path, body, nil))
}

func (m *mesh) intentions(destination string, actions map[string]string) {
	m.t.Helper()
	m.must(m.consul.Intentions(m.ctx(), destination, actions))
}

// documentedRules are those of docs/consul.md for a node without an agent, for these services.
func documentedRules(t *testing.T, node string, services ...string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/consul.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## Without an agent\n")
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := strings.Split(section, "```hcl\n")
	block, _, _ := strings.Cut(blocks[len(blocks)-1], "```")
	ofWeb := regexp.MustCompile(`service "web(-sidecar-proxy)?" \{\n[^}]*\}\n`)
	each := strings.Join(ofWeb.FindAllString(block, -1), "")
	block = ofWeb.ReplaceAllString(block, "")
	for _, name := range services {
		block += strings.ReplaceAll(each, `"web`, `"`+name)
	}
	return strings.ReplaceAll(block, `"node-1`, `"`+node)
}

// kubectl runs kubectl and returns its output.
func (m *mesh) kubectl(args ...string) string {
	m.t.Helper()
	out, err := m.Kubectl(m.ctx(), args...)
	m.must(err)
	return strings.TrimSpace(out)
}

// install installs deploy/kubernetes, and waits until it is rolled out.
func (m *mesh) install() {
	m.t.Helper()
	m.kubectl("apply", "-k", m.overlay)
	m.kubectl("-n", "nodeproxy", "rollout", "status", "daemonset/nodeproxy", "--timeout", patience.String())
}

// await repeats check until it returns nil.
func (m *mesh) await(what string, check func() error) {
	m.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// pod is one of the application, which serves at its port.
type pod struct {
	name, namespace, account string
	node                     string // "": the first
	labels, annotations      map[string]string
	more                     string // of its spec, as JSON members
	args                     []string
	preStop                  int // seconds for which it runs when it is to end
}

func (p pod) manifest() string {
	if p.namespace == "" {
		p.namespace = "shop"
	}
	if p.node == "" {
		p.node = "node-1"
	}
	if p.args == nil {
		p.args = []string{"serve", fmt.Sprintf(":%d", port)}
	}
	labels, _ := json.Marshal(p.labels)
	annotations, _ := json.Marshal(p.annotations)
	args, _ := json.Marshal(p.args)
	_, first, _ := strings.Cut(p.args[1], ":")
	lifecycle := ""
	if p.preStop > 0 {
		lifecycle = fmt.Sprintf(`, "lifecycle": {"preStop": {"sleep": {"seconds": %d}}}`, p.preStop)
	}
	if !strings.Contains(p.more, "terminationGracePeriodSeconds") {
		p.more += ` "terminationGracePeriodSeconds": 1,`
	}
	return fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": %q, "namespace": %q, "labels": %s, "annotations": %s},
"spec": {"nodeName": %q, "serviceAccountName": %q, "dnsPolicy": "Default", %s "containers": [{"name": "app", "image": "app:lab", "args": %s,
"ports": [{"containerPort": %[9]s}], "readinessProbe": {"tcpSocket": {"port": %[9]s}, "periodSeconds": 1}%[10]s}]}}`,
		p.name, p.namespace, labels, annotations, p.node, p.account, p.more, args, first, lifecycle)
}

// meshed is what has a pod in the mesh.
var meshed = map[string]string{"nodeproxy.io/mesh": "enabled"}

// create makes pods and waits until they are ready.
func (m *mesh) create(pods ...pod) {
	m.t.Helper()
	for _, p := range pods {
		m.kubectl("create", "-f", m.write("pod.json", p.manifest()))
	}
	for _, p := range pods {
		namespace := "shop"
		if p.namespace != "" {
			namespace = p.namespace
		}
		m.kubectl("-n", namespace, "wait", "pod", p.name, "--for", "condition=Ready", "--timeout", patience.String())
	}
}

// at is where a pod's application is.
func (m *mesh) at(namespace, name string) string {
	m.t.Helper()
	return fmt.Sprintf("%s:%d", m.kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}"), port)
}

// dial has a pod, as NAMESPACE/NAME, call an address, and returns how it went.
func (m *mesh) dial(from, to string) string {
	m.t.Helper()
	namespace, name, _ := strings.Cut(from, "/")
	out, err := m.Kubectl(m.ctx(), "-n", namespace, "exec", name, "--", "/app", "dial", "-timeout", "5s", to, "peer")
	if err != nil {
		return err.Error()
	}
	return out
}

// dialFromNode has a process of the first node call an address.
func (m *mesh) dialFromNode(to string) string {
	m.t.Helper()
	out, err := m.Members[0].Run(m.ctx(), built.program, "dial", "-timeout", "5s", to, "peer")
	if err != nil {
		return err.Error()
	}
	return out
}

func reached(out string) bool { return strings.Contains(out, "accept=") }

// reaches waits until one pod reaches an address.
func (m *mesh) reaches(from, to string) {
	m.t.Helper()
	m.await(from+" reaches "+to, func() error {
		if out := m.dial(from, to); !reached(out) {
			return errors.New(out)
		}
		return nil
	})
}

// refused waits until a pod does not reach an address.
func (m *mesh) refused(from, to string) {
	m.t.Helper()
	m.await(from+" does not reach "+to, func() error {
		if out := m.dial(from, to); reached(out) || !strings.Contains(out, "refused:") && !strings.Contains(out, "end: reset") {
			return errors.New(out)
		}
		return nil
	})
}

// status is what the daemon of a node says.
func (m *mesh) status(node *kubelab.Node) (*admin.Status, error) {
	out, err := m.Kubectl(m.ctx(), "-n", "nodeproxy", "get", "pods", "--field-selector", "spec.nodeName="+node.Name+",status.phase=Running", "-o", "jsonpath={.items[0].metadata.name}")
	if err != nil {
		return nil, err
	}
	if out, err = m.Kubectl(m.ctx(), "-n", "nodeproxy", "exec", strings.TrimSpace(out), "--", "nodeproxy", "status", "--json"); err != nil {
		return nil, err
	}
	status := new(admin.Status)
	return status, json.Unmarshal([]byte(out), status)
}

// protected waits until pods of the first node are, as NAMESPACE/NAME.
func (m *mesh) protected(names ...string) {
	m.t.Helper()
	m.protectedAt(m.Members[0], names...)
}

func (m *mesh) protectedAt(node *kubelab.Node, names ...string) {
	m.t.Helper()
	m.await(fmt.Sprintf("%v are protected", names), func() error {
		status, err := m.status(node)
		if err != nil {
			return err
		}
		states := make(map[string]string)
		for _, w := range status.Workloads {
			states[w.Name] = w.State + " " + w.Detail
		}
		for _, name := range names {
			if !strings.HasPrefix(states["pod "+name], "protected") {
				return fmt.Errorf("states are %v; refused are %+v; the source says %q", states, status.Refused, status.Source.Error)
			}
		}
		return nil
	})
}

// vip waits until a service has a virtual IP and as many healthy instances, and returns the address.
func (m *mesh) vip(service string, instances int) string {
	m.t.Helper()
	var vip string
	m.await(fmt.Sprintf("%s has a virtual IP and %d instances", service, instances), func() error {
		status, err := m.status(m.Members[0])
		if err != nil {
			return err
		}
		for _, s := range status.Services {
			if s.Name != service || len(s.Virtual) == 0 {
				continue
			}
			healthy := 0
			for _, i := range s.Instances {
				if i.Healthy {
					healthy++
				}
			}
			if healthy == instances {
				vip = s.Virtual[0] + ":80"
				return nil
			}
			return fmt.Errorf("its instances are %+v", s.Instances)
		}
		return fmt.Errorf("services are %+v; problems: %+v; the source says %q", status.Services, status.Problems, status.Source.Error)
	})
	return vip
}

// takes waits until connections from web to api, at address, take one of the paths.
func (m *mesh) takes(node *kubelab.Node, address string, paths ...string) {
	m.t.Helper()
	m.await(fmt.Sprintf("web reaches api by %v", paths), func() error {
		before := m.opened(node, "web", "api")
		if out := m.dial("shop/web", address); !reached(out) {
			return errors.New(out)
		}
		for deadline := time.Now().Add(2 * time.Second); ; { // direct connections are told of ten times a second
			after := m.opened(node, "web", "api")
			for _, path := range paths {
				if after[path] > before[path] {
					return nil
				}
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("before %v, after %v", before, after)
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
}

// opened is how many connections between two services a node's daemon has counted, by path.
func (m *mesh) opened(node *kubelab.Node, source, destination string) map[string]int {
	m.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return node.Namespace.Dial(ctx, "tcp", address)
	}}}
	resp, err := client.Get("http://127.0.0.1:20210/metrics")
	m.must(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	m.must(err)
	paths := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "nodeproxy_connections_opened_total{") || !strings.Contains(line, fmt.Sprintf("source_service=%q", source)) ||
			!strings.Contains(line, fmt.Sprintf("destination_service=%q", destination)) {
			continue
		}
		found := regexp.MustCompile(`path="(\w+)".* (\d+)`).FindStringSubmatch(line)
		if found != nil {
			var n int
			_, _ = fmt.Sscan(found[2], &n)
			paths[found[1]] += n
		}
	}
	return paths
}

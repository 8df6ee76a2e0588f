package kubernetes

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"nodeproxy.io/tests/kubelab"
)

// patience bounds every wait for an event.
const patience = 30 * time.Second

// apiServer is a real API server with its store, and no more of Kubernetes. Both end with the test.
type apiServer struct {
	t          *testing.T
	dir        string
	address    string
	kubeconfig string
	args       []string
	running    *exec.Cmd
	core       *rest.RESTClient
	discovery  *rest.RESTClient
}

func startAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{t: t, dir: t.TempDir(), address: freeAddress(t)}
	etcd, peers := "http://"+freeAddress(t), "http://"+freeAddress(t)
	s.start("etcd", "etcd", "--data-dir", filepath.Join(s.dir, "etcd"), "--unsafe-no-fsync", "--log-level", "error",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "default="+peers)
	key := s.write("accounts.key", serviceAccountKey(t))
	_, port, _ := net.SplitHostPort(s.address)
	s.args = []string{
		"--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--secure-port", port, "--cert-dir", filepath.Join(s.dir, "certificates"),
		"--service-cluster-ip-range", "10.96.0.0/16", "--endpoint-reconciler-type", "none",
		"--service-account-key-file", key, "--service-account-signing-key-file", key, "--service-account-issuer", "https://kubernetes.test",
		"--token-auth-file", s.write("tokens", "secret,admin,1,system:masters\nnodeproxy,nodeproxy,2\n"), "--authorization-mode", "RBAC",
		"--disable-admission-plugins", "ServiceAccount", // which waits for a controller that makes the accounts
	}
	admin := s.access("admin", "secret")
	s.kubeconfig = s.access("nodeproxy", "nodeproxy")
	s.startServer()
	access, err := clientcmd.BuildConfigFromFlags("", admin)
	if err != nil {
		t.Fatal(err)
	}
	access.QPS = -1
	if s.core, err = newClient(access, "/api", corev1.SchemeGroupVersion); err != nil {
		t.Fatal(err)
	}
	if s.discovery, err = newClient(access, "/apis", discoveryv1.SchemeGroupVersion); err != nil {
		t.Fatal(err)
	}
	s.grant()
	return s
}

// access writes how whoever has a token reaches the server.
func (s *apiServer) access(name, token string) string {
	s.t.Helper()
	return s.write(name, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "test",
"clusters": [{"name": "test", "cluster": {"server": "https://%s", "insecure-skip-tls-verify": true}}],
"users": [{"name": "test", "user": {"token": %q}}],
"contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}`, s.address, token))
}

// grant lets nodeproxy do what docs/labels.md says that it does, and nothing else.
func (s *apiServer) grant() {
	s.t.Helper()
	s.role("nodeproxy", `{"apiGroups": [""], "resources": ["pods", "namespaces", "services"], "verbs": ["list", "watch"]},
{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}`)
	s.role("daemonset", `{"apiGroups": ["apps"], "resources": ["daemonsets"], "resourceNames": ["nodeproxy"], "verbs": ["get", "list", "watch"]}`)
}

const rbac = "/apis/rbac.authorization.k8s.io/v1"

// role gives nodeproxy the rights of rules.
func (s *apiServer) role(name, rules string) {
	s.t.Helper()
	for kind, text := range map[string]string{
		"clusterroles": fmt.Sprintf(`{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": %q}, "rules": [%s]}`, name, rules),
		"clusterrolebindings": fmt.Sprintf(`{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": %[1]q},
"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": %[1]q},
"subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "nodeproxy"}]}`, name),
	} {
		s.do(s.core.Post().AbsPath(rbac, kind).SetHeader("Content-Type", "application/json").Body([]byte(text)), nil)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func serviceAccountKey(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
}

func (s *apiServer) write(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// start runs a program until the test ends. Its output is shown if the test fails.
func (s *apiServer) start(name, program string, args ...string) *exec.Cmd {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("start %s: %v: run make test, which installs what the tests need", name, err)
	}
	s.t.Cleanup(func() {
		stop(cmd)
		if s.t.Failed() {
			if text, err := os.ReadFile(log.Name()); err == nil {
				s.t.Logf("%s said:\n%s", name, text[max(0, len(text)-4000):])
			}
		}
	})
	return cmd
}

func stop(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// startServer waits until the API server is ready.
func (s *apiServer) startServer() {
	s.t.Helper()
	s.running = s.start("kube-apiserver", kubelab.Program(s.t, "kube-apiserver"), s.args...)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	within(s.t, 2*patience, "the API server is ready", func() bool {
		req, err := http.NewRequest(http.MethodGet, "https://"+s.address+"/readyz", nil)
		if err != nil {
			s.t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer secret")
		answer, err := client.Do(req)
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	})
}

func (s *apiServer) stopServer() { stop(s.running) }

// within waits for something to hold.
func within(t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *apiServer) do(req *rest.Request, into runtime.Object) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	result := req.Do(ctx)
	err := result.Error()
	if err == nil && into != nil {
		err = result.Into(into)
	}
	if err != nil {
		s.t.Fatal(errors.Join(err, ctx.Err()))
	}
}

func (s *apiServer) namespace(name string, labels map[string]string) {
	s.t.Helper()
	s.do(s.core.Post().Resource("namespaces").Body(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}), nil)
}

// patch merges text, in JSON, into an object.
func (s *apiServer) patch(namespace, resource, name, text string, into runtime.Object) {
	s.t.Helper()
	s.do(s.core.Patch("application/merge-patch+json").NamespaceIfScoped(namespace, namespace != "").Resource(resource).Name(name).Body([]byte(text)), into)
}

func (s *apiServer) patchStatus(p *corev1.Pod, text string) {
	s.t.Helper()
	s.do(s.core.Patch("application/merge-patch+json").Namespace(p.Namespace).Resource("pods").Name(p.Name).SubResource("status").Body([]byte(text)), p)
}

// remove deletes a pod as if its kubelet had confirmed.
func (s *apiServer) remove(p *corev1.Pod) {
	s.t.Helper()
	s.do(s.core.Delete().Namespace(p.Namespace).Resource("pods").Name(p.Name).Body(&metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}), nil)
}

// pod makes one that runs on node. options change what is asked for.
func (s *apiServer) pod(namespace, name, account string, options ...func(*corev1.Pod)) *corev1.Pod {
	s.t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{}, Annotations: map[string]string{}},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account,
			Containers: []corev1.Container{{Name: "app", Image: "app"}},
		},
	}
	for _, change := range options {
		change(p)
	}
	s.do(s.core.Post().Namespace(namespace).Resource("pods").Body(p), p)
	return p
}

func labelled(pairs ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		for _, pair := range pairs {
			key, value, _ := strings.Cut(pair, "=")
			p.Labels[prefix+key] = value
		}
	}
}

func annotated(pairs ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		for _, pair := range pairs {
			key, value, _ := strings.Cut(pair, "=")
			if !strings.Contains(key, "/") {
				key = prefix + key
			}
			p.Annotations[key] = value
		}
	}
}

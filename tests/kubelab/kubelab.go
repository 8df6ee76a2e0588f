// Package kubelab runs a real Kubernetes cluster: etcd, API server, controller manager and scheduler, and one or two nodes with
// containerd and a kubelet, each in namespaces and below a cgroup of its own. No registry, no service manager, no kube-proxy.
//
// It ends with its lab, and leaves nothing.
package kubelab

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/tests/netlab"
)

const (
	pollInterval = 100 * time.Millisecond
	apiServer    = "10.96.0.1" // and the ClusterIP of the Service kubernetes
	patience     = 2 * time.Minute
	// Issuer of the tokens of service accounts.
	Issuer = "https://kubernetes.lab"
)

// Cluster is a running cluster on the nodes of a netlab, the control plane on the first.
type Cluster struct {
	*netlab.TwoNodes
	Members    []*Node
	Kubeconfig string // of its administrator

	dir      string
	programs struct{ pause, runc string }
	images   []string
	control  []*netlab.Process
}

// Config is what a cluster is made of.
type Config struct {
	Hybrid []bool   // of each node, one or two
	Images []string // tars that every node knows
}

// Missing names what a cluster needs and this machine does not have.
func Missing() []string {
	missing := netlab.Missing()
	for _, name := range []string{"etcd", "containerd", "ctr", "runc", "nsenter", "unshare", "/usr/lib/cni/bridge"} {
		if _, err := exec.LookPath(name); err != nil {
			missing = append(missing, name)
		}
	}
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"} {
		if _, err := program(name); err != nil {
			missing = append(missing, err.Error())
		}
	}
	return missing
}

// Program is the path of a program of Kubernetes. It ends the test as netlab.Lacks does if that has not been built.
func Program(tb netlab.TB, name string) string {
	tb.Helper()
	path, err := program(name)
	if err != nil {
		netlab.Lacks(tb, err.Error())
	}
	return path
}

// program finds what the Makefile builds, once per version, outside the repository.
func program(name string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(cache, "nodeproxy-tools", "kubernetes-v*", name))
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("%s (run make kubernetes)", name)
	}
	return found[len(found)-1], nil
}

// Hierarchies are those of version 1 that are mounted below /sys/fs/cgroup, as mount(8) takes them. None: the machine has
// cgroup2 alone, and a node cannot be hybrid.
func Hierarchies() (all []string) {
	text, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(text)) {
		_, rest, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(rest, ":")
		if dir := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(name, "name=")); name != "" && exists(filepath.Join(dir, "cgroup.procs")) {
			all = append(all, name)
		}
	}
	return all
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Start makes a cluster and returns when its nodes are ready. On error nothing of it remains.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	lab, err := netlab.NewTwoNodes()
	if err != nil {
		return nil, err
	}
	c := &Cluster{TwoNodes: lab, dir: lab.Dir()}
	if err := c.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("start a cluster: %w", err), c.Close())
	}
	return c, nil
}

// Close ends everything and removes what was made outside of memory.
func (c *Cluster) Close() error {
	err := c.TwoNodes.Close()
	for _, hierarchy := range Hierarchies() {
		for _, n := range c.Members {
			err = errors.Join(err, removeCgroups(filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(hierarchy, "name="), c.Name()+"-"+n.Name)))
		}
	}
	return err
}

// removeCgroups removes a tree of cgroups, which its processes may be about to leave.
func removeCgroups(root string) error {
	var dirs []string
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		for deadline := time.Now().Add(patience); ; time.Sleep(pollInterval) {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", dir, err)
			}
		}
	}
	return nil
}

func (c *Cluster) start(ctx context.Context, cfg Config) error {
	if err := c.build(); err != nil {
		return err
	}
	for i, hybrid := range cfg.Hybrid {
		n := &Node{Node: c.Nodes[i], Hybrid: hybrid, cluster: c}
		c.Members = append(c.Members, n)
		if err := n.boot(ctx); err != nil {
			return err
		}
	}
	first := c.Members[0]
	server := netip.PrefixFrom(netip.MustParseAddr(apiServer), 32)
	if err := first.Namespace.Address("lo", server); err != nil {
		return err
	}
	if err := c.Nodes[1].Namespace.Route(server, first.IPv4); err != nil {
		return err
	}
	if err := c.startControl(ctx); err != nil {
		return err
	}
	for _, n := range c.Members {
		if err := n.start(ctx, append(c.images, cfg.Images...)); err != nil {
			return err
		}
	}
	for _, n := range c.Members {
		if err := n.kubelet.Await(ctx, n.Name+" is ready", func() error {
			out, err := c.Kubectl(ctx, "get", "node", n.Name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")]}`)
			if err == nil && !strings.Contains(out, `"status":"True"`) {
				err = errors.New(out)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// build compiles what the nodes run besides Kubernetes.
func (c *Cluster) build() error {
	for name, path := range map[string]*string{"pause": &c.programs.pause, "runc": &c.programs.runc} {
		*path = filepath.Join(c.dir, name)
		cmd := exec.Command("go", "build", "-o", *path, "nodeproxy.io/tests/kubelab/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	image, err := Image(c.dir, "pause:lab", c.programs.pause)
	c.images = append(c.images, image)
	return err
}

func (c *Cluster) write(name, text string) string {
	path := filepath.Join(c.dir, name)
	_ = os.WriteFile(path, []byte(text), 0o600) // whoever reads it says so
	return path
}

func (c *Cluster) startControl(ctx context.Context) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	accounts := c.write("accounts.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	certificates := filepath.Join(c.dir, "certificates")
	c.Kubeconfig = c.write("kubeconfig", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "lab",
"clusters": [{"name": "lab", "cluster": {"server": "https://%s:443", "certificate-authority": %q}}],
"users": [{"name": "lab", "user": {"token": "secret"}}],
"contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}]}`, apiServer, filepath.Join(certificates, "apiserver.crt")))
	node := c.Members[0]
	for _, component := range [][]string{
		{"etcd", "--data-dir", filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level", "error"},
		{"kube-apiserver", "--etcd-servers", "http://127.0.0.1:2379", "--bind-address", apiServer, "--secure-port", "443", "--cert-dir", certificates,
			"--advertise-address", node.IPv4.String(), "--service-cluster-ip-range", "10.96.0.0/16", "--endpoint-reconciler-type", "none",
			"--service-account-key-file", accounts, "--service-account-signing-key-file", accounts, "--service-account-issuer", Issuer,
			"--token-auth-file", c.write("tokens", "secret,admin,1,system:masters\n"), "--authorization-mode", "RBAC", "--allow-privileged",
			"--kubelet-preferred-address-types", "InternalIP"},
		{"kube-controller-manager", "--kubeconfig", c.Kubeconfig, "--leader-elect=false", "--service-account-private-key-file", accounts,
			"--root-ca-file", filepath.Join(certificates, "apiserver.crt"), "--secure-port", "0"},
		{"kube-scheduler", "--kubeconfig", c.Kubeconfig, "--leader-elect=false", "--secure-port", "0"},
	} {
		path := component[0]
		if path != "etcd" {
			if path, err = program(path); err != nil {
				return err
			}
		}
		p, err := node.service(component[0], append([]string{path}, component[1:]...)...)
		if err != nil {
			return err
		}
		c.control = append(c.control, p)
		if component[0] != "kube-apiserver" {
			continue
		}
		if err := p.Await(ctx, "the API server is ready", func() error {
			_, err := c.Kubectl(ctx, "get", "--raw", "/readyz")
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// Kubectl runs kubectl as the cluster's administrator, and returns its output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	p, err := c.StartKubectl(nil, args...)
	if err != nil {
		return "", err
	}
	if err = p.Wait(ctx); err != nil {
		p.Kill()
	}
	return p.Output(), err
}

// StartKubectl is Kubectl, and does not wait for its end.
func (c *Cluster) StartKubectl(stdin io.Reader, args ...string) (*netlab.Process, error) {
	path, err := program("kubectl")
	if err != nil {
		return nil, err
	}
	return c.Lab.Start(netlab.Command{
		Path: path, Args: append([]string{"--kubeconfig", c.Kubeconfig, "--cache-dir", filepath.Join(c.dir, "kubectl")}, args...),
		Namespace: c.Nodes[0].Namespace, Stdin: stdin,
	})
}

// SignalAPIServer sends sig to the API server: SIGSTOP has it answer no more, until SIGCONT.
func (c *Cluster) SignalAPIServer(ctx context.Context, sig syscall.Signal) error {
	// Who is outside the node's process namespace, as nsenter is, is called 0.
	_, err := c.Members[0].Run(ctx, "sh", "-c", `kill -"$0" $(grep -vx 0 /sys/fs/cgroup/kube-apiserver.service/cgroup.procs)`, strconv.Itoa(int(sig)))
	return err
}

// Logs are the last lines of what the cluster's programs said.
func (c *Cluster) Logs() string {
	var all strings.Builder
	for _, p := range c.control {
		all.WriteString(p.Tail() + "\n")
	}
	for _, n := range c.Members {
		for _, p := range []*netlab.Process{n.runtime, n.kubelet} {
			if p != nil {
				all.WriteString(n.Name + ": " + p.Tail() + "\n")
			}
		}
	}
	return all.String()
}

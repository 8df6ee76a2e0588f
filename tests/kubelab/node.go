package kubelab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"nodeproxy.io/tests/netlab"
)

// boot makes a node of the machine: its programs and files, and all that Kubernetes keeps on a node in memory. $1 is the node's
// directory, $2 the hierarchies of version 1, none on a node with cgroup2 alone. The kubelet sets some of the kernel's settings
// for the whole machine: it finds them set.
const boot = `set -e
mount --make-rprivate /
for dir in /run /var/lib /var/log; do mount -t tmpfs tmpfs $dir; done
umount --lazy --recursive /sys
umount --lazy --recursive /proc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
if [ -z "$2" ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for hierarchy in $2; do
    mkdir /sys/fs/cgroup/${hierarchy#name=}
    mount -t cgroup -o none,$hierarchy cgroup /sys/fs/cgroup/${hierarchy#name=} 2>/dev/null ||
      mount -t cgroup -o $hierarchy cgroup /sys/fs/cgroup/$hierarchy
  done
  mkdir /sys/fs/cgroup/unified
  mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
fi
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs tmpfs /opt
mkdir -p /opt/cni/bin /opt/cni/net.d
ln -s /usr/lib/cni/* /opt/cni/bin
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
  echo ${setting#*=} >"$1/${setting##*/}"
  mount --bind "$1/${setting##*/}" /proc/sys/${setting%=*}
done
mount --make-rshared /
echo booted
sleep infinity &
wait
`

// join puts the process into a cgroup of its own in each hierarchy of version 1 that is mounted. $1 is its name there.
const join = `for hierarchy in $2; do
  dir=/sys/fs/cgroup/${hierarchy#name=}
  mkdir -p "$dir/$1"
  for file in cpuset.cpus cpuset.mems; do [ ! -e "$dir/$file" ] || cat "$dir/$file" >"$dir/$1/$file"; done
  [ ! -e "$dir/$1/cpuset.cpus" ] || echo 1 >"$dir/$1/cgroup.clone_children"
  echo 0 >"$dir/$1/cgroup.procs"
done
shift 2
exec "$@"
`

// enter puts the process into the node's cgroups of version 1.
const enter = `for dir in /sys/fs/cgroup/*/cgroup.clone_children; do echo 0 >"${dir%/*}/cgroup.procs"; done
exec "$@"
`

// Network is the network configuration of a node's pods, in the node.
const Network = "/opt/cni/net.d/10-pods.conflist"

// Node is a machine with containerd and a kubelet: its own processes, mounts, network and cgroups.
type Node struct {
	*netlab.Node
	Hybrid bool // it has hierarchies of version 1 too, as the machine has

	cluster *Cluster
	init    int // its first process, as the lab sees it
	kubelet *netlab.Process
	runtime *netlab.Process
}

// Cgroups is where the root of the node's cgroup2 is, as the lab sees it.
func (n *Node) Cgroups() string { return n.Cgroup.Path() }

// Pods is the network from which its pods have their addresses.
func (n *Node) Pods() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, n.IPv4.As4()[3], 200, 0}), 24)
}

// Inside is where a path of the node is for those who are outside.
func (n *Node) Inside(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.init), "root", path)
}

func (n *Node) boot(ctx context.Context) error {
	hierarchies := ""
	if n.Hybrid {
		hierarchies = strings.Join(Hierarchies(), " ")
	}
	p, err := n.cluster.Lab.Start(netlab.Command{
		Path: "sh",
		Args: []string{"-c", join, "sh", n.cluster.Name() + "-" + n.Name, hierarchies,
			"unshare", "--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc", "sh", "-c", boot, "sh", n.Dir, hierarchies},
		Namespace: n.Namespace, Cgroup: n.Cgroup,
	})
	if err == nil {
		err = p.WaitOutput(ctx, "booted")
	}
	if err != nil {
		return fmt.Errorf("boot %s: %w", n.Name, err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", p.PID()))
	if err == nil {
		n.init, err = strconv.Atoi(strings.TrimSpace(string(children)))
	}
	if err != nil {
		return fmt.Errorf("find the first process of %s: %w", n.Name, err)
	}
	return nil
}

// Command is a command in the node's namespaces, outside all pods.
func (n *Node) Command(args ...string) netlab.Command {
	if n.Hybrid {
		args = append([]string{"sh", "-c", enter, "sh"}, args...)
	}
	return netlab.Command{
		Path: "nsenter", Args: append([]string{"--target", strconv.Itoa(n.init), "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"}, args...),
		Cgroup: n.Cgroup,
	}
}

// Run runs a command on the node, in no cgroup of its own, and returns its output.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	return n.cluster.Lab.Run(ctx, n.Command(args...))
}

// service starts a command on the node in a cgroup of its own.
func (n *Node) service(name string, args ...string) (*netlab.Process, error) {
	slice, err := n.Cgroup.Child(name + ".service")
	if err != nil {
		return nil, err
	}
	command := n.Command(args...)
	command.Cgroup = slice
	return n.cluster.Lab.Start(command)
}

func (n *Node) write(name, format string, args ...any) (string, error) {
	path := filepath.Join(n.Dir, name)
	return path, errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, fmt.Appendf(nil, format, args...), 0o600))
}

const containerd = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:lab"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/opt/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = %q
`

const network = `{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": false,
"ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`

const kubelet = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: true
enforceNodeAllocatable: [none]
failCgroupV1: false
failSwapOn: false
evictionHard: {memory.available: 1Mi}
localStorageCapacityIsolation: false
imageGCHighThresholdPercent: 100
oomScoreAdj: 0
resolvConf: ""
syncFrequency: 2s
nodeStatusUpdateFrequency: 2s
volumePluginDir: /var/lib/kubelet/volume-plugins
`

// NetworkConfiguration is what Network has at first.
func (n *Node) NetworkConfiguration() []byte { return fmt.Appendf(nil, network, n.Pods()) }

// start starts containerd, has it know the images, and starts the kubelet.
func (n *Node) start(ctx context.Context, images []string) error {
	runc := n.cluster.programs.runc
	if n.Hybrid {
		runc = "runc"
	}
	if err := os.WriteFile(n.Inside(Network), n.NetworkConfiguration(), 0o600); err != nil {
		return err
	}
	config, err := n.write("containerd.toml", containerd, runc)
	if err != nil {
		return err
	}
	if err := n.startRuntime(ctx, config); err != nil {
		return err
	}
	for _, image := range images {
		if err := n.Import(ctx, image); err != nil {
			return err
		}
	}
	if config, err = n.write("kubelet.yaml", kubelet, n.IPv4); err != nil {
		return err
	}
	path, err := program("kubelet")
	if err != nil {
		return err
	}
	n.kubelet, err = n.service("kubelet", path, "--config", config, "--kubeconfig", n.cluster.Kubeconfig, "--hostname-override", n.Name,
		"--node-ip", n.IPv4.String(), "--root-dir", "/var/lib/kubelet", "--cert-dir", "/var/lib/kubelet/pki")
	return err
}

func (n *Node) startRuntime(ctx context.Context, config string) (err error) {
	if n.runtime, err = n.service("containerd", "containerd", "--config", config); err != nil {
		return err
	}
	return n.runtime.Await(ctx, "containerd answers", func() error {
		_, err := n.Run(ctx, "ctr", "version")
		return err
	})
}

// RestartRuntime kills containerd and all that watches over its containers, whose pods the kubelet makes anew, and starts it again.
func (n *Node) RestartRuntime(ctx context.Context) error {
	if _, err := n.Run(ctx, "sh", "-c", `kill -KILL $(grep -vx 0 /sys/fs/cgroup/containerd.service/cgroup.procs)`); err != nil {
		return err
	}
	if err := removeCgroups(filepath.Join(n.Cgroup.Path(), "containerd.service")); err != nil {
		return err
	}
	return n.startRuntime(ctx, filepath.Join(n.Dir, "containerd.toml"))
}

// Import makes an image known to containerd.
func (n *Node) Import(ctx context.Context, image string) error {
	_, err := n.Run(ctx, "ctr", "--namespace", "k8s.io", "images", "import", image)
	return err
}

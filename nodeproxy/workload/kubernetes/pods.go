package kubernetes

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"nodeproxy.io/nodeproxy/workload"
)

// prefix is in front of every key of ours, in labels and annotations.
const prefix = "nodeproxy.io/"

// registrationKeys say how a pod is registered, and nothing to the Manager.
var registrationKeys = []string{"port", "tags"}

const metaKey = "meta-"

// pod is one that a label asks to be a workload.
type pod struct {
	*corev1.Pod
	claim  workload.Claim   // without a cgroup
	claims []workload.Claim // of each place in which its cgroup is or will be
	labels workload.Labels  // of registrationKeys and metaKey
}

func (p pod) String() string { return "pod " + p.Namespace + "/" + p.Name }

func (p pod) granted() bool { return p.claim.Denied == "" && p.claim.Invalid == "" }

func (p pod) finished() bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func (p *pod) place(paths []string) {
	if !p.granted() { // it is listed once, wherever it is
		paths = append(paths, "")[:1]
	}
	for _, path := range paths {
		c := p.claim
		c.Cgroup = path
		p.claims = append(p.claims, c)
	}
}

func (p pod) paths() (all []string) {
	for _, c := range p.claims {
		all = append(all, c.Cgroup)
	}
	return all
}

// judge says what a pod claims, and whether it claims anything.
func (c *Cluster) judge(of *corev1.Pod) (pod, bool) {
	object, _, _ := c.namespaces.GetByKey(of.Namespace)
	namespace, _ := object.(*corev1.Namespace)
	return judge(of, namespace, c.cfg.Namespaces)
}

// judge is of a pod in a namespace, nil if that is not known, where pods of each may be services.
func judge(of *corev1.Pod, in *corev1.Namespace, services map[string][]string) (pod, bool) {
	labels := make(workload.Labels)
	add := func(written map[string]string) {
		for key, value := range written {
			if key, ours := strings.CutPrefix(key, prefix); ours {
				labels[key] = value
			}
		}
	}
	if in != nil {
		add(in.Labels)
		add(in.Annotations)
	}
	add(of.Labels)
	add(of.Annotations)
	if mesh := labels["mesh"]; mesh == "" || mesh == workload.Disabled.String() {
		return pod{}, false
	}
	p := pod{Pod: of, labels: make(workload.Labels)}
	for key, value := range labels {
		if slices.Contains(registrationKeys, key) || strings.HasPrefix(key, metaKey) {
			p.labels[key] = value
			delete(labels, key)
		}
	}
	service, named := labels["service"]
	p.claim = labels.Claim(providerName, "")
	p.claim.Ending = of.DeletionTimestamp != nil
	p.claim.Name, p.claim.Service, p.claim.Also = p.String(), of.Spec.ServiceAccountName, nil
	if p.claim.Denied = refuses(of, service, named, services); p.claim.Denied != "" {
		p.claim.Invalid = ""
	}
	for _, container := range running(of) {
		for _, port := range container.Ports {
			if port.Protocol == corev1.ProtocolTCP || port.Protocol == "" {
				p.claim.Ports = append(p.claim.Ports, uint16(port.ContainerPort))
			}
		}
		p.claim.Probed = append(p.claim.Probed, probed(container)...)
	}
	p.claim.Ports, p.claim.Probed = sorted(p.claim.Ports), sorted(p.claim.Probed)
	return p, true
}

func sorted(ports []uint16) []uint16 {
	slices.Sort(ports)
	return slices.Compact(ports)
}

// refuses says why a pod may not be what it asks to be, or "".
func refuses(p *corev1.Pod, service string, named bool, services map[string][]string) string {
	account := p.Spec.ServiceAccountName
	if proxy := injected(p); proxy != "" {
		return fmt.Sprintf("it has a sidecar of its own (%s), and is left to that: have it injected no more, and restart the pod", proxy)
	}
	switch {
	case account == "":
		return "it has no service account, whose name it could be: static pods cannot be workloads"
	case named && service != account:
		return fmt.Sprintf("it asks to be service %q and runs as service account %q: a pod may be only what its service account is called; remove the label service, or change the account", service, account)
	case !slices.Contains(services[p.Namespace], account):
		return fmt.Sprintf("it runs as service account %q, which is no service of namespace %q: if it is to be one, add it to workloads.kubernetes.namespace %q { services = […] } in nodeproxy's configuration", account, p.Namespace, p.Namespace)
	}
	return ""
}

// Sidecars are known by what their injectors write, and by their containers.
var (
	injectedAnnotations = map[string]string{
		"consul.hashicorp.com/connect-inject-status": "consul-k8s", "sidecar.istio.io/status": "Istio", "linkerd.io/proxy-version": "Linkerd",
	}
	injectedContainers = map[string]string{
		"consul-dataplane": "consul-k8s", "envoy-sidecar": "consul-k8s", "istio-proxy": "Istio", "linkerd-proxy": "Linkerd",
	}
)

// injected names the proxy that a pod brings along, "" for none.
func injected(p *corev1.Pod) string {
	for _, key := range slices.Sorted(maps.Keys(injectedAnnotations)) {
		if p.Annotations[key] != "" {
			return injectedAnnotations[key]
		}
	}
	for _, container := range running(p) {
		for name, proxy := range injectedContainers {
			if container.Name == name || strings.HasPrefix(container.Name, name+"-") {
				return proxy
			}
		}
	}
	return ""
}

// running lists the containers of a pod that run all the time, sidecars among them.
func running(p *corev1.Pod) []corev1.Container {
	all := slices.Clone(p.Spec.Containers)
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			all = append(all, c)
		}
	}
	return all
}

// probed lists the ports of a container to which the kubelet connects.
func probed(c corev1.Container) (all []uint16) {
	add := func(host string, port intstr.IntOrString) {
		if n := portOf(c, port); n != 0 && host == "" {
			all = append(all, n)
		}
	}
	for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
		switch {
		case probe == nil:
		case probe.HTTPGet != nil:
			add(probe.HTTPGet.Host, probe.HTTPGet.Port)
		case probe.TCPSocket != nil:
			add(probe.TCPSocket.Host, probe.TCPSocket.Port)
		case probe.GRPC != nil:
			add("", intstr.FromInt32(probe.GRPC.Port))
		}
	}
	if c.Lifecycle == nil {
		return all
	}
	for _, hook := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
		if hook != nil && hook.HTTPGet != nil {
			add(hook.HTTPGet.Host, hook.HTTPGet.Port)
		}
	}
	return all
}

// portOf is a port of a container by number or name, 0 if there is none.
func portOf(c corev1.Container, port intstr.IntOrString) uint16 {
	if port.Type == intstr.Int {
		if port.IntVal < 1 || port.IntVal > 65535 {
			return 0
		}
		return uint16(port.IntVal)
	}
	for _, p := range c.Ports {
		if p.Name == port.StrVal {
			return uint16(p.ContainerPort)
		}
	}
	return 0
}

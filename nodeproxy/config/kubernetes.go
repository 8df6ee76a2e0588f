package config

import (
	"cmp"
	"maps"
	"os"
	"slices"
	"strings"

	"nodeproxy.io/nodeproxy/catalog"
)

// What a pod is told of its node through the downward API: a DaemonSet has one configuration for all nodes.
const (
	nodeNameVariable    = "NODE_NAME"    // spec.nodeName
	nodeAddressVariable = "NODE_ADDRESS" // status.hostIP

	daemonSetVariable    = "DAEMONSET_NAME"
	podNamespaceVariable = "POD_NAMESPACE" // metadata.namespace
)

// fromEnvironment fills in who this node is where the configuration does not say.
func (n rawNode) fromEnvironment() rawNode {
	n.Name = cmp.Or(n.Name, strings.ReplaceAll(os.Getenv(nodeNameVariable), ".", "-"))
	n.Address = cmp.Or(n.Address, os.Getenv(nodeAddressVariable))
	return n
}

// kubernetes is nil unless it is enabled.
func (c *checker) kubernetes() *Kubernetes {
	r := c.raw.Workloads.Kubernetes
	k := &Kubernetes{Node: cmp.Or(os.Getenv(nodeNameVariable), c.raw.Node.Name), Namespaces: make(map[string][]string)}
	if namespace := os.Getenv(podNamespaceVariable); namespace != "" {
		k.DaemonSetNamespace, k.DaemonSet = namespace, os.Getenv(daemonSetVariable)
	}
	at := func(names ...string) []string { return append(key("workloads", "kubernetes"), names...) }
	if r.Kubeconfig != "" {
		k.Kubeconfig = c.absolute(at("kubeconfig"), r.Kubeconfig)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Namespace)) {
		services := r.Namespace[name].Services
		if !dnsLabel.MatchString(name) || strings.ToLower(name) != name {
			c.fail(at("namespace", name), "is no name of a namespace: correct it")
		}
		if len(services) == 0 {
			c.fail(at("namespace", name), `allows nothing: set services = ["web"] to the services that its pods may be, which are the names of their service accounts`)
		}
		for _, service := range services {
			if !catalog.IsServiceName(service) {
				c.fail(at("namespace", name, "services"), "has %q: list names of services", service)
			}
		}
		k.Namespaces[name] = services
	}
	if r.CNI.Enabled {
		k.CNI = &CNI{c.absolute(at("cni", "conf_dir"), r.CNI.ConfDir), c.absolute(at("cni", "bin_dir"), r.CNI.BinDir)}
	}
	if !r.Enabled {
		return nil
	}
	return k
}

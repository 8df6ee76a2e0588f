package config

import (
	"cmp"

	"nodeproxy.io/nodeproxy/catalog"
)

const dockerEngine = "docker"

// engineSockets are where engines listen unless they are told otherwise.
var engineSockets = map[string]string{dockerEngine: "/run/docker.sock", "containerd": "/run/containerd/containerd.sock"}

// containers is nil unless it is enabled.
func (c *checker) containers() *Containers {
	r := c.raw.Workloads.Containers
	at := func(name string) []string { return key("workloads", "containers", name) }
	for _, service := range r.Allow {
		if !catalog.IsServiceName(service) {
			c.fail(at("allow"), "has %q: list names of services", service)
		}
	}
	if engineSockets[r.Engine] == "" {
		c.fail(at("engine"), `is %q: set it to "docker", for Docker and podman, or "containerd"`, r.Engine)
	}
	containers := &Containers{Allow: r.Allow, Engine: r.Engine, Socket: c.absolute(at("socket"), cmp.Or(r.Socket, engineSockets[r.Engine]))}
	if !r.Enabled {
		return nil
	}
	if len(r.Allow) == 0 {
		c.fail(at("allow"), `is empty, so that no container can be a workload: set allow = ["web"] to the services that containers may be`)
	}
	return containers
}

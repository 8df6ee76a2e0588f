package config

import "nodeproxy.io/nodeproxy/catalog"

// containers is nil unless it is enabled.
func (c *checker) containers() *Containers {
	r := c.raw.Workloads.Containers
	at := func(name string) []string { return key("workloads", "containers", name) }
	for _, service := range r.Allow {
		if !catalog.IsServiceName(service) {
			c.fail(at("allow"), "has %q: list names of services", service)
		}
	}
	containers := &Containers{Allow: r.Allow, Socket: c.absolute(at("socket"), r.Socket)}
	if !r.Enabled {
		return nil
	}
	if len(r.Allow) == 0 {
		c.fail(at("allow"), `is empty, so that no container can be a workload: set allow = ["web"] to the services that containers may be`)
	}
	return containers
}

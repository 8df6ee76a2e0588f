// Package meshlab runs a mesh of two nodes in a netlab: a daemon on each, configured by files as an operator would write
// them, sharing one directory of definitions. The demonstration and the end-to-end tests stand on it.
//
// A Mesh owns its lab, its files and its daemons: Close ends and removes all of them.
package meshlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"nodeproxy.io/tests/netlab"
)

// VirtualIPs is the range from which the mesh gives out virtual IPs.
const VirtualIPs = "240.0.0.0/8"

// Mesh is two nodes and their common definitions. It is not for concurrent use, except for reading.
type Mesh struct {
	*netlab.TwoNodes
	MeshD   string // the directory of definitions, read by both daemons unless Plane is another
	Plane   ControlPlane
	Daemons [2]*Daemon
}

// New makes two nodes without workloads and without running daemons. binary is the nodeproxy executable. Until an
// intention says otherwise, nothing may connect.
func New(binary string) (*Mesh, error) {
	nodes, err := netlab.NewTwoNodes()
	if err != nil {
		return nil, err
	}
	m := &Mesh{TwoNodes: nodes, MeshD: filepath.Join(nodes.Dir(), "mesh.d")}
	m.Plane = directory{m}
	if err := m.build(binary); err != nil {
		return nil, errors.Join(err, nodes.Close())
	}
	return m, nil
}

func (m *Mesh) build(binary string) error {
	bpffs, err := m.BPFFS()
	if err != nil {
		return err
	}
	for i, node := range m.Nodes {
		for _, dir := range []string{filepath.Join(m.MeshD, "nodes", node.Name), filepath.Join(m.MeshD, "config")} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
		}
		cgroup, err := node.Cgroup.Child("nodeproxy")
		if err != nil {
			return err
		}
		m.Daemons[i] = &Daemon{Node: node, Binary: binary, Pins: filepath.Join(bpffs, "nodeproxy"), lab: m.Lab, cgroup: cgroup, MeshD: m.MeshD, source: func() string { return m.Plane.Source(i) }}
	}
	return m.Intentions("*", Deny("*"))
}

// Source is one source of a service-intentions entry.
type Source struct{ Name, Action string }

// Allow is the source name, allowed.
func Allow(name string) Source { return Source{name, "allow"} }

// Deny is the source name, denied.
func Deny(name string) Source { return Source{name, "deny"} }

// Intentions replaces the service-intentions entry of a destination.
func (m *Mesh) Intentions(destination string, sources ...Source) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Kind = \"service-intentions\"\nName = %q\nSources = [\n", destination)
	for _, s := range sources {
		fmt.Fprintf(&b, "  {\n    Name   = %q\n    Action = %q\n  },\n", s.Name, s.Action)
	}
	b.WriteString("]\n")
	name := destination
	if name == "*" {
		name = "default"
	}
	return m.ConfigEntry("intentions-"+name, b.String())
}

// ConfigEntry writes a config entry, in HCL, which replaces the one of that name.
func (m *Mesh) ConfigEntry(name, hcl string) error {
	return m.Plane.Entry(name, hcl)
}

// Define writes service definitions of node i, in HCL, which replace those of that name.
func (m *Mesh) Define(i int, name, hcl string) error {
	return m.Plane.Define(i, name, hcl)
}

// DefineElsewhere writes service definitions of a node where no daemon runs, into the directory.
func (m *Mesh) DefineElsewhere(name, hcl string) error { return m.DefineAt("elsewhere", name, hcl) }

// DefineAt is DefineElsewhere for one of several such nodes.
func (m *Mesh) DefineAt(node, name, hcl string) error {
	dir := filepath.Join(m.MeshD, "nodes", node)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("define a node: %w", err)
	}
	return directory{m}.replace(filepath.Join(dir, name+".hcl"), hcl)
}

// Place makes a workload with a network namespace of its own on node i, enrolled as the service of the same name. If port
// is not 0 its service is defined at the workload's IPv4 address.
func (m *Mesh) Place(i int, service string, port uint16) (*netlab.Workload, error) {
	w, err := m.Nodes[i].Workload(service)
	if err != nil {
		return nil, err
	}
	m.Daemons[i].Enroll(w, service)
	if port == 0 {
		return w, nil
	}
	return w, m.Define(i, service, Service(service, service+"-1", w.IPv4.String(), port, ""))
}

// Service is a service definition in HCL. more is put into its block.
func Service(name, id, address string, port uint16, more string) string {
	return fmt.Sprintf(`service {
  name    = %q
  id      = %q
  address = %q
  port    = %d
  connect {
    sidecar_service {}
  }
  %s
}
`, name, id, address, port, more)
}

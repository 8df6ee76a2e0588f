package meshlab

import (
	"fmt"
	"os"
	"path/filepath"
)

// ControlPlane is where the daemons of a mesh know services, intentions and config entries from. What is defined is HCL as
// Consul reads it.
type ControlPlane interface {
	// Define replaces the service definitions that were given for node i under a name.
	Define(i int, name, hcl string) error
	// Entry writes a config entry, which replaces the one that was given under the name.
	Entry(name, hcl string) error
	// Source is the source block of the daemon of node i.
	Source(i int) string
}

// directory is the control plane of the file source.
type directory struct{ m *Mesh }

// Define moves a file into place, as an operator's tools do.
func (d directory) Define(i int, name, hcl string) error {
	return d.replace(filepath.Join(d.m.MeshD, "nodes", d.m.Nodes[i].Name, name+".hcl"), hcl)
}

func (d directory) Entry(name, hcl string) error {
	return d.replace(filepath.Join(d.m.MeshD, "config", name+".hcl"), hcl)
}

// Source reads where the daemon's directory is when the daemon starts: a test may have given it another.
func (d directory) Source(i int) string {
	return fmt.Sprintf("source \"file\" {\n  path        = %q\n  virtual_ips = %q\n}\n\n", d.m.Daemons[i].MeshD, VirtualIPs)
}

func (d directory) replace(path, text string) error {
	tmp := filepath.Join(d.m.Dir(), "incoming")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write a definition: %w", err)
	}
	return os.Rename(tmp, path)
}

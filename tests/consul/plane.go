package consul

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// Plane is the meshlab.ControlPlane of real agents, one on each node, of which the first is the server. ACLs are off.
type Plane struct {
	lab     *netlab.Lab
	agents  [2]*Agent
	defined map[string]map[string]int // by node and name of a definition: how many instances of each service
	ports   map[string]int            // of sidecars, by node and instance
}

// NewPlane starts the agents of a mesh.
func NewPlane(ctx context.Context, m *meshlab.Mesh) (*Plane, error) {
	p := &Plane{lab: m.Lab, defined: make(map[string]map[string]int), ports: make(map[string]int)}
	for i, node := range m.Nodes {
		cgroup, err := node.Cgroup.Child("consul")
		if err != nil {
			return nil, err
		}
		cfg := Config{Node: node.Name, Namespace: node.Namespace, Cgroup: cgroup, Address: node.IPv4.String(), Definitions: filepath.Join(node.Dir, "consul.d")}
		if err := os.MkdirAll(cfg.Definitions, 0o700); err != nil {
			return nil, err
		}
		if i > 0 {
			cfg.Join = m.Nodes[0].IPv4.String()
		}
		if p.agents[i], err = Start(ctx, m.Lab, cfg); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Source implements meshlab.ControlPlane.
func (*Plane) Source(int) string { return "source \"consul\" {\n  address = \"127.0.0.1:8500\"\n}\n\n" }

// Entry implements meshlab.ControlPlane, with the command that an operator uses.
func (p *Plane) Entry(_, hcl string) error {
	binary, err := Binary()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfPlane)
	defer cancel()
	_, err = p.lab.Run(ctx, netlab.Command{
		Path: binary, Args: []string{"config", "write", "-http-addr", "unix://" + p.agents[0].Socket(), "-"}, Stdin: strings.NewReader(hcl),
	})
	return err
}

const patienceOfPlane = 30 * time.Second

var nameOrID = regexp.MustCompile(`(?m)^  (name|id) += "([^"]*)"`)

// Define implements meshlab.ControlPlane: the agent reads the definitions from its directory. Of several in one file it would keep
// the last, and its own check of a sidecar would call that critical for up to 10 s.
func (p *Plane) Define(i int, name, hcl string) error {
	dir := p.agents[i].cfg.Definitions
	old, err := filepath.Glob(filepath.Join(dir, name+".*.hcl"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	counts := make(map[string]int)
	for n, body := range strings.Split("\n"+hcl, "\nservice {\n") {
		block := "service {\n" + body
		if n == 0 {
			continue // before the first
		}
		fields := make(map[string]string)
		for _, found := range nameOrID.FindAllStringSubmatch(block, -1) {
			fields[found[1]] = found[2]
		}
		counts[fields["name"]]++
		if fields["id"] == "" {
			fields["id"] = fields["name"]
		}
		check := fmt.Sprintf("sidecar_service {\n      port = %d\n      check {\n        name = \"application\"\n        alias_service = %q\n        status = \"passing\"\n      }\n", p.port(i, fields["id"]), fields["id"])
		block = strings.Replace(block, "sidecar_service {", check, 1)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s.%d.hcl", name, n)), []byte(block), 0o600); err != nil {
			return err
		}
	}
	p.defined[fmt.Sprint(i, "/", name)] = counts
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfPlane)
	defer cancel()
	return p.agents[i].Do(ctx, http.MethodPut, "/v1/agent/reload", nil, nil)
}

// port is that of an instance's sidecar, the same for as long as p is there. Where the agent chooses it, it may choose another at the next
// reload, which Consul 1.19.2 then does not tell the catalog for a minute or two.
func (p *Plane) port(node int, instance string) int {
	key := fmt.Sprint(node, "/", instance)
	if p.ports[key] == 0 {
		p.ports[key] = firstSidecarPort + len(p.ports)
	}
	return p.ports[key]
}

// firstSidecarPort begins the range of the agent's own choice.
const firstSidecarPort = 21000

// Instances says how many instances of each service are defined.
func (p *Plane) Instances() map[string]int {
	all := make(map[string]int)
	for _, counts := range p.defined {
		for name, n := range counts {
			all[name] += n
		}
	}
	return all
}

package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
)

const (
	stateJSON = "state.json"
	maxState  = 64 << 20
)

// state is what the daemons of a mesh directory have agreed on, in state.json. It is changed under the directory's lock
// only. It is safe to delete: running daemons write back what they know, others assign anew.
type state struct {
	Virtual map[string]netip.Addr        `json:"virtual_ips"` // by service
	Nodes   map[string]netip.Addr        `json:"nodes"`       // the address of each node, written by its own daemon
	Ports   map[string]map[string]uint16 `json:"mesh_ports"`  // by node and instance ID, written by the node's own daemon
}

func readState(dir string) (*state, error) {
	s := &state{}
	path := filepath.Join(dir, stateJSON)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s.complete(), nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	decoder := json.NewDecoder(io.LimitReader(f, maxState))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(s); err != nil {
		return nil, fmt.Errorf("read %s: %w: restore it, or delete it to have all assigned anew", path, err)
	}
	return s.complete(), nil
}

func (s *state) complete() *state {
	if s.Virtual == nil {
		s.Virtual = make(map[string]netip.Addr)
	}
	if s.Nodes == nil {
		s.Nodes = make(map[string]netip.Addr)
	}
	if s.Ports == nil {
		s.Ports = make(map[string]map[string]uint16)
	}
	return s
}

func (s *state) clone() *state {
	c := &state{Virtual: maps.Clone(s.Virtual), Nodes: maps.Clone(s.Nodes), Ports: make(map[string]map[string]uint16, len(s.Ports))}
	for node, ports := range s.Ports {
		c.Ports[node] = maps.Clone(ports)
	}
	return c
}

func (s *state) equal(o *state) bool {
	return maps.Equal(s.Virtual, o.Virtual) && maps.Equal(s.Nodes, o.Nodes) &&
		maps.EqualFunc(s.Ports, o.Ports, func(a, b map[string]uint16) bool { return maps.Equal(a, b) })
}

// demand is what one node wants the state to hold.
type demand struct {
	node     string
	address  netip.Addr
	services []string        // of the whole mesh: each gets a virtual IP
	mesh     []string        // instance IDs of this node that get a mesh port
	taken    map[uint16]bool // ports that definitions of this node name
	virtual  netip.Prefix
	ports    Ports
}

// settle brings the state of dir in line with d and returns it. known is what this daemon saw last, nil at first: it comes
// back when somebody deleted the file.
func settle(ctx context.Context, dir string, d demand, known *state) (*state, error) {
	now, err := readState(dir)
	if err != nil {
		return nil, err
	}
	if want, err := now.with(d, known); err != nil || want.equal(now) {
		return want, err
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if now, err = readState(dir); err != nil {
		return nil, err
	}
	want, err := now.with(d, known)
	if err != nil || want.equal(now) {
		return want, err
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(want); err != nil {
		return nil, fmt.Errorf("write %s: %w", stateJSON, err)
	}
	return want, write(filepath.Join(dir, stateJSON), out.Bytes(), 0o644)
}

// with is s with all that d demands.
func (s *state) with(d demand, known *state) (*state, error) {
	want := s.clone()
	if known != nil {
		want.recall(known, d.node)
	}
	want.Nodes[d.node] = d.address
	if err := want.assignVirtual(d); err != nil {
		return nil, err
	}
	if err := want.assignPorts(d); err != nil {
		return nil, err
	}
	return want, nil
}

// recall adds what known holds and s has lost, unless somebody else has got it meanwhile.
func (s *state) recall(known *state, node string) {
	used := make(map[netip.Addr]bool, len(s.Virtual))
	for _, ip := range s.Virtual {
		used[ip] = true
	}
	for service, ip := range known.Virtual {
		if _, has := s.Virtual[service]; !has && !used[ip] {
			s.Virtual[service] = ip
		}
	}
	if len(s.Ports[node]) == 0 && len(known.Ports[node]) > 0 {
		s.Ports[node] = maps.Clone(known.Ports[node])
	}
}

// assignVirtual gives each service a virtual IP. The first and the last address of the range are never given out. When
// none is left, those of services that are no longer defined are taken back.
func (s *state) assignVirtual(d demand) error {
	used := make(map[netip.Addr]string, len(s.Virtual))
	for service, ip := range s.Virtual {
		if !d.virtual.Contains(ip) {
			return fmt.Errorf("read %s: the virtual IP %s of %q is not in %s: give all nodes the same virtual_ips, or stop them all and delete the file",
				stateJSON, ip, service, d.virtual)
		}
		if other, twice := used[ip]; twice {
			return fmt.Errorf("read %s: %q and %q both have the virtual IP %s: delete the line of one of them", stateJSON, other, service, ip)
		}
		used[ip] = service
	}
	services := slices.Sorted(slices.Values(d.services))
	next, reclaimed := d.virtual.Masked().Addr().Next(), false
	for _, service := range services {
		if _, has := s.Virtual[service]; has {
			continue
		}
		for used[next] != "" {
			next = next.Next()
		}
		if !d.virtual.Contains(next.Next()) { // next is the last address, or beyond it
			if reclaimed || !s.reclaimVirtual(services, used) {
				return fmt.Errorf("assign virtual IPs: %s is full: make virtual_ips larger on every node", d.virtual)
			}
			next, reclaimed = d.virtual.Masked().Addr().Next(), true
			for used[next] != "" {
				next = next.Next()
			}
		}
		s.Virtual[service], used[next] = next, service
	}
	return nil
}

// reclaimVirtual takes back the addresses of services that are not among defined, which is sorted.
func (s *state) reclaimVirtual(defined []string, used map[netip.Addr]string) bool {
	before := len(s.Virtual)
	for service, ip := range s.Virtual {
		if _, still := slices.BinarySearch(defined, service); !still {
			delete(s.Virtual, service)
			delete(used, ip)
		}
	}
	return len(s.Virtual) < before
}

// assignPorts gives each instance of the node a mesh port of its own, never one that a definition of the node names.
// Ports of instances that are gone are taken back when none is left.
func (s *state) assignPorts(d demand) error {
	ports := s.Ports[d.node]
	if ports == nil {
		ports = make(map[string]uint16)
	}
	used := make(map[uint16]bool, len(ports))
	for _, id := range slices.Sorted(maps.Keys(ports)) {
		port := ports[id]
		if !d.ports.contains(port) || d.taken[port] || used[port] {
			delete(ports, id)
			continue
		}
		used[port] = true
	}
	ids := slices.Sorted(slices.Values(d.mesh))
	free := func() (uint16, bool) {
		for port := int(d.ports.First); port <= int(d.ports.Last); port++ {
			if !used[uint16(port)] && !d.taken[uint16(port)] {
				return uint16(port), true
			}
		}
		return 0, false
	}
	for _, id := range ids {
		if _, has := ports[id]; has {
			continue
		}
		port, ok := free()
		if !ok {
			for other, p := range ports {
				if _, still := slices.BinarySearch(ids, other); !still {
					delete(ports, other)
					delete(used, p)
				}
			}
			if port, ok = free(); !ok {
				return fmt.Errorf("assign mesh ports: inbound.ports %d-%d has %d ports for %d instances of this node: make it larger",
					d.ports.First, d.ports.Last, int(d.ports.Last)-int(d.ports.First)+1, len(ids))
			}
		}
		ports[id], used[port] = port, true
	}
	if len(ports) > 0 {
		s.Ports[d.node] = ports
	}
	return nil
}

package meshlab

import (
	"slices"

	"nodeproxy.io/tests/netlab"
)

// KernelObjects lists the eBPF programs, maps and links of nodeproxy that were not there when the mesh was made.
func (m *Mesh) KernelObjects() ([]netlab.BPFObject, error) {
	now, err := ours()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(now, func(o netlab.BPFObject) bool { return slices.Contains(m.before, o) }), nil
}

// ours lists the kernel's objects that bear a name of bpf/.
func ours() ([]netlab.BPFObject, error) {
	all, err := netlab.BPFObjects()
	return slices.DeleteFunc(all, func(o netlab.BPFObject) bool { return !ourName(o) }), err
}

// ourName knows the names in bpf/*.c and bpf/maps.h, cut to the 15 bytes that the kernel keeps.
func ourName(o netlab.BPFObject) bool {
	if o.Kind == "map" {
		switch o.Name {
		case "memberships", "workloads", "destinations", "virtual_ranges", "sk_out", "pending", "sk_accepted", "ns_ready",
			"listeners", "rules", "direct", "sk_peer":
			return true
		}
		return false
	}
	switch o.Name {
	case "connect4", "connect6", "getpeername4", "getpeername6", "workload_sockop", "workload_sockops", "proxy_sockops", "lookup":
		return true
	}
	return false
}

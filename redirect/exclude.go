package redirect

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
)

// Treatment is what becomes of the connections of one workload, where that is not what becomes of everybody's.
type Treatment struct {
	Ports    []uint16       // it dials these as if it were not enrolled,
	Networks []netip.Prefix // and what is in these
	Observe  bool           // nothing is redirected or refused: what would be is an Event
}

// Untreated leaves alone all that a workload dials, also inside an enrolled cgroup.
func Untreated() Treatment {
	return Treatment{Networks: []netip.Prefix{netip.PrefixFrom(netip.IPv6Unspecified(), 0)}}
}

// Treat says how a workload is treated that Enroll switches on later. It is forgotten when the workload is. On error
// nothing of it remains.
func (r *Redirect) Treat(workload uint32, t Treatment) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	want := maps.Clone(r.exclusions)
	for _, port := range t.Ports {
		want[outboundExclusionKey{Prefixlen: uint32(outboundExclusionBitsEXCLUDED_PORT), Workload: workload, Port: swap(port)}] = 1
	}
	for _, network := range t.Networks {
		key := rangeKey(network)
		want[outboundExclusionKey{Prefixlen: uint32(outboundExclusionBitsEXCLUDED_PORT) + key.Prefixlen, Workload: workload, Ip: key.Ip}] = 1
	}
	var flags uint32
	if len(want) > len(r.exclusions) {
		flags |= uint32(outboundMemberFlagMEMBER_EXCLUDES)
	}
	if t.Observe {
		flags |= uint32(outboundMemberFlagMEMBER_OBSERVES)
	}
	if err := r.exclusions.sync("exclusions", r.obj.Exclusions, want); err != nil {
		return errors.Join(fmt.Errorf("exclude destinations of a workload: %w", err), r.forgetTreatment(workload))
	}
	r.treated[workload] = flags
	return nil
}

func (r *Redirect) forgetTreatment(workload uint32) error {
	delete(r.treated, workload)
	want := maps.Clone(r.exclusions)
	maps.DeleteFunc(want, func(k outboundExclusionKey, _ uint32) bool { return k.Workload == workload })
	return r.exclusions.sync("exclusions", r.obj.Exclusions, want)
}

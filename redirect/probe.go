package redirect

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
)

// Feature is one thing that the kernel must or should have.
type Feature struct {
	Name  string
	Err   error  // nil: it is there
	Costs string // what is lost without it

	Optional bool // everything else works without it
}

// Probe asks the running kernel for each feature by using it. It changes nothing.
func Probe() []Feature {
	const all = "nothing works without it"
	_, cgroup2 := CgroupMount()
	_, vmlinux := btf.LoadKernelSpec()
	return []Feature{
		{Name: "cgroup2 mounted", Err: cgroup2, Costs: all},
		{Name: "kernel BTF", Err: vmlinux, Costs: all},
		{Name: "cgroup sock_addr programs", Err: features.HaveProgramType(ebpf.CGroupSockAddr), Costs: all},
		{Name: "bpf_get_netns_cookie in connect hooks", Err: features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie), Costs: all},
		{Name: "bpf_set_retval in connect hooks", Err: features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval), Costs: all},
		{Name: "sockops programs", Err: features.HaveProgramType(ebpf.SockOps), Costs: all},
		{Name: "bpf_get_netns_cookie in sockops", Err: features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie), Costs: all},
		{Name: "sk_lookup programs", Err: features.HaveProgramType(ebpf.SkLookup), Costs: all},
		{Name: "socket storage", Err: features.HaveMapType(ebpf.SkStorage), Costs: all},
		{Name: "cgroup storage", Err: features.HaveMapType(ebpf.CGroupStorage), Costs: all},
		{Name: "sockhash", Err: features.HaveMapType(ebpf.SockHash), Costs: all},
		{Name: "ring buffer", Err: features.HaveMapType(ebpf.RingBuf), Costs: all},
		{Name: "programs load", Err: loadOnce(loadOutbound, loadInbound), Costs: all},
		{Name: "DNS programs load", Err: loadOnce(loadDns), Costs: "names of the mesh are not answered (dns.enabled)", Optional: true},
		{Name: "resetting connections (SOCK_DESTROY)", Err: probeReset(), Costs: "workloads keep the connections that they had when they were enrolled, whatever existing_connections says", Optional: true},
	}
}

// loadOnce loads the programs, unpinned and unattached, which is the proof that the verifier takes them.
func loadOnce(objects ...func() (*ebpf.CollectionSpec, error)) error {
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("lift memlock limit: %w", err)
	}
	for _, load := range objects {
		spec, err := load()
		if err != nil {
			return err
		}
		coll, err := ebpf.NewCollection(spec)
		if err != nil {
			return err
		}
		coll.Close()
	}
	return nil
}

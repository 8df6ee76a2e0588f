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
}

// Probe asks the running kernel for each feature by using it. It changes nothing.
func Probe() []Feature {
	const all = "nothing works without it"
	_, cgroup2 := CgroupMount()
	_, vmlinux := btf.LoadKernelSpec()
	return []Feature{
		{"cgroup2 mounted", cgroup2, all},
		{"kernel BTF", vmlinux, all},
		{"cgroup sock_addr programs", features.HaveProgramType(ebpf.CGroupSockAddr), all},
		{"bpf_get_netns_cookie in connect hooks", features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie), all},
		{"bpf_set_retval in connect hooks", features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval), all},
		{"sockops programs", features.HaveProgramType(ebpf.SockOps), all},
		{"bpf_get_netns_cookie in sockops", features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie), all},
		{"sk_lookup programs", features.HaveProgramType(ebpf.SkLookup), all},
		{"socket storage", features.HaveMapType(ebpf.SkStorage), all},
		{"cgroup storage", features.HaveMapType(ebpf.CGroupStorage), all},
		{"sockhash", features.HaveMapType(ebpf.SockHash), all},
		{"ring buffer", features.HaveMapType(ebpf.RingBuf), all},
		{"programs load", loadOnce(loadOutbound, loadInbound), all},
		{"DNS programs load", loadOnce(loadDns), "names of the mesh are not answered (dns.enabled)"},
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

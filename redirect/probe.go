package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Feature is one thing that the kernel must or should have.
type Feature struct {
	Name  string
	Err   error  // nil: it is there
	Costs string // what is lost without it

	Optional bool // the daemon runs without it
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
		{Name: "SOCK_DESTROY of sock_diag", Err: CanDestroy(), Optional: true,
			Costs: "connections within the node pass the proxy, as with same_node = \"mtls\": the kernel's own path could not be revoked (CONFIG_INET_DIAG_DESTROY); existing_connections leaves connections alone"},
	}
}

// kernelPatience bounds each wait of a probe; the kernel answers at once.
const kernelPatience = 5 * time.Second

// CanDestroy says whether the kernel lets us reset connections of others, by resetting one of our own. Without it nothing
// may be granted.
func CanDestroy() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("make a connection to reset: %w", err)
	}
	defer ln.Close()
	c, err := net.DialTimeout("tcp", ln.Addr().String(), kernelPatience)
	if err != nil {
		return fmt.Errorf("make a connection to reset: %w", err)
	}
	defer c.Close()
	d, err := newDiag()
	if err != nil {
		return fmt.Errorf("open sock_diag: %w", err)
	}
	client, server := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	req := diagRequest{family: unix.AF_INET, src: client.Addr(), sport: client.Port(), dst: server.Addr(), dport: server.Port()}
	found, err := d.query(req)
	if err == nil && len(found) == 1 {
		req.cookie = found[0].Cookie
		err = d.destroy(req)
	}
	if err = errors.Join(err, d.close()); err != nil {
		return fmt.Errorf("reset a connection by sock_diag: %w", err)
	}
	if err := c.SetReadDeadline(time.Now().Add(kernelPatience)); err != nil {
		return fmt.Errorf("reset a connection by sock_diag: %w", err)
	}
	_, err = c.Read(make([]byte, 1))
	if err == nil {
		err = errors.New("it carries bytes")
	}
	if !errors.Is(err, unix.ECONNABORTED) {
		return fmt.Errorf("reset a connection by sock_diag: it is not reset: %w", err)
	}
	return nil
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

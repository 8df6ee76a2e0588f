package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// probersDir is where the links on probers' cgroups are, in the pin directory, each named by the cgroup's id.
const probersDir = "probers"

// ProbeTarget is a place that probers may connect to in plaintext, past its guard.
type ProbeTarget struct {
	Addr      netip.AddrPort
	Namespace uint64         // cookie of the namespace that has the address; a loopback address is that of this namespace only
	Workload  uint32         // whose probes are counted together
	Mapped    netip.AddrPort // where the node's address translation leads them, in Namespace; zero: nowhere
}

// SetProbes makes the places that probers may connect to exactly those given, by diff. One that two namespaces have is
// left out: which of them a prober would reach is not known.
func (r *Redirect) SetProbes(probes []ProbeTarget) error {
	want := make(map[outboundProbeKey]outboundProbe, len(probes))
	mapped := make(map[outboundProbeKey]outboundProbeKey)
	ambiguous := make(map[outboundProbeKey]bool)
	for _, p := range probes {
		key, to := probeKey(p.Addr), probeKey(p.Mapped)
		if other, taken := want[key]; taken && (other.Netns != p.Namespace || mapped[key] != to) {
			ambiguous[key] = true
		}
		want[key] = outboundProbe{Netns: p.Namespace, Workload: p.Workload}
		if p.Mapped.IsValid() {
			mapped[key] = to
		}
	}
	for key := range ambiguous {
		delete(want, key)
		delete(mapped, key)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.mappedProbes.sync("mapped_probes", r.obj.MappedProbes, mapped), r.probes.sync("probes", r.obj.Probes, want))
}

// probeKey is zero for no address.
func probeKey(at netip.AddrPort) (key outboundProbeKey) {
	if at.IsValid() {
		key = outboundProbeKey{Ip: toAddr(at.Addr()), Port: swap(at.Port())}
	}
	return key
}

// SetProbers makes the cgroups whose processes are probers exactly those given. What is below them counts as well.
func (r *Redirect) SetProbers(cgroups []string) error {
	want := make(map[uint64]string, len(cgroups))
	var errs []error
	for _, dir := range cgroups {
		id, err := CgroupID(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		want[id] = dir
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.probers {
		if _, keep := want[id]; keep {
			continue
		}
		if err := errors.Join(os.RemoveAll(r.proberPin(id)), l.Close()); err != nil {
			errs = append(errs, fmt.Errorf("release prober cgroup %d: %w", id, err))
		}
		delete(r.probers, id)
	}
	for id, dir := range want {
		if r.probers[id] != nil {
			continue
		}
		l, err := r.attachPinned(dir, r.proberPin(id), ebpf.AttachCGroupSockOps, r.obj.ProberSockops)
		if err != nil {
			errs = append(errs, fmt.Errorf("attach to prober cgroup %s: %w", dir, err))
			continue
		}
		r.probers[id] = l
	}
	return errors.Join(errs...)
}

func (r *Redirect) proberPin(id uint64) string {
	return filepath.Join(r.dir, probersDir, strconv.FormatUint(id, 10))
}

// adoptProbers takes over the links that an earlier daemon pinned, now with this daemon's program, and removes those on
// cgroups that are gone.
func (r *Redirect) adoptProbers() error {
	return eachPinned(filepath.Join(r.dir, probersDir), func(id uint64, pin string) error {
		dir, err := CgroupPath(id)
		if err != nil {
			return os.Remove(pin) // nobody is in it any more
		}
		l, err := r.takeOver(dir, pin, r.obj.ProberSockops)
		if err == nil && l != nil {
			r.probers[id] = l
		}
		return err
	})
}

// Probed says whether conn, accepted from an Inbound listener, is a prober's.
func (r *Redirect) Probed(conn *net.TCPConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var o outboundOrigin
	found := false
	err = raw.Control(func(fd uintptr) { found = r.obj.SkAccepted.Lookup(int32(fd), &o) == nil })
	return err == nil && found && o.Flags&uint16(outboundOriginFlagORIGIN_PROBE) != 0
}

// ListenerCgroup returns the id of the cgroup whose process listens at the address in the daemon's own network namespace,
// 0 when none does. Listeners of several cgroups there are an error: nobody can tell which would answer.
func (r *Redirect) ListenerCgroup(at netip.AddrPort) (uint64, error) {
	d, err := newDiag()
	if err != nil {
		return 0, fmt.Errorf("open sock_diag: %w", err)
	}
	found, err := listeners(d, at.Port())
	if err = errors.Join(err, d.close()); err != nil {
		return 0, err
	}
	var cgroup uint64
	for _, s := range found {
		if !s.Listens(at) {
			continue
		}
		if cgroup != 0 && cgroup != s.Cgroup {
			return 0, fmt.Errorf("find who listens at %s: processes of several cgroups do", at)
		}
		cgroup = s.Cgroup
	}
	return cgroup, nil
}

// fileidKernfs is the type of the handle of a cgroup's directory, which is the cgroup's id (FILEID_KERNFS).
const fileidKernfs = 0xfe

// CgroupPath returns the directory of a cgroup2 by its id. The error is fs.ErrNotExist when it is gone.
func CgroupPath(id uint64) (string, error) {
	mount, err := CgroupMount()
	if err != nil {
		return "", err
	}
	root, err := unix.Open(mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", mount, err)
	}
	defer unix.Close(root)
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(root, handle, unix.O_PATH|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return "", fmt.Errorf("open cgroup %d: %w", id, err)
	}
	defer unix.Close(fd)
	dir, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("name cgroup %d: %w", id, err)
	}
	return dir, nil
}

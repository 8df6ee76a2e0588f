package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// DNSPort is where the daemon answers name queries, in every namespace that OpenDNS was called for: on 127.53.0.0/16, and on
// ::1 with the ports that follow, as many as IPv6 name servers may be asked.
const DNSPort = uint16(dnsDnsConstantDNS_PORT)

// dnsPins is the directory of the DNS hooks' links, below that of the other hooks of the cgroup.
const dnsPins = "dns"

// ErrNoDNS says that the Redirect was opened without DNS.
var ErrNoDNS = errors.New("name queries are not steered: the daemon was started without DNS")

// dnsSide is what name queries need of the kernel. Its maps are pinned beside the others.
type dnsSide struct {
	dnsPrograms
	Spaces    *ebpf.Map `ebpf:"dns_spaces"`
	Slots     *ebpf.Map `ebpf:"dns_slots"`
	Resolvers *ebpf.Map `ebpf:"dns_resolvers"`
	Listeners *ebpf.Map `ebpf:"dns_listeners"`
	Stats     *ebpf.Map `ebpf:"dns_stats"`
}

func dnsMapNames() []string {
	return []string{"dns_spaces", "dns_slots", "dns_resolvers", "dns_listeners", "dns_stats"}
}

// unpinDNS lets go of the maps that an earlier daemon with DNS left. They end with its hooks.
func (r *Redirect) unpinDNS() error {
	for _, name := range dnsMapNames() {
		if err := os.Remove(filepath.Join(r.dir, "maps", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove pinned map: %w", err)
		}
	}
	return nil
}

// loadDNS creates the maps or takes over the pinned ones, and loads the programs.
func (r *Redirect) loadDNS() (*dnsSide, error) {
	spec, err := loadDns()
	if err != nil {
		return nil, fmt.Errorf("read built-in BPF object: %w", err)
	}
	for _, name := range dnsMapNames() {
		spec.Maps[name].Pinning = ebpf.PinByName
	}
	var d dnsSide
	err = spec.LoadAndAssign(&d, &ebpf.CollectionOptions{
		Maps:            ebpf.MapOptions{PinPath: filepath.Join(r.dir, "maps")},
		MapReplacements: map[string]*ebpf.Map{"heartbeat": r.obj.Heartbeat},
	})
	if err != nil {
		return nil, fmt.Errorf("load DNS programs: %w", err)
	}
	return &d, nil
}

func (d *dnsSide) close() error {
	if d == nil {
		return nil
	}
	var errs []error
	for _, h := range d.hooks() {
		errs = append(errs, h.prog.Close())
	}
	for _, m := range []*ebpf.Map{d.Spaces, d.Slots, d.Resolvers, d.Listeners, d.Stats} {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// hooks are the programs of a cgroup whose queries are steered. Those that show answers come first: nothing is steered
// whose answer would look strange.
func (d *dnsSide) hooks() []hook {
	return []hook{
		{"recvmsg4", ebpf.AttachCGroupUDP4Recvmsg, d.DnsRecvmsg4},
		{"recvmsg6", ebpf.AttachCGroupUDP6Recvmsg, d.DnsRecvmsg6},
		{"getpeername4", ebpf.AttachCgroupInet4GetPeername, d.DnsGetpeername4},
		{"getpeername6", ebpf.AttachCgroupInet6GetPeername, d.DnsGetpeername6},
		{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, d.DnsSendmsg4},
		{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, d.DnsSendmsg6},
		{"connect4", ebpf.AttachCGroupInet4Connect, d.DnsConnect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, d.DnsConnect6},
	}
}

// SteerDNS makes the name queries of an enrolled cgroup reach the daemon, in the namespaces that OpenDNS was called for.
// Elsewhere, and whenever the daemon is not there, they pass as they are. Unenroll ends it. A cgroup whose queries are
// steered already is no error; on error they are not steered.
func (r *Redirect) SteerDNS(cgroup string) error {
	id, err := CgroupID(cgroup)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.enrolled[id]
	switch {
	case r.dns == nil:
		return r.noDNS
	case e == nil:
		return fmt.Errorf("steer name queries of %s: it is not enrolled", cgroup)
	case len(e.dns) > 0:
		return nil
	}
	dir := filepath.Join(e.dir, dnsPins)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	for _, h := range r.dns.hooks() {
		l, err := r.attachPinned(cgroup, filepath.Join(dir, h.name), h.at, h.prog)
		if err != nil {
			return errors.Join(fmt.Errorf("steer name queries of %s: %w", cgroup, err), e.dropDNS())
		}
		e.dns = append(e.dns, l)
	}
	return nil
}

// dropDNS ends the steering of queries: the hooks that send first.
func (e *enrolment) dropDNS() error {
	var errs []error
	for i := len(e.dns) - 1; i >= 0; i-- {
		errs = append(errs, e.dns[i].Unpin(), e.dns[i].Close())
	}
	e.dns = nil
	return errors.Join(append(errs, os.RemoveAll(filepath.Join(e.dir, dnsPins)))...)
}

// LeaveDNS undoes SteerDNS. A cgroup whose queries are not steered is no error.
func (r *Redirect) LeaveDNS(cgroup uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.enrolled[cgroup]; e != nil && len(e.dns) > 0 {
		return e.dropDNS()
	}
	return nil
}

// adoptDNS puts this version's programs into the DNS hooks that an earlier daemon left in force, or removes them if this one
// has no DNS. Hooks that are incomplete are removed: SteerDNS attaches them anew.
func (r *Redirect) adoptDNS(id uint64, e *enrolment) error {
	dir := filepath.Join(e.dir, dnsPins)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if r.dns == nil {
		return os.RemoveAll(dir) // the pins were all that held the hooks
	}
	whole := true
	for _, h := range r.dns.hooks() {
		l, err := link.LoadPinnedLink(filepath.Join(dir, h.name), nil)
		if err != nil {
			whole = false
			continue
		}
		e.dns = append(e.dns, l)
		whole = whole && linkedCgroup(l) == id && l.Update(h.prog) == nil
	}
	if whole {
		return nil
	}
	return e.dropDNS()
}

// forgetDNSSpace ends steering to a namespace and gives back its name servers' slots.
func (r *Redirect) forgetDNSSpace(cookie uint64) error {
	if r.dns == nil {
		return nil
	}
	errs := []error{ignoreMissing(r.dns.Spaces.Delete(cookie))}
	forget := func(family, first, n uint32) {
		for slot := first; slot < first+n; slot++ {
			var ip dnsAddr
			back := dnsDnsSlotKey{Netns: cookie, Slot: slot, Family: family}
			if r.dns.Resolvers.Lookup(back, &ip) != nil {
				continue
			}
			errs = append(errs, ignoreMissing(r.dns.Slots.Delete(dnsDnsResolverKey{Netns: cookie, Ip: ip})), ignoreMissing(r.dns.Resolvers.Delete(back)))
		}
	}
	forget(unix.AF_INET, 1, uint32(dnsDnsConstantDNS_RESOLVERS4))
	forget(unix.AF_INET6, 0, uint32(dnsDnsConstantDNS_RESOLVERS6))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("forget the name servers of network namespace %d: %w", cookie, err)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// resolver is the name server that the address of a listener stands for.
func (d *dnsSide) resolver(cookie uint64, at netip.AddrPort) (netip.AddrPort, bool) {
	key := dnsDnsSlotKey{Netns: cookie, Family: unix.AF_INET6, Slot: uint32(at.Port() - DNSPort)}
	if at.Addr().Is4() {
		ip := at.Addr().As4()
		if ip[0] != 127 || ip[1] != 53 {
			return netip.AddrPort{}, false
		}
		key.Family, key.Slot = unix.AF_INET, uint32(ip[2])<<8|uint32(ip[3])
	}
	var ip dnsAddr
	if d.Resolvers.Lookup(key, &ip) != nil {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(fromAddr(outboundAddr(ip)), 53), true
}

// counters are the DNS programs' own counts since their map was made.
func (d *dnsSide) counters() (map[string]uint64, error) {
	counts := make(map[string]uint64)
	for stat, name := range map[dnsDnsStat]string{
		dnsDnsStatDNS_STEERED: "dns_steered", dnsDnsStatDNS_PASSED: "dns_passed",
		dnsDnsStatDNS_UNREACHABLE: "dns_unreachable", dnsDnsStatDNS_FULL: "dns_full",
	} {
		var perCPU []uint64
		if err := d.Stats.Lookup(uint32(stat), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			counts[name] += n
		}
	}
	return counts, nil
}

// addCounters adds those of the DNS programs, where there are any.
func (r *Redirect) addCounters(counts map[string]uint64) (map[string]uint64, error) {
	if r.dns == nil {
		return counts, nil
	}
	more, err := r.dns.counters()
	maps.Copy(counts, more)
	return counts, err
}

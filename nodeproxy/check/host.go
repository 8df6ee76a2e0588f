package check

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/config"
)

// capability is one that the daemon uses, and the calls that need it. CAP_BPF and CAP_PERFMON are parts of CAP_SYS_ADMIN.
type capability struct {
	bit   uint
	name  string
	why   string
	costs string // what is lost without it; "": the daemon does not start
}

var capabilities = [...]capability{
	{bit: unix.CAP_NET_ADMIN, name: "CAP_NET_ADMIN", why: "bpf(2): attach to cgroups and network namespaces; setsockopt(2) IP_TRANSPARENT; sock_diag(7) SOCK_DESTROY"},
	{bit: unix.CAP_SYS_ADMIN, name: "CAP_SYS_ADMIN", why: "bpf(2): load programs, make maps; setns(2): listen and dial inside the workloads' network namespaces"},
	{bit: unix.CAP_SYS_PTRACE, name: "CAP_SYS_PTRACE", why: "open(2) of /proc/PID/ns/net: find the network namespaces of other users' processes"},
	{bit: unix.CAP_DAC_READ_SEARCH, name: "CAP_DAC_READ_SEARCH", why: "open_by_handle_at(2): find the cgroups whose labels change", costs: "they are looked for every second"},
	{bit: unix.CAP_DAC_OVERRIDE, name: "CAP_DAC_OVERRIDE", why: "connect(2): deliver to unix sockets", costs: "those that root may not use otherwise get no connections"},
	{bit: unix.CAP_SETUID, name: "CAP_SETUID", why: "setfsuid(2): make the unix sockets of upstreams as their workload's user", costs: "those of other users than root are not made"},
	{bit: unix.CAP_SETGID, name: "CAP_SETGID", why: "setgroups(2): make the unix sockets of upstreams as their workload's user", costs: "those of other users than root are not made"},
}

// Capabilities reports those that this process has in effect. The daemon does not start where one fails.
func Capabilities() []Result {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return []Result{failed("capabilities", "read them: %s", err)}
	}
	return capabilityResults(uint64(data[0].Effective) | uint64(data[1].Effective)<<32)
}

func capabilityResults(effective uint64) []Result {
	const grant = "run as root, or grant it (CapabilityBoundingSet= of a unit, securityContext.capabilities of a pod)"
	var results []Result
	for _, c := range capabilities {
		name := "capability " + c.name
		switch {
		case effective&(1<<c.bit) != 0:
			results = append(results, ok(name, "%s", c.why))
		case c.costs != "":
			results = append(results, warning(name, "missing; needed for %s; without it %s: %s", c.why, c.costs, grant))
		default:
			results = append(results, failed(name, "missing; needed for %s: %s", c.why, grant))
		}
	}
	return results
}

// Host reports what the configuration needs of the host. Apart from file limits it looks at the network namespace and
// mounts that it runs in, as the daemon would.
func Host(cfg *config.Config) []Result {
	return []Result{bpffs(cfg.State.Pins), fileLimit(cfg.Limits.Connections), ports(cfg.Inbound), ipv6()}
}

func bpffs(pins string) Result {
	const name = "bpffs"
	existing := pins
	var st unix.Statfs_t
	err := unix.Statfs(existing, &st)
	for errors.Is(err, fs.ErrNotExist) && existing != "/" {
		existing = filepath.Dir(existing)
		err = unix.Statfs(existing, &st)
	}
	switch {
	case err != nil:
		return failed(name, "look at state.pins %s: %s", pins, err)
	case st.Type != unix.BPF_FS_MAGIC:
		return failed(name, "state.pins %s is not on a bpffs: mount -t bpf bpf /sys/fs/bpf, or set state.pins to a directory on one", pins)
	}
	return ok(name, "state.pins %s", pins)
}

// What descriptors are for: the sockets of a connection's two legs, idle tunnels, of which there may be two for sixteen
// connections, and all else.
const (
	descriptorsPerSixteen = 16*2 + 2
	otherDescriptors      = 1024
)

// FittingConnections is how many of the wanted connections this process's limit of open files allows.
func FittingConnections(wanted int) int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return wanted
	}
	return int(min(uint64(wanted), max(1, fitting(limit.Max))))
}

func fitting(limit uint64) uint64 {
	return (max(limit, otherDescriptors) - otherDescriptors) / descriptorsPerSixteen * 16
}

func fileLimit(connections int) Result {
	const name = "RLIMIT_NOFILE"
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return failed(name, "read it: %s", err)
	}
	return fileLimitResult(limit.Max, connections)
}

func fileLimitResult(limit uint64, connections int) Result {
	need := (uint64(connections)+15)/16*descriptorsPerSixteen + otherDescriptors
	if limit < need {
		return warning("RLIMIT_NOFILE", "%d here: limits.connections = %d can take %d descriptors; raise it (LimitNOFILE=%d in a unit) or lower limits.connections to %d",
			limit, connections, need, need, fitting(limit))
	}
	return ok("RLIMIT_NOFILE", "%d is enough for limits.connections = %d", limit, connections)
}

func ports(in config.Inbound) Result {
	const name = "inbound.ports"
	var taken []uint16
	for _, path := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) { // no IPv6
			continue
		}
		if err != nil {
			return failed(name, "look for listeners: %s", err)
		}
		taken = append(taken, listeners(f, in.FirstPort, in.LastPort)...)
		_ = f.Close()
	}
	if len(taken) == 0 {
		return ok(name, "%d-%d are free", in.FirstPort, in.LastPort)
	}
	slices.Sort(taken)
	return warning(name, "something listens on %s: those who should reach it would reach the mesh; move it, or set inbound.ports to a free range",
		strings.Trim(fmt.Sprint(slices.Compact(taken)), "[]"))
}

// listeners reads /proc/net/tcp, see proc_pid_net(5), and returns the ports from first to last that are listened on.
func listeners(table io.Reader, first, last uint16) []uint16 {
	const listen = "0A"
	var found []uint16
	for lines := bufio.NewScanner(table); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != listen {
			continue
		}
		_, hex, _ := strings.Cut(fields[1], ":")
		port, err := strconv.ParseUint(hex, 16, 16)
		if err == nil && uint16(port) >= first && uint16(port) <= last {
			found = append(found, uint16(port))
		}
	}
	return found
}

func ipv6() Result {
	const name = "IPv6"
	addresses, err := os.ReadFile("/proc/net/if_inet6")
	if err != nil || len(addresses) == 0 {
		return warning(name, "this network namespace has none: IPv4 alone is redirected and protected here, which is all there is")
	}
	return ok(name, "available")
}

package redirect

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyTable is the nat table of the iptables that was before nftables, for one family (uapi/linux/netfilter_ipv4/ip_tables.h).
type legacyTable struct {
	names   string // the file that lists the tables that there are
	what    string
	domain  int
	level   int
	entry   int // size of an entry
	offsets int // in it, of where its target begins, and then the next entry
}

var legacyTables = []legacyTable{
	{"/proc/thread-self/net/ip_tables_names", "iptables", unix.AF_INET, unix.SOL_IP, 112, 88},
	{"/proc/thread-self/net/ip6_tables_names", "ip6tables", unix.AF_INET6, unix.SOL_IPV6, 168, 140},
}

const (
	soGetInfo    = 64 // IPT_SO_GET_INFO
	soGetEntries = 65

	natTable    = "nat"
	infoSize    = 84 // struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size
	entriesHead = 40 // struct ipt_get_entries before the entries
	targetHead  = 32 // struct xt_entry_target: size, name[29], revision
	hookOutput  = 3  // NF_INET_LOCAL_OUT

	maxLegacy = 8 << 20
)

// redirect must run inside the namespace.
func (t legacyTable) redirect() (ForeignRule, error) {
	names, err := os.ReadFile(t.names)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.Contains(strings.Fields(string(names)), natTable) {
		return ForeignRule{}, nil // asking for a table that is not there would make it
	}
	if err != nil {
		return ForeignRule{}, err
	}
	fd, err := unix.Socket(t.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return ForeignRule{}, err
	}
	defer unix.Close(fd)
	info := make([]byte, infoSize)
	copy(info, natTable)
	if err := getsockopt(fd, t.level, soGetInfo, info); err != nil {
		return ForeignRule{}, fmt.Errorf("read %s: %w", t.what, err)
	}
	hook := binary.NativeEndian.Uint32(info[36+4*hookOutput:])
	end := binary.NativeEndian.Uint32(info[56+4*hookOutput:]) // the policy of the chain, its last rule
	size := binary.NativeEndian.Uint32(info[80:])
	if size > maxLegacy {
		return ForeignRule{}, fmt.Errorf("read %s: its nat table has %d bytes", t.what, size)
	}
	blob := make([]byte, entriesHead+int(size))
	copy(blob, natTable)
	binary.NativeEndian.PutUint32(blob[32:], size)
	if err := getsockopt(fd, t.level, soGetEntries, blob); err != nil {
		return ForeignRule{}, fmt.Errorf("read %s: %w", t.what, err)
	}
	return t.find(blob[entriesHead:], hook, end), nil
}

// legacyRule is one entry. Standard ones have no target, but a verdict: where they jump to, or below 0.
type legacyRule struct {
	at      int
	chain   string // "" for the kernel's own
	target  string
	verdict int32
}

// find names a rule among the entries of a table of which those from output to policy are for what is sent from here. A chain
// that is not the kernel's own begins with an entry whose target is ERROR, and ends with one that returns.
func (t legacyTable) find(entries []byte, output, policy uint32) ForeignRule {
	var rules []legacyRule
	chain, first := "", 0
	for at := 0; at+t.entry+targetHead <= len(entries); {
		target := int(binary.NativeEndian.Uint16(entries[at+t.offsets:]))
		next := int(binary.NativeEndian.Uint16(entries[at+t.offsets+2:]))
		if target < t.entry || next < target+targetHead || at+next > len(entries) {
			return ForeignRule{} // not what the kernel says it is
		}
		r := legacyRule{at: at, chain: chain, target: cString(entries[at+target+2 : at+target+31]), verdict: -1}
		data := entries[at+target+targetHead : at+next]
		if r.target == "" && len(data) >= 4 {
			r.verdict = int32(binary.NativeEndian.Uint32(data))
		}
		switch {
		case r.target == "ERROR":
			chain, first = cString(data), at+next
		case foreignKind(chain) != "" && at > first: // it does not only return
			return ForeignRule{foreignKind(chain), fmt.Sprintf("%s table nat, chain %s", t.what, legible(chain))}
		default:
			rules = append(rules, r)
		}
		at += next
	}
	// Each rule is looked at once at most: a table may be a workload's, and large.
	owner, rulesOf := make(map[int]string), make(map[string][]legacyRule)
	for _, r := range rules {
		owner[r.at] = r.chain
		rulesOf[r.chain] = append(rulesOf[r.chain], r)
	}
	look := []string{""} // chains that what is sent from here may pass
	passes := map[string]bool{"": true}
	for i := 0; i < len(look); i++ {
		for _, r := range rulesOf[look[i]] {
			if r.chain == "" && (r.at < int(output) || r.at >= int(policy)) {
				continue
			}
			if r.target == "REDIRECT" {
				return ForeignRule{kindRedirect, fmt.Sprintf("%s table nat, chain %s, target REDIRECT", t.what, legible(cmp.Or(r.chain, "OUTPUT")))}
			}
			if next := owner[int(r.verdict)]; !passes[next] {
				passes[next] = true
				look = append(look, next)
			}
		}
	}
	return ForeignRule{}
}

func cString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}

func getsockopt(fd, level, option int, into []byte) error {
	length := uint32(len(into))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&into[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

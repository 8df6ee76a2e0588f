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

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// foreignChains are how the chains begin by which others redirect a workload to a proxy of theirs: Consul's, Istio's, Linkerd's.
var foreignChains = []string{"CONSUL_PROXY_", "CONSUL_DNS_", "ISTIO_", "PROXY_INIT_"}

func isForeignChain(name string) bool {
	return slices.ContainsFunc(foreignChains, func(p string) bool { return strings.HasPrefix(name, p) })
}

// ForeignRedirect names a rule of nftables or iptables that redirects connections of the namespace to somebody else's
// proxy: one in a chain of a known proxy, or one that redirects to a local port what is sent from here. "" is none. It only
// reads, and loads no module.
func (ns *Namespace) ForeignRedirect() (rule string, err error) {
	if rule, err = ns.nftRedirect(); rule == "" && err == nil {
		err = ns.Do(func() error {
			for _, t := range legacyTables {
				if rule, err = t.redirect(); rule != "" || err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		err = fmt.Errorf("look for redirect rules in network namespace %d: %w", ns.Inode, err)
	}
	return rule, err
}

// nftRedirect looks at nftables, which is also where iptables keeps its rules today.
func (ns *Namespace) nftRedirect() (string, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.file.Fd())))
	if err != nil {
		return "", err
	}
	chains, err := conn.ListChains()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOENT) {
		return "", nil // the kernel has no nftables
	}
	if err != nil {
		return "", err
	}
	type key struct {
		family nftables.TableFamily
		table  string
		chain  string
	}
	byKey := make(map[key]*nftables.Chain)
	var look []key // chains that what is sent from here passes, or that are a known proxy's
	for _, c := range chains {
		k := key{c.Table.Family, c.Table.Name, c.Name}
		byKey[k] = c
		if isForeignChain(c.Name) || c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookOutput && c.Type == nftables.ChainTypeNAT {
			look = append(look, k)
		}
	}
	for i := 0; i < len(look); i++ {
		k := look[i]
		rules, err := conn.GetRules(byKey[k].Table, byKey[k])
		if err != nil && !isForeignChain(k.chain) {
			return "", err
		}
		name := fmt.Sprintf("nftables table %s %s, chain %s", familyName(k.family), k.table, k.chain)
		if isForeignChain(k.chain) && (len(rules) > 0 || err != nil) {
			return name, nil
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case *expr.Redir:
					return name + ", a redirect", nil
				case *expr.Target:
					if e.Name == "REDIRECT" {
						return name + ", target REDIRECT", nil
					}
				case *expr.Verdict:
					if next := (key{k.family, k.table, e.Chain}); byKey[next] != nil && !slices.Contains(look, next) {
						look = append(look, next)
					}
				}
			}
		}
	}
	return "", nil
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "inet"
}

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

	maxLegacy = 16 << 20
)

// redirect must run inside the namespace.
func (t legacyTable) redirect() (string, error) {
	names, err := os.ReadFile(t.names)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.Contains(strings.Fields(string(names)), natTable) {
		return "", nil // asking for a table that is not there would make it
	}
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(t.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	info := make([]byte, infoSize)
	copy(info, natTable)
	if err := getsockopt(fd, t.level, soGetInfo, info); err != nil {
		return "", fmt.Errorf("read %s: %w", t.what, err)
	}
	hook := binary.NativeEndian.Uint32(info[36+4*hookOutput:])
	end := binary.NativeEndian.Uint32(info[56+4*hookOutput:]) // the policy of the chain, its last rule
	size := binary.NativeEndian.Uint32(info[80:])
	if size > maxLegacy {
		return "", fmt.Errorf("read %s: its nat table has %d bytes", t.what, size)
	}
	blob := make([]byte, entriesHead+int(size))
	copy(blob, natTable)
	binary.NativeEndian.PutUint32(blob[32:], size)
	if err := getsockopt(fd, t.level, soGetEntries, blob); err != nil {
		return "", fmt.Errorf("read %s: %w", t.what, err)
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
func (t legacyTable) find(entries []byte, output, policy uint32) string {
	var rules []legacyRule
	chain, first := "", 0
	for at := 0; at+t.entry+targetHead <= len(entries); {
		target := int(binary.NativeEndian.Uint16(entries[at+t.offsets:]))
		next := int(binary.NativeEndian.Uint16(entries[at+t.offsets+2:]))
		if target < t.entry || next < target+targetHead || at+next > len(entries) {
			return "" // not what the kernel says it is
		}
		r := legacyRule{at: at, chain: chain, target: cString(entries[at+target+2 : at+target+31]), verdict: -1}
		data := entries[at+target+targetHead : at+next]
		if r.target == "" && len(data) >= 4 {
			r.verdict = int32(binary.NativeEndian.Uint32(data))
		}
		switch {
		case r.target == "ERROR":
			chain, first = cString(data), at+next
		case isForeignChain(chain) && at > first: // it does not only return
			return fmt.Sprintf("%s table nat, chain %s", t.what, chain)
		default:
			rules = append(rules, r)
		}
		at += next
	}
	passes := make(map[string]bool) // chains that what is sent from here may pass
	for grown := true; grown; {
		grown = false
		for _, r := range rules {
			if r.chain == "" && (r.at < int(output) || r.at >= int(policy)) || r.chain != "" && !passes[r.chain] {
				continue
			}
			if r.target == "REDIRECT" {
				return fmt.Sprintf("%s table nat, chain %s, target REDIRECT", t.what, cmp.Or(r.chain, "OUTPUT"))
			}
			i := slices.IndexFunc(rules, func(o legacyRule) bool { return o.at == int(r.verdict) })
			if i >= 0 && rules[i].chain != "" && !passes[rules[i].chain] {
				passes[rules[i].chain], grown = true, true
			}
		}
	}
	return ""
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

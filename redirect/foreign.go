package redirect

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ForeignRule is a rule of nftables or iptables that redirects connections of a namespace to somebody else's proxy. The zero
// one is none.
type ForeignRule struct {
	Kind  string // how the chains of a known proxy begin, or "redirect": one of few, whatever the rule is called
	Where string // table, chain and target
}

const (
	kindRedirect = "redirect"

	maxForeignRead  = 20_000                 // chains and rules: whoever has a namespace decides how many there are
	maxForeignTime  = 100 * time.Millisecond // of one look
	foreignRestEach = 100                    // how many times as long as a look took there is no other
)

// foreignChains are how the chains begin by which others redirect a workload to a proxy of theirs: Consul's, Istio's, Linkerd's.
var foreignChains = []string{"CONSUL_PROXY_", "CONSUL_DNS_", "ISTIO_", "PROXY_INIT_"}

// foreignKind is how name begins if it is a known proxy's, or "".
func foreignKind(name string) string {
	i := slices.IndexFunc(foreignChains, func(p string) bool { return strings.HasPrefix(name, p) })
	if i < 0 {
		return ""
	}
	return foreignChains[i]
}

// foreign is what the last look at a namespace found.
type foreign struct {
	generation uint32 // of nftables, when all of its rules that matter were read; 0: not yet
	nft        ForeignRule

	rule ForeignRule // of nftables or iptables
	err  error
	next time.Time // not looked at again before
}

// ForeignRedirect names a rule that redirects connections of the namespace to somebody else's proxy: one in a chain of a
// known proxy, or one that redirects to a local port what is sent from here. It only reads, and no more than a bound, which
// is an error. What it says may be as old as a hundred times what the look took; nftables are read again only once they have
// changed. One goroutine at a time may call it.
func (ns *Namespace) ForeignRedirect() (ForeignRule, error) {
	f := &ns.foreign
	began := time.Now()
	if began.Before(f.next) {
		return f.rule, f.err
	}
	f.err = ns.Do(func() (err error) {
		f.rule, err = f.look(began.Add(maxForeignTime))
		return err
	})
	if f.err != nil {
		f.err = fmt.Errorf("look for redirect rules in network namespace %d: %w", ns.Inode, f.err)
	}
	f.next = time.Now().Add(foreignRestEach * time.Since(began))
	return f.rule, f.err
}

// look must run inside the namespace.
func (f *foreign) look(until time.Time) (ForeignRule, error) {
	unread := f.readNft(until)
	if f.nft != (ForeignRule{}) {
		return f.nft, nil
	}
	for _, t := range legacyTables {
		rule, err := t.redirect()
		if rule != (ForeignRule{}) {
			return rule, nil
		}
		unread = errors.Join(unread, err)
	}
	return ForeignRule{}, unread
}

// readNft looks at nftables, which is also where iptables keeps its rules today, unless they are as they were.
func (f *foreign) readNft(until time.Time) error {
	sock, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // the kernel has no netfilter
	}
	if err != nil {
		return err
	}
	defer sock.Close()
	r := &ruleset{sock: sock, left: maxForeignRead, until: until}
	generation, err := r.generation()
	if err != nil || generation != 0 && generation == f.generation {
		return err
	}
	f.nft, f.generation = ForeignRule{}, 0
	if generation == 0 {
		return nil
	}
	if f.nft, err = r.redirect(); err == nil {
		f.generation = generation
	}
	return err
}

// legible is a name that others chose, as people may see it.
func legible(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(name, "?"))
}

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ruleset reads the nftables of a namespace, answer by answer, so that it holds none of them, and stops at its bounds
// (uapi/linux/netfilter/nf_tables.h).
type ruleset struct {
	sock  *nl.NetlinkSocket // in the namespace
	left  int               // how many chains and rules it may still read
	until time.Time
}

type nftChain struct {
	family      uint8
	table, name string
}

func (c nftChain) String() string {
	families := map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}
	family := families[c.family]
	if family == "" {
		family = "inet"
	}
	return fmt.Sprintf("nftables table %s %s, chain %s", family, legible(c.table), legible(c.name))
}

// generation changes with each change of the rules. It is 0 where the kernel has no nftables.
func (r *ruleset) generation() (generation uint32, err error) {
	err = r.ask(unix.NFT_MSG_GETGEN, 0, unix.NFPROTO_UNSPEC, nil, func(_ uint8, attrs []byte) bool {
		if id := attribute(attrs, unix.NFTA_GEN_ID); len(id) == 4 {
			generation = binary.BigEndian.Uint32(id)
		}
		return false
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return generation, err
}

// redirect names a rule in a chain of a known proxy, or one that redirects and that what is sent from the namespace may pass.
func (r *ruleset) redirect() (found ForeignRule, err error) {
	look, err := r.entries()
	passes := make(map[nftChain]bool)
	for _, c := range look {
		passes[c] = true
	}
	for i := 0; i < len(look) && err == nil && found == (ForeignRule{}); i++ {
		c := look[i]
		of := []*nl.RtAttr{nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(c.table)), nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(c.name))}
		err = r.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, c.family, of, func(_ uint8, attrs []byte) bool {
			if kind := foreignKind(c.name); kind != "" {
				found = ForeignRule{kind, c.String()}
				return false
			}
			target, jumps := expressions(attribute(attrs, unix.NFTA_RULE_EXPRESSIONS))
			if target != "" {
				found = ForeignRule{kindRedirect, c.String() + ", " + target}
				return false
			}
			for _, name := range jumps {
				if next := (nftChain{c.family, c.table, name}); !passes[next] {
					passes[next] = true
					look = append(look, next)
				}
			}
			return true
		})
	}
	return found, err
}

// entries lists the chains that are a known proxy's or that the kernel has what is sent pass for its addresses to be translated.
func (r *ruleset) entries() (all []nftChain, err error) {
	err = r.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, unix.NFPROTO_UNSPEC, nil, func(family uint8, attrs []byte) bool {
		c := nftChain{family, cString(attribute(attrs, unix.NFTA_CHAIN_TABLE)), cString(attribute(attrs, unix.NFTA_CHAIN_NAME))}
		hook := attribute(attrs, unix.NFTA_CHAIN_HOOK, unix.NFTA_HOOK_HOOKNUM)
		output := len(hook) == 4 && binary.BigEndian.Uint32(hook) == hookOutput && cString(attribute(attrs, unix.NFTA_CHAIN_TYPE)) == natTable
		if output || foreignKind(c.name) != "" {
			all = append(all, c)
		}
		return true
	})
	return all, err
}

// expressions says what a rule redirects by, and which chains it may go on to.
func expressions(list []byte) (target string, jumps []string) {
	all, _ := nl.ParseRouteAttr(list) // what the kernel makes is well-formed
	for _, e := range all {
		data := attribute(e.Value, unix.NFTA_EXPR_DATA)
		switch cString(attribute(e.Value, unix.NFTA_EXPR_NAME)) {
		case "redir":
			return "a redirect", nil
		case "target":
			if cString(attribute(data, unix.NFTA_TARGET_NAME)) == "REDIRECT" {
				return "target REDIRECT", nil
			}
		case "immediate":
			if chain := attribute(data, unix.NFTA_IMMEDIATE_DATA, unix.NFTA_DATA_VERDICT, unix.NFTA_VERDICT_CHAIN); chain != nil {
				jumps = append(jumps, cString(chain))
			}
		}
	}
	return "", jumps
}

// attribute is what is at the end of a path of nested attributes, nil if it leads nowhere.
func attribute(attrs []byte, path ...uint16) []byte {
	for _, kind := range path {
		all, _ := nl.ParseRouteAttr(attrs)
		attrs = nil
		for _, a := range all {
			if a.Attr.Type&^unix.NLA_F_NESTED == kind {
				attrs = a.Value
			}
		}
	}
	return attrs
}

// ask hands each answer over until there are no more or each returns false, after which the ruleset can be asked no more.
func (r *ruleset) ask(message, flags int, family uint8, attrs []*nl.RtAttr, each func(family uint8, attrs []byte) bool) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|message, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	for _, a := range attrs {
		req.AddData(a)
	}
	if err := r.sock.Send(req); err != nil {
		return err
	}
	for {
		rest := time.Until(r.until)
		if rest <= 0 {
			return fmt.Errorf("it took longer than %s to read its nftables", maxForeignTime)
		}
		timeout := unix.NsecToTimeval(rest.Nanoseconds())
		if err := r.sock.SetReceiveTimeout(&timeout); err != nil {
			return err
		}
		answers, _, err := r.sock.Receive()
		if err != nil {
			return err
		}
		for _, m := range answers {
			if done, err := r.answer(m, each); done || err != nil {
				return err
			}
		}
	}
}

func (r *ruleset) answer(m syscall.NetlinkMessage, each func(family uint8, attrs []byte) bool) (done bool, err error) {
	switch m.Header.Type {
	case unix.NLMSG_DONE:
		return true, nil
	case unix.NLMSG_ERROR:
		return true, syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
	}
	if len(m.Data) < nl.SizeofNfgenmsg {
		return true, errors.New("netfilter's answer is too short")
	}
	if r.left--; r.left < 0 {
		return true, fmt.Errorf("its nftables have more than %d chains and rules", maxForeignRead)
	}
	if !each(m.Data[0], m.Data[nl.SizeofNfgenmsg:]) {
		return true, nil
	}
	return m.Header.Flags&unix.NLM_F_MULTI == 0, nil
}

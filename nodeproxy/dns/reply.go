package dns

import (
	"encoding/hex"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// reply writes the answer to q.
func (z *Zone) reply(q *dns.Msg, found records, stream bool) ([]byte, error) {
	r := new(dns.Msg).SetReply(q)
	r.Authoritative, r.RecursionAvailable, r.Compress = true, true, true
	size := dns.MinMsgSize
	if opt := q.IsEdns0(); opt != nil {
		size = max(size, int(opt.UDPSize()))
		r.SetEdns0(edns, opt.Do())
		if opt.Version() != 0 {
			r.Rcode = dns.RcodeBadVers
			return r.Pack()
		}
	}
	if stream {
		size = dns.MaxMsgSize
	}
	z.fill(r, q.Question[0], found)
	r.Truncate(size)
	return r.Pack()
}

// fill adds the records. A name without records of the type asked for exists all the same (NODATA): resolvers that ask for
// AAAA and A at once take NXDOMAIN for the end of both.
func (z *Zone) fill(r *dns.Msg, q dns.Question, found records) {
	all := q.Qtype == dns.TypeANY
	if all || q.Qtype == dns.TypeA || q.Qtype == dns.TypeAAAA {
		for _, addr := range found.addrs {
			if rr := address(q.Name, addr); all || rr.Header().Rrtype == q.Qtype {
				r.Answer = append(r.Answer, rr)
			}
		}
	}
	if all || q.Qtype == dns.TypeSRV {
		targets := make(map[netip.Addr]bool)
		for _, at := range found.srv {
			target := z.target(at.Addr())
			r.Answer = append(r.Answer, &dns.SRV{Hdr: header(q.Name, dns.TypeSRV), Priority: 1, Weight: 1, Port: at.Port(), Target: target})
			if !targets[at.Addr()] {
				targets[at.Addr()] = true
				r.Extra = append([]dns.RR{address(target, at.Addr())}, r.Extra...) // before OPT
			}
		}
	}
	if len(r.Answer) > 0 {
		return
	}
	if found.none {
		r.Rcode = dns.RcodeNameError
	}
	r.Ns = []dns.RR{&dns.SOA{
		Hdr: header(domain, dns.TypeSOA), Ns: "ns." + domain, Mbox: "hostmaster." + domain,
		Serial: uint32(z.snap.Generation), Refresh: 3600, Retry: 600, Expire: 86400, Minttl: 0,
	}}
}

// header has the TTL 0 of Consul's default: an answer holds for one connection.
func header(name string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET}
}

func address(name string, addr netip.Addr) dns.RR {
	if addr.Is4() {
		return &dns.A{Hdr: header(name, dns.TypeA), A: addr.AsSlice()}
	}
	return &dns.AAAA{Hdr: header(name, dns.TypeAAAA), AAAA: addr.AsSlice()}
}

// target is the name of an address, as Consul gives it.
func (z *Zone) target(addr netip.Addr) string {
	return hex.EncodeToString(addr.AsSlice()) + ".addr." + strings.ToLower(z.snap.Datacenter) + "." + domain
}

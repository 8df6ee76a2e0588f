// Package dns answers the names of the mesh for workloads that have DNS enabled, and passes every other query on to the name
// server that the workload asked.
//
// A Zone makes answers: pure, a message in and a message out. A Server serves the queries of network namespaces; its sockets
// are made elsewhere (package redirect) and it lives as long as they do. The package keeps no cache and follows no referrals.
package dns

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	domain     = "consul."
	headerSize = 12
	// edns is the size of message that we take by UDP: RFC 6891, 6.2.3.
	edns = 4096
)

// Verdict says what is to become of a query.
type Verdict uint8

const (
	Answered  Verdict = iota // the reply is ours
	Foreign                  // the name server that was asked shall answer it, unchanged
	Malformed                // to be dropped, or answered with the reply if there is one
)

// Zone answers from one snapshot. It is immutable.
//
// It knows, of Consul's names (https://developer.hashicorp.com/consul/docs/reference/dns), those that stand for what is
// redirected into the mesh, in the snapshot's own datacenter, namespace and partition:
//
//	<service>.virtual.consul           its virtual IPs
//	[<tag>.]<service>.service.consul   the healthy instances whose addresses are redirected; _<service>._<tag> too
//	<service>.connect.consul           the same, without tags
//	<hex address>.addr.consul          the target of an SRV record
//
// each with .default.ns, .default.ap, .<datacenter>.dc or .<datacenter> before the domain. Everything else is Foreign, unknown
// services included: Consul's own name server may know them.
type Zone struct {
	snap     *catalog.Snapshot
	services map[string]*catalog.Service // by name in lower case
}

// NewZone makes the zone of a snapshot.
func NewZone(snap *catalog.Snapshot) *Zone {
	z := &Zone{snap: snap, services: make(map[string]*catalog.Service, len(snap.Services))}
	for name, svc := range snap.Services {
		lower := strings.ToLower(name)
		if _, taken := z.services[lower]; !taken || name == lower {
			z.services[lower] = svc
		}
	}
	return z
}

// Answer decides on a query as it came from the wire; stream says that it came by TCP. A reply by UDP is no larger than the
// query allows (RFC 6891), with the TC bit where records had to be left out. z may be nil: then nothing is ours.
func (z *Zone) Answer(query []byte, stream bool) (reply []byte, v Verdict) {
	if len(query) < headerSize || query[2]&0x80 != 0 {
		return nil, Malformed // too short to be answered, or itself an answer
	}
	opcode := int(query[2]>>3) & 0xf
	if opcode != dns.OpcodeQuery || binary.BigEndian.Uint16(query[4:]) != 1 {
		return nil, Foreign
	}
	name, end, err := dns.UnpackDomainName(query, headerSize)
	if err != nil || end+4 > len(query) {
		return refusal(query, dns.RcodeFormatError), Malformed
	}
	if z == nil || binary.BigEndian.Uint16(query[end+2:]) != dns.ClassINET || !dns.IsSubDomain(domain, strings.ToLower(name)) {
		return nil, Foreign
	}
	found, ours := z.lookup(name, binary.BigEndian.Uint16(query[end:]))
	if !ours {
		return nil, Foreign
	}
	var q dns.Msg
	if err := q.Unpack(query); err != nil {
		return refusal(query, dns.RcodeFormatError), Malformed
	}
	reply, err = z.reply(&q, found, stream)
	if err != nil {
		return refusal(query, dns.RcodeServerFailure), Malformed
	}
	return reply, Answered
}

// refusal is the shortest answer that says why there is no other.
func refusal(query []byte, rcode byte) []byte {
	r := make([]byte, headerSize)
	copy(r, query[:2])
	r[2] = 0x80 | query[2]&0x79 // opcode and RD as in the query
	r[3] = rcode
	return r
}

// records is what a name stands for.
type records struct {
	addrs []netip.Addr
	srv   []netip.AddrPort
	none  bool // the name does not exist now
}

// lookup says what a name stands for, or that it is not ours. Its last label is the domain.
func (z *Zone) lookup(name string, qtype uint16) (records, bool) {
	labels := dns.SplitDomainName(strings.ToLower(name))
	labels = labels[:len(labels)-1]
	for i := len(labels) - 1; i >= 0; i-- {
		before, after := labels[:i], labels[i+1:]
		switch kind := labels[i]; {
		case kind == "virtual", kind == "service", kind == "connect", kind == "addr":
			if !z.here(after) || len(before) == 0 {
				return records{}, false
			}
			return z.find(kind, before)
		case kind == "node", kind == "query", kind == "ingress":
			return records{}, false
		case qtype == dns.TypeSRV && strings.HasPrefix(kind, "_") && i > 0: // RFC 2782 without "service"
			if !z.here(after) {
				return records{}, false
			}
			return z.find("service", labels[:i+1])
		}
	}
	return records{}, false
}

// here says whether what follows the kind in a name names our own datacenter, namespace and partition, or nothing.
func (z *Zone) here(labels []string) bool {
	own := map[string]string{"dc": strings.ToLower(z.snap.Datacenter), "ns": "default", "ap": "default"}
	for ; len(labels) >= 2; labels = labels[2:] {
		if want, known := own[labels[1]]; !known || labels[0] != want {
			return false
		}
	}
	return len(labels) == 0 || labels[0] == own["dc"]
}

// find looks up the labels before the kind.
func (z *Zone) find(kind string, labels []string) (records, bool) {
	if kind == "addr" {
		addr, ok := parseHex(labels)
		return records{addrs: []netip.Addr{addr}}, ok
	}
	name, tag := labels[len(labels)-1], strings.Join(labels[:len(labels)-1], ".")
	if kind == "service" && len(labels) == 2 && strings.HasPrefix(labels[0], "_") && strings.HasPrefix(labels[1], "_") {
		name, tag = labels[0][1:], strings.TrimPrefix(labels[1], "_")
		if tag == "tcp" {
			tag = ""
		}
	}
	svc := z.services[name]
	if svc == nil || tag != "" && kind != "service" {
		return records{}, false
	}
	if kind == "virtual" {
		return records{addrs: slices.Clone(svc.Virtual)}, len(svc.Virtual) > 0
	}
	return instances(svc, tag)
}

// instances are those of a service that a plain connection reaches by way of the mesh. A service without them is not ours.
func instances(svc *catalog.Service, tag string) (records, bool) {
	var r records
	ours := false
	for _, inst := range svc.Instances {
		if !inst.Redirected() || tag != "" && !slices.ContainsFunc(inst.Tags, func(t string) bool { return strings.EqualFold(t, tag) }) {
			continue
		}
		ours = true
		if inst.Healthy {
			r.srv = append(r.srv, inst.Address)
		}
	}
	rand.Shuffle(len(r.srv), func(i, j int) { r.srv[i], r.srv[j] = r.srv[j], r.srv[i] })
	seen := make(map[netip.Addr]bool)
	for _, at := range r.srv {
		if !seen[at.Addr()] {
			seen[at.Addr()] = true
			r.addrs = append(r.addrs, at.Addr())
		}
	}
	r.none = len(r.srv) == 0
	return r, ours
}

// parseHex reads an address as it stands in the target of an SRV record.
func parseHex(labels []string) (netip.Addr, bool) {
	if len(labels) != 1 || len(labels[0]) != 8 && len(labels[0]) != 32 {
		return netip.Addr{}, false
	}
	raw := make([]byte, len(labels[0])/2)
	for i := range raw {
		high, low := hexDigit(labels[0][2*i]), hexDigit(labels[0][2*i+1])
		if high > 15 || low > 15 {
			return netip.Addr{}, false
		}
		raw[i] = high<<4 | low
	}
	addr, ok := netip.AddrFromSlice(raw)
	return addr, ok
}

func hexDigit(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	}
	return 255
}

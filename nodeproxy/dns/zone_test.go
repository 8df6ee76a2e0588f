package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// snapshot has api with two healthy instances and a sick one, two-legged with virtual IPs of both families, plain without a
// mesh port, sick without a healthy instance, and wide with 100 instances.
func snapshot(t testing.TB) *catalog.Snapshot {
	t.Helper()
	inst := func(service, id, address string, healthy bool, tags ...string) *catalog.Instance {
		at := netip.MustParseAddrPort(address)
		return &catalog.Instance{ID: id, Service: service, Healthy: healthy, Address: at, Mesh: netip.AddrPortFrom(at.Addr(), at.Port()+10000), Tags: tags}
	}
	plain := inst("plain", "plain-1", "10.0.3.1:80", true)
	plain.Mesh = netip.AddrPort{}
	native := inst("native", "native-1", "10.0.3.2:80", true)
	native.Native, native.Address = true, netip.AddrPort{}
	wide := &catalog.Service{Name: "wide"}
	for i := range 100 {
		wide.Instances = append(wide.Instances, inst("wide", fmt.Sprint("wide-", i), fmt.Sprintf("10.0.4.%d:80", i), true))
	}
	services := make(map[string]*catalog.Service)
	for _, svc := range []*catalog.Service{
		{Name: "API", Virtual: addrs("240.0.0.1"), Instances: []*catalog.Instance{
			inst("API", "api-1", "10.0.1.1:8080", true, "v1", "eu.west"), inst("API", "api-2", "10.0.1.2:8080", true, "v2"), inst("API", "api-3", "10.0.1.3:8080", false, "v3"),
			inst("API", "api-6", "[fd00::6]:8080", true, "v6"), inst("API", "api-7", "10.0.1.1:9090", true),
		}},
		{Name: "two-legged", Virtual: addrs("240.0.0.2", "fd01::2")},
		{Name: "plain", Instances: []*catalog.Instance{plain}},
		{Name: "native", Instances: []*catalog.Instance{native}},
		{Name: "sick", Virtual: addrs("240.0.0.4"), Instances: []*catalog.Instance{inst("sick", "sick-1", "10.0.2.1:80", false)}},
		wide,
	} {
		services[svc.Name] = svc
	}
	p, err := policy.Compile(1, policy.Deny, policy.Identity{TrustDomain: "x.consul"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := catalog.New(catalog.Snapshot{Generation: 7, Datacenter: "DC1", Services: services, Policy: p})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func addrs(texts ...string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

func pack(t testing.TB, name string, qtype uint16, edns uint16) []byte {
	t.Helper()
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	if edns > 0 {
		q.SetEdns0(edns, false)
	}
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// values are the data of the records that answer, sorted, and the rcode before them.
func values(t *testing.T, z *Zone, name string, qtype uint16) (string, Verdict) {
	t.Helper()
	query := pack(t, name, qtype, 0)
	b, v := z.Answer(query, true)
	if v != Answered {
		return "", v
	}
	var r dns.Msg
	if err := r.Unpack(b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b[:2], query[:2]) || !r.Response || !r.Authoritative || !r.RecursionAvailable || !r.RecursionDesired || r.Question[0].Name != dns.Fqdn(name) {
		t.Errorf("the header or the question of %s is not that of an answer: %s", name, &r)
	}
	list := []string{}
	for _, rr := range r.Answer {
		if rr.Header().Name != dns.Fqdn(name) || rr.Header().Ttl != 0 {
			t.Errorf("%s answers %s", rr, name)
		}
		list = append(list, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	slices.Sort(list)
	if len(list) == 0 && (len(r.Ns) != 1 || r.Ns[0].Header().Rrtype != dns.TypeSOA) {
		t.Errorf("%s: there is neither an answer nor an SOA record: %s", name, &r)
	}
	return strings.TrimSpace(dns.RcodeToString[r.Rcode] + " " + strings.Join(list, ", ")), v
}

func TestNamesOfTheMeshAreAnsweredAndAllOthersAreForeign(t *testing.T) {
	z := NewZone(snapshot(t))
	const healthy = "NOERROR 10.0.1.1, 10.0.1.2"
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // "" is foreign
	}{
		{"api.virtual.consul", dns.TypeA, "NOERROR 240.0.0.1"},
		{"API.Virtual.CONSUL", dns.TypeA, "NOERROR 240.0.0.1"},
		{"api.virtual.consul", dns.TypeAAAA, "NOERROR"},
		{"api.virtual.consul", dns.TypeHTTPS, "NOERROR"},
		{"api.virtual.consul", dns.TypeSRV, "NOERROR"},
		{"two-legged.virtual.consul", dns.TypeA, "NOERROR 240.0.0.2"},
		{"two-legged.virtual.consul", dns.TypeAAAA, "NOERROR fd01::2"},
		{"two-legged.virtual.consul", dns.TypeANY, "NOERROR 240.0.0.2, fd01::2"},
		{"api.virtual.default.ns.consul", dns.TypeA, "NOERROR 240.0.0.1"},
		{"api.virtual.default.ns.default.ap.dc1.dc.consul", dns.TypeA, "NOERROR 240.0.0.1"},
		{"api.virtual.dc1.consul", dns.TypeA, "NOERROR 240.0.0.1"},
		{"api.virtual.default.ns.dc1.consul", dns.TypeA, "NOERROR 240.0.0.1"},
		{"api.service.consul", dns.TypeA, healthy},
		{"api.service.consul", dns.TypeAAAA, "NOERROR fd00::6"},
		{"api.service.dc1.consul", dns.TypeA, healthy},
		{"api.service.dc1.dc.consul", dns.TypeA, healthy},
		{"v2.api.service.consul", dns.TypeA, "NOERROR 10.0.1.2"},
		{"eu.west.api.service.consul", dns.TypeA, "NOERROR 10.0.1.1"},
		{"_api._tcp.service.consul", dns.TypeA, healthy},
		{"_api._v2.service.consul", dns.TypeSRV, "NOERROR 1 1 8080 0a000102.addr.dc1.consul."},
		{"_api._v2.consul", dns.TypeSRV, "NOERROR 1 1 8080 0a000102.addr.dc1.consul."},
		{"v6.api.service.consul", dns.TypeSRV, "NOERROR 1 1 8080 fd000000000000000000000000000006.addr.dc1.consul."},
		{"v3.api.service.consul", dns.TypeA, "NXDOMAIN"},
		{"api.connect.consul", dns.TypeA, healthy},
		{"sick.service.consul", dns.TypeA, "NXDOMAIN"},
		{"sick.service.consul", dns.TypeSRV, "NXDOMAIN"},
		{"sick.virtual.consul", dns.TypeA, "NOERROR 240.0.0.4"},
		{"0a000102.addr.consul", dns.TypeA, "NOERROR 10.0.1.2"},
		{"0a000102.addr.dc1.consul", dns.TypeAAAA, "NOERROR"},
		{"fd000000000000000000000000000006.addr.dc1.consul", dns.TypeAAAA, "NOERROR fd00::6"},

		{"example.com", dns.TypeA, ""},
		{"consul", dns.TypeSOA, ""},
		{"notconsul", dns.TypeA, ""},
		{"api.virtual.notconsul", dns.TypeA, ""},
		{"virtual.consul", dns.TypeA, ""},
		{"nobody.virtual.consul", dns.TypeA, ""},
		{"nobody.service.consul", dns.TypeA, ""},
		{"api.virtual.dc2.consul", dns.TypeA, ""},
		{"api.service.dc2.consul", dns.TypeA, ""},
		{"api.service.team.ns.consul", dns.TypeA, ""},
		{"api.service.east.peer.consul", dns.TypeA, ""},
		{"api.service.default.ns.dc2.dc.consul", dns.TypeA, ""},
		{"x.api.virtual.consul", dns.TypeA, ""},
		{"v2.api.connect.consul", dns.TypeA, ""},
		{"v9.api.service.consul", dns.TypeA, ""},
		{"wide.virtual.consul", dns.TypeA, ""}, // it has none
		{"plain.service.consul", dns.TypeA, ""},
		{"native.connect.consul", dns.TypeA, ""},
		{"node-1.node.consul", dns.TypeA, ""},
		{"api.ingress.consul", dns.TypeA, ""},
		{"api.query.consul", dns.TypeA, ""},
		{"0a0001.addr.consul", dns.TypeA, ""},
		{"0a00010g.addr.consul", dns.TypeA, ""},
	} {
		got, v := values(t, z, c.name, c.qtype)
		if got != c.want || (v == Foreign) != (c.want == "") {
			t.Errorf("%s %s: %q (verdict %d), want %q", c.name, dns.TypeToString[c.qtype], got, v, c.want)
		}
	}
}

func TestSRVAnswersCarryTheAddresses(t *testing.T) {
	b, _ := NewZone(snapshot(t)).Answer(pack(t, "api.service.consul", dns.TypeSRV, 1232), false)
	var r dns.Msg
	if err := r.Unpack(b); err != nil {
		t.Fatal(err)
	}
	var extra []string
	for _, rr := range r.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			extra = append(extra, rr.Header().Name)
		}
	}
	slices.Sort(extra)
	want := []string{"0a000101.addr.dc1.consul.", "0a000102.addr.dc1.consul.", "fd000000000000000000000000000006.addr.dc1.consul."}
	if len(r.Answer) != 4 || !slices.Equal(extra, want) || r.IsEdns0() == nil {
		t.Errorf("the answer is %s", &r)
	}
}

func TestAnswersAreShuffled(t *testing.T) {
	z := NewZone(snapshot(t))
	first := make(map[string]bool)
	for range 200 {
		b, _ := z.Answer(pack(t, "wide.service.consul", dns.TypeA, 4096), false)
		var r dns.Msg
		if err := r.Unpack(b); err != nil {
			t.Fatal(err)
		}
		first[r.Answer[0].String()] = true
	}
	if len(first) < 20 {
		t.Errorf("only %d of 100 addresses are ever the first", len(first))
	}
}

func TestRepliesFitWhatTheClientTakes(t *testing.T) {
	z := NewZone(snapshot(t))
	for _, c := range []struct {
		edns      uint16
		stream    bool
		limit     int
		truncated bool
	}{
		{0, false, 512, true}, {100, false, 512, true}, {1232, false, 1232, true}, {4096, false, 4096, false}, {0, true, 65535, false}, {512, true, 65535, false},
	} {
		b, v := z.Answer(pack(t, "wide.service.consul", dns.TypeA, c.edns), c.stream)
		var r dns.Msg
		if err := r.Unpack(b); err != nil || v != Answered {
			t.Fatal(err, v)
		}
		if len(b) > c.limit || r.Truncated != c.truncated || !c.truncated && len(r.Answer) != 100 || c.truncated && len(r.Answer) < 20 {
			t.Errorf("EDNS %d, stream %v: %d bytes, %d records, TC %v", c.edns, c.stream, len(b), len(r.Answer), r.Truncated)
		}
		if (r.IsEdns0() != nil) != (c.edns > 0) {
			t.Errorf("EDNS %d: the reply has %v", c.edns, r.IsEdns0())
		}
	}
}

func TestWhatIsNoQueryForANameOfTheMesh(t *testing.T) {
	z := NewZone(snapshot(t))
	change := func(f func(b []byte) []byte) []byte { return f(pack(t, "api.virtual.consul", dns.TypeA, 1232)) }
	for _, c := range []struct {
		name    string
		query   []byte
		verdict Verdict
		rcode   int // -1: no reply
	}{
		{"empty", nil, Malformed, -1},
		{"half a header", make([]byte, 11), Malformed, -1},
		{"an answer", change(func(b []byte) []byte { b[2] |= 0x80; return b }), Malformed, -1},
		{"a name that goes on beyond the end", change(func(b []byte) []byte { return b[:20] }), Malformed, dns.RcodeFormatError},
		{"a question without a type", change(func(b []byte) []byte { return b[:len(b)-13] }), Malformed, dns.RcodeFormatError},
		{"a name that points to itself", change(func(b []byte) []byte { b[12], b[13] = 0xc0, 12; return b }), Malformed, dns.RcodeFormatError},
		{"half an OPT record", change(func(b []byte) []byte { return b[:len(b)-3] }), Malformed, dns.RcodeFormatError},
		{"an update", change(func(b []byte) []byte { b[2] |= dns.OpcodeUpdate << 3; return b }), Foreign, -1},
		{"two questions", change(func(b []byte) []byte { b[5] = 2; return b }), Foreign, -1},
		{"another class", change(func(b []byte) []byte { b[len(b)-12] = dns.ClassCHAOS; return b }), Foreign, -1},
	} {
		reply, v := z.Answer(c.query, false)
		if v != c.verdict || (reply == nil) != (c.rcode < 0) {
			t.Errorf("%s: verdict %d with %d bytes", c.name, v, len(reply))
			continue
		}
		if reply != nil && (int(reply[3]) != c.rcode || !bytes.Equal(reply[:2], c.query[:2]) || reply[2]&0x80 == 0) {
			t.Errorf("%s: the reply is %x", c.name, reply)
		}
	}
	b, _ := z.Answer(change(func(b []byte) []byte { b[len(b)-5] = 1; return b }), false) // the version in OPT
	var r dns.Msg
	if err := r.Unpack(b); err != nil || r.Rcode != dns.RcodeBadVers {
		t.Errorf("an unknown version of EDNS: %v %s", err, &r)
	}
	if _, v := (*Zone)(nil).Answer(pack(t, "api.virtual.consul", dns.TypeA, 0), false); v != Foreign {
		t.Errorf("before there is a snapshot the verdict is %d", v)
	}
}

// FuzzAnswer asserts that whatever comes in, what goes out is a message with the query's ID that is no larger than the
// client takes, or nothing.
func FuzzAnswer(f *testing.F) {
	z := NewZone(snapshot(f))
	for _, name := range []string{"api.virtual.consul", "wide.service.consul", "_api._tcp.consul", "0a000102.addr.consul", "example.com", `a\.b.api.service.consul`} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypeANY} {
			f.Add(pack(f, name, qtype, 0), false)
			f.Add(pack(f, name, qtype, 1232), true)
		}
	}
	f.Fuzz(func(t *testing.T, query []byte, stream bool) {
		before := bytes.Clone(query)
		reply, v := z.Answer(query, stream)
		if !bytes.Equal(query, before) {
			t.Fatal("the query was changed")
		}
		if (v == Answered && reply == nil) || (v == Foreign && reply != nil) {
			t.Fatalf("verdict %d with %d bytes", v, len(reply))
		}
		if reply == nil {
			return
		}
		var r dns.Msg
		if err := r.Unpack(reply); err != nil {
			t.Fatalf("the reply %x: %v", reply, err)
		}
		if !r.Response || !bytes.Equal(reply[:2], query[:2]) {
			t.Fatalf("the reply %s is no answer to %x", &r, query)
		}
		var q dns.Msg
		limit := dns.MinMsgSize
		if q.Unpack(query) == nil && q.IsEdns0() != nil {
			limit = max(limit, int(q.IsEdns0().UDPSize()))
		}
		if !stream && len(reply) > limit {
			t.Fatalf("%d bytes for a client that takes %d", len(reply), limit)
		}
	})
}

func BenchmarkAnswer(b *testing.B) {
	z := NewZone(snapshot(b))
	for _, name := range []string{"api.virtual.consul", "wide.service.consul", "example.com"} {
		query := pack(b, name, dns.TypeA, 1232)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				z.Answer(query, false)
			}
		})
	}
}

package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const patience = 30 * time.Second

// sockets stands for a namespace: every query was sent to the name server at upstream.
type sockets struct {
	upstream   netip.AddrPort
	look       func() // called between a query and its answer; may be nil
	open, peak atomic.Int64
}

func (s *sockets) Resolver(netip.AddrPort) (netip.AddrPort, bool) {
	if s.look != nil {
		s.look()
	}
	return s.upstream, true
}

func (s *sockets) DialPackets(_ netip.Addr, to netip.AddrPort) (*net.UDPConn, error) {
	s.peak.Store(max(s.peak.Load(), s.open.Add(1)))
	return net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
}

func (s *sockets) DialStream(ctx context.Context, _ netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

type packets struct{ *net.UDPConn }

func (p packets) Read(b []byte) (int, netip.AddrPort, netip.AddrPort, error) {
	n, from, err := p.ReadFromUDPAddrPort(b)
	return n, from, netip.AddrPort{}, err
}

func (p packets) Write(b []byte, to, _ netip.AddrPort) error {
	_, err := p.WriteToUDPAddrPort(b, to)
	return err
}

// serving is a server that serves one namespace until the test ends, and a client of it.
type serving struct {
	*Server
	t       *testing.T
	sockets *sockets
	udp     *net.UDPConn
	tcp     *net.TCPListener
	client  *net.UDPConn
	done    chan struct{} // closed when Serve returns
	stop    func()
}

func serve(t *testing.T, upstream netip.AddrPort) *serving {
	t.Helper()
	return serveSockets(t, &sockets{upstream: upstream})
}

func serveSockets(t *testing.T, of *sockets) *serving {
	t.Helper()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.DialUDP("udp4", nil, udp.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	s := &serving{t: t, sockets: of, udp: udp, tcp: tcp, client: client}
	s.begin()
	return s
}

// begin has a server of its own serve the sockets of s.
func (s *serving) begin() {
	s.Server, s.done = NewServer(slog.New(slog.DiscardHandler)), make(chan struct{})
	s.Apply(snapshot(s.t))
	go func() {
		defer close(s.done)
		s.Serve(s.sockets, []Packets{packets{s.udp}}, []*net.TCPListener{s.tcp})
	}()
	s.stop = sync.OnceFunc(func() {
		s.udp.Close()
		s.tcp.Close()
		s.awaitEnd()
	})
	s.t.Cleanup(s.stop)
}

func (s *serving) awaitEnd() {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		s.t.Error("the server does not end")
	}
}

// ask sends a query by UDP and returns the next datagram.
func (s *serving) ask(query []byte) *dns.Msg {
	s.t.Helper()
	_ = s.client.SetDeadline(time.Now().Add(patience))
	if _, err := s.client.Write(query); err != nil {
		s.t.Fatal(err)
	}
	return s.answer(query)
}

// answer is the next datagram, as one to query.
func (s *serving) answer(query []byte) *dns.Msg {
	s.t.Helper()
	_ = s.client.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 65535)
	n, err := s.client.Read(b)
	if err != nil {
		s.t.Fatal(err)
	}
	r := new(dns.Msg)
	if err := r.Unpack(b[:n]); err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(b[:2], query[:2]) {
		s.t.Errorf("the answer has ID %x, the query %x", b[:2], query[:2])
	}
	return r
}

// nameServer answers each datagram with what reply makes of it.
func nameServer(t *testing.T, reply func(query []byte, from netip.AddrPort) [][]byte) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 65535)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			for _, r := range reply(bytes.Clone(b[:n]), from) {
				_, _ = conn.WriteToUDPAddrPort(r, from)
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// text answers a query with a TXT record.
func text(query []byte, value string) []byte {
	var q dns.Msg
	if err := q.Unpack(query); err != nil {
		return nil
	}
	r := new(dns.Msg).SetReply(&q)
	r.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{value}}}
	b, _ := r.Pack()
	return b
}

func TestForeignQueriesReachTheNameServerUnchangedButForARandomIDAndPort(t *testing.T) {
	query := pack(t, "EXAMPLE.com", dns.TypeTXT, 1400)
	var mu sync.Mutex
	ids, ports := make(map[uint16]bool), make(map[uint16]bool)
	s := serve(t, nameServer(t, func(q []byte, from netip.AddrPort) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		ids[binary.BigEndian.Uint16(q)], ports[from.Port()] = true, true
		if !bytes.Equal(q[2:], query[2:]) {
			t.Errorf("the name server gets %x for %x", q, query)
		}
		return [][]byte{text(q, "yes")}
	}))
	const n = 100
	for range n {
		if r := s.ask(query); len(r.Answer) != 1 || !strings.Contains(r.Answer[0].String(), "yes") {
			t.Fatalf("the answer is %s", r)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ids) < n*9/10 || len(ports) < n/2 {
		t.Errorf("%d queries had %d IDs and %d ports", n, len(ids), len(ports))
	}
	s.stop() // an answer is counted after it was sent
	if c := s.Counts(); c.Forwarded != n || c.Answered != 0 || c.Failed != 0 {
		t.Errorf("the counts are %+v", c)
	}
}

func TestAnswersThatWereNotAskedForAreIgnored(t *testing.T) {
	s := serve(t, nameServer(t, func(q []byte, _ netip.AddrPort) [][]byte {
		other := bytes.Clone(q)
		other[1]++
		return [][]byte{
			{}, q[:5], q, text(other, "another ID"), text(bytes.Replace(q, []byte("example"), []byte("exbmple"), 1), "another question"),
			text(bytes.Replace(q, []byte("example"), []byte("eXample"), 1), "another letter case"), text(q, "the answer"), text(q, "too late"),
		}
	}))
	for range 10 {
		if r := s.ask(pack(t, "example.com", dns.TypeTXT, 0)); !strings.Contains(r.String(), "the answer") {
			t.Fatalf("the answer is %s", r)
		}
	}
}

func TestANameServerThatIsNotThereIsAServerFailure(t *testing.T) {
	closed, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	s := serve(t, closed.LocalAddr().(*net.UDPAddr).AddrPort())
	if r := s.ask(pack(t, "example.com", dns.TypeA, 0)); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("the answer is %s", r)
	}
	if c := s.Counts(); c.Failed != 1 {
		t.Errorf("the counts are %+v", c)
	}
}

func TestAFloodTakesNoMoreThanItsShareAndNamesOfTheMeshAreStillAnswered(t *testing.T) {
	var heard atomic.Int64
	s := serve(t, nameServer(t, func([]byte, netip.AddrPort) [][]byte { heard.Add(1); return nil }))
	foreign := pack(t, "example.com", dns.TypeA, 0)
	const flood = 5000
	for i := range flood {
		if _, err := s.client.Write(foreign); err != nil {
			t.Fatal(err)
		}
		if i%50 == 0 {
			if r := s.ask(pack(t, "api.virtual.consul", dns.TypeA, 0)); len(r.Answer) != 1 {
				t.Fatalf("during the flood the answer is %s", r)
			}
		}
	}
	if peak := s.sockets.peak.Load(); peak > maxPendingSpace || peak < maxPendingSpace/2 {
		t.Errorf("%d queries were on their way at once, the share is %d", peak, maxPendingSpace)
	}
	if c := s.Counts(); c.Failed < flood/2 || c.Answered != flood/50 {
		t.Errorf("the counts are %+v", c)
	}
	began := time.Now()
	s.stop()
	if took := time.Since(began); took > forwardTimeout {
		t.Errorf("the server has waited for the answers: %s", took)
	}
	if n := len(s.pending); n != 0 {
		t.Errorf("%d queries are still on their way after the end", n)
	}
}

// streamServer is a name server by TCP: it answers each query as often as repeat says, and counts connections.
func streamServer(t *testing.T, repeat int) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	accepted := new(atomic.Int64)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			go func() {
				defer c.Close()
				for {
					q, err := readMessage(c)
					if err != nil {
						return
					}
					for range repeat {
						_, _ = c.Write(framed(text(q, "by TCP")))
					}
				}
			}()
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort(), accepted
}

func framed(message []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...)
}

func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func (s *serving) dial() *net.TCPConn {
	s.t.Helper()
	c, err := net.Dial("tcp4", s.tcp.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func TestAConnectionCarriesQueriesOfBothKindsAndAllAnswers(t *testing.T) {
	upstream, accepted := streamServer(t, 3)
	s := serve(t, upstream)
	c := s.dial()
	all := bytes.Join([][]byte{
		framed(pack(t, "wide.service.consul", dns.TypeA, 0)), framed(pack(t, "example.com", dns.TypeTXT, 0)),
		framed(pack(t, "api.virtual.consul", dns.TypeA, 0)), framed(pack(t, "example.org", dns.TypeTXT, 0)),
	}, nil)
	for _, part := range [][]byte{all[:1], all[1:40], all[40:]} { // as TCP may deliver it
		if _, err := c.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]int)
	for {
		b, err := readMessage(c)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var r dns.Msg
		if err := r.Unpack(b); err != nil {
			t.Fatal(err)
		}
		got[r.Question[0].Name] += len(r.Answer)
	}
	want := map[string]int{"wide.service.consul.": 100, "example.com.": 3, "api.virtual.consul.": 1, "example.org.": 3}
	for name, n := range want {
		if got[name] != n {
			t.Errorf("%d answers for %s, want %d", got[name], name, n)
		}
	}
	if n := accepted.Load(); n != 1 {
		t.Errorf("the name server was connected to %d times", n)
	}
}

func TestConnectionsAreBoundedAndEndWithTheServer(t *testing.T) {
	upstream, _ := streamServer(t, 1)
	s := serve(t, upstream)
	for range maxStreamsSpace {
		c := s.dial()
		if _, err := c.Write(framed(pack(t, "example.com", dns.TypeTXT, 0))); err != nil {
			t.Fatal(err)
		}
		if _, err := readMessage(c); err != nil {
			t.Fatal(err)
		}
	}
	over := s.dial()
	if _, err := readMessage(over); err == nil {
		t.Error("one connection too many is served")
	}
	if r := s.ask(pack(t, "api.virtual.consul", dns.TypeA, 0)); len(r.Answer) != 1 {
		t.Errorf("the answer is %s", r)
	}
	s.stop()
	if n := len(s.streams); n != 0 {
		t.Errorf("%d connections are left after the end", n)
	}
}

func TestJunkEndsAConnection(t *testing.T) {
	upstream, accepted := streamServer(t, 1)
	s := serve(t, upstream)
	for _, junk := range [][]byte{{0, 0}, {0, 3, 1, 2, 3}, framed(make([]byte, 11)), framed(append([]byte{1, 2, 0x80}, make([]byte, 20)...))} {
		c := s.dial()
		if _, err := c.Write(junk); err != nil {
			t.Fatal(err)
		}
		if b, err := readMessage(c); err == nil {
			t.Errorf("%x is answered with %x", junk, b)
		}
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("junk has reached the name server %d times", n)
	}
}

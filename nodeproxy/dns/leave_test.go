package dns

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// next is another daemon's server of the same sockets, which has them from s.
func (s *serving) next() *serving {
	s.t.Helper()
	udp, err := s.udp.File()
	if err != nil {
		s.t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := s.tcp.File()
	if err != nil {
		s.t.Fatal(err)
	}
	defer tcp.Close()
	conn, err := net.FilePacketConn(udp)
	if err != nil {
		s.t.Fatal(err)
	}
	ln, err := net.FileListener(tcp)
	if err != nil {
		s.t.Fatal(err)
	}
	n := &serving{t: s.t, sockets: &sockets{upstream: s.sockets.upstream}, udp: conn.(*net.UDPConn), tcp: ln.(*net.TCPListener), client: s.client}
	n.begin()
	return n
}

// leave ends the serving as at a hand-over.
func (s *serving) leave() { s.Leave(time.Now(), time.Now().Add(patience)) }

// heldServer is a name server by UDP that says what it was asked and answers nothing before release is closed.
func heldServer(t *testing.T) (at netip.AddrPort, asked chan string, release chan struct{}) {
	asked, release = make(chan string, 10), make(chan struct{})
	return nameServer(t, func(q []byte, _ netip.AddrPort) [][]byte {
		asked <- name(q)
		<-release
		return [][]byte{text(q, "late")}
	}), asked, release
}

func name(query []byte) string {
	var m dns.Msg
	if m.Unpack(query) != nil || len(m.Question) != 1 {
		return ""
	}
	return m.Question[0].Name
}

func TestWhoLeavesAnswersWhatItHasReadAndReadsNoMore(t *testing.T) {
	upstream, asked, release := heldServer(t)
	s := serve(t, upstream)
	held := pack(t, "example.com", dns.TypeTXT, 0)
	if _, err := s.client.Write(held); err != nil {
		t.Fatal(err)
	}
	<-asked
	s.leave()
	ours := pack(t, "api.virtual.consul", dns.TypeA, 0)
	if _, err := s.client.Write(ours); err != nil {
		t.Fatal(err)
	}
	n := s.next()
	if r := n.answer(ours); len(r.Answer) != 1 {
		t.Errorf("what came after that is answered with %s", r)
	}
	close(release)
	if r := n.answer(held); !strings.Contains(r.String(), "late") {
		t.Errorf("what came before is answered with %s", r)
	}
	s.awaitEnd()
	if c := s.Counts(); c != (Counts{Forwarded: 1}) {
		t.Errorf("who has left counts %+v", c)
	}
	if c := n.Counts(); c != (Counts{Answered: 1}) {
		t.Errorf("who follows counts %+v", c)
	}
}

func TestAQueryIsAnsweredWhoseReaderLeavesBeforeItLooks(t *testing.T) {
	read, look := make(chan struct{}), make(chan struct{})
	s := serveSockets(t, &sockets{look: func() { close(read); <-look }})
	query := pack(t, "api.virtual.consul", dns.TypeA, 0)
	if _, err := s.client.Write(query); err != nil {
		t.Fatal(err)
	}
	<-read
	left := make(chan struct{})
	go func() { defer close(left); s.leave(); s.stop() }() // the sockets may be closed once Leave has returned
	<-s.leaving.Done()
	close(look)
	if r := s.answer(query); len(r.Answer) != 1 {
		t.Errorf("the answer is %s", r)
	}
	<-left
}

func TestAConnectionOfWhoLeavesIsServedUntilItHasNoQueryOnItsWay(t *testing.T) {
	asked, release := make(chan struct{}, 1), make(chan struct{})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for {
			q, err := readMessage(c)
			if err != nil {
				return
			}
			asked <- struct{}{}
			<-release
			_, _ = c.Write(framed(text(q, "late")))
		}
	}()
	s := serve(t, ln.Addr().(*net.TCPAddr).AddrPort())
	foreign, ours := framed(pack(t, "example.com", dns.TypeTXT, 0)), framed(pack(t, "api.virtual.consul", dns.TypeA, 0))
	send := func(c net.Conn, message []byte) {
		t.Helper()
		if _, err := c.Write(message); err != nil {
			t.Fatal(err)
		}
	}
	gets := func(c net.Conn, name string) {
		t.Helper()
		b, err := readMessage(c)
		var r dns.Msg
		if err != nil || r.Unpack(b) != nil || len(r.Answer) != 1 || r.Question[0].Name != name {
			t.Errorf("the answer for %s is %s, %v", name, &r, err)
		}
	}
	held, begun, quiet := s.dial(), s.dial(), s.dial()
	for _, c := range []net.Conn{held, begun, quiet} { // all are accepted
		send(c, ours)
		gets(c, "api.virtual.consul.")
	}
	send(held, foreign)
	<-asked
	send(begun, ours[:5])
	s.leave()
	after := s.dial()
	send(after, ours)
	send(begun, ours[5:])
	gets(begun, "api.virtual.consul.")
	s.next()
	gets(after, "api.virtual.consul.")
	for _, c := range []net.Conn{begun, quiet} { // nothing is on its way
		if _, err := readMessage(c); !errors.Is(err, io.EOF) {
			t.Errorf("a connection without a query ends with %v", err)
		}
	}
	close(release)
	gets(held, "example.com.")
	held.Close()
	s.awaitEnd()
}

func TestWhoLeavesLetsGoOfWhatIsNotAnsweredInTime(t *testing.T) {
	upstream, asked, release := heldServer(t)
	defer close(release)
	s := serve(t, upstream)
	if _, err := s.client.Write(pack(t, "example.com", dns.TypeTXT, 0)); err != nil {
		t.Fatal(err)
	}
	<-asked
	began := time.Now()
	s.Leave(began, began)
	s.awaitEnd()
	if took := time.Since(began); took > forwardTimeout {
		t.Errorf("it took %s", took)
	}
	if r := s.next().ask(pack(t, "api.virtual.consul", dns.TypeA, 0)); len(r.Answer) != 1 { // and no failure before it
		t.Errorf("the next answer is %s", r)
	}
}

func TestQueriesAreReadUntilTheTimeThatIsGiven(t *testing.T) {
	s := serve(t, netip.AddrPort{})
	query := pack(t, "api.virtual.consul", dns.TypeA, 0)
	s.ask(query) // it has begun
	left := make(chan struct{})
	go func() { defer close(left); s.Leave(time.Now().Add(patience), time.Now().Add(patience)) }()
	<-s.leaving.Done()
	if r := s.ask(query); len(r.Answer) != 1 {
		t.Errorf("the answer is %s", r)
	}
	s.stop()
	<-left
}

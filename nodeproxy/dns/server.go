package dns

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"nodeproxy.io/nodeproxy/catalog"
)

const (
	maxPending      = 512 // queries on their way to other name servers, on the node. Each takes a file descriptor
	maxPendingSpace = 128 // of one network namespace. Further ones are dropped: resolvers ask again
	maxStreams      = 128 // connections of clients, on the node. Each takes two
	maxStreamsSpace = 32
	forwardTimeout  = 5 * time.Second  // until an answer of another name server: as long as resolvers wait
	streamIdle      = 10 * time.Second // of a connection without a message either way
	lastIdle        = 2 * time.Second  // of one without a query on its way, once nothing else is read
	errorPause      = 10 * time.Millisecond
)

// Sockets are the sockets of one network namespace.
type Sockets interface {
	// Resolver is the name server that was asked by what was sent to the address at; false for what was not steered there.
	Resolver(at netip.AddrPort) (netip.AddrPort, bool)
	// DialPackets connects a UDP socket inside the namespace, at a random port; from may be zero.
	DialPackets(from netip.Addr, to netip.AddrPort) (*net.UDPConn, error)
	// DialStream connects by TCP from inside the namespace; from may be zero.
	DialStream(ctx context.Context, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error)
}

// Packets is a socket that queries come to.
type Packets interface {
	// Read waits for a query from a client, sent to the address at. It fails with net.ErrClosed once the socket is closed, and with
	// os.ErrDeadlineExceeded after the deadline.
	Read(b []byte) (n int, from, at netip.AddrPort, err error)
	SetReadDeadline(at time.Time) error
	// Write answers the client from that address.
	Write(b []byte, to, at netip.AddrPort) error
}

// Counts are how many queries were answered from the snapshot, answered by the name server that was asked, and not answered.
type Counts struct{ Answered, Forwarded, Failed uint64 }

// Server serves the queries of network namespaces. Its methods may be called concurrently.
type Server struct {
	log     *slog.Logger
	zone    atomic.Pointer[Zone]
	pending chan struct{} // a token for each query on its way
	streams chan struct{} // and for each connection
	buffers sync.Pool     // of *[dns.MaxMsgSize]byte, lent while an answer is copied

	answered, forwarded, failed atomic.Uint64

	mu             sync.Mutex
	reading        sync.WaitGroup // one for each namespace that queries are read in
	leaving        context.Context
	leave          func()
	reads, answers time.Time // of Leave; valid once leaving has ended
}

// NewServer returns a server that knows no names until Apply.
func NewServer(log *slog.Logger) *Server {
	leaving, leave := context.WithCancel(context.Background())
	return &Server{
		log: log, leaving: leaving, leave: leave, pending: make(chan struct{}, maxPending), streams: make(chan struct{}, maxStreams),
		buffers: sync.Pool{New: func() any { return new([dns.MaxMsgSize]byte) }},
	}
}

// Apply makes answers come from snap. Call it when what they name is redirected.
func (s *Server) Apply(snap *catalog.Snapshot) { s.zone.Store(NewZone(snap)) }

// Counts counts since the start.
func (s *Server) Counts() Counts {
	return Counts{s.answered.Load(), s.forwarded.Load(), s.failed.Load()}
}

// Leave ends the serving in all namespaces: nothing is taken from the sockets after reads, and what was taken has until answers to be
// answered. It returns once nothing is taken any more, and each Serve returns with its last answer: only then its sockets may be
// closed. A connection that was accepted is served until it is quiet. Call it once.
func (s *Server) Leave(reads, answers time.Time) {
	s.mu.Lock()
	s.reads, s.answers = reads, answers
	s.leave()
	s.mu.Unlock()
	s.reading.Wait()
}

// Serve answers what comes to the sockets of one namespace until Leave, or until all of them are closed: then it lets go of every query.
func (s *Server) Serve(sockets Sockets, packets []Packets, streams []*net.TCPListener) {
	s.mu.Lock()
	if s.leaving.Err() != nil {
		s.mu.Unlock()
		return
	}
	s.reading.Add(1)
	s.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	sp := &space{Server: s, Sockets: sockets, ctx: ctx, ownPending: make(chan struct{}, maxPendingSpace), ownStreams: make(chan struct{}, maxStreamsSpace)}
	defer context.AfterFunc(s.leaving, func() {
		time.AfterFunc(time.Until(s.answers), stop)
		for _, p := range packets {
			_ = p.SetReadDeadline(s.reads) // it fails for a socket that is closed, and not read
		}
		for _, ln := range streams {
			_ = ln.SetDeadline(s.reads)
		}
	})()
	var listening sync.WaitGroup
	for _, p := range packets {
		listening.Go(func() { sp.servePackets(p) })
	}
	for _, ln := range streams {
		listening.Go(func() { sp.serveStreams(ln) })
	}
	listening.Wait()
	s.reading.Done()
	if s.leaving.Err() == nil {
		stop()
	}
	sp.work.Wait()
}

// space is one namespace that is served.
type space struct {
	*Server
	Sockets
	ctx                    context.Context // ends when nothing is answered any more
	ownPending, ownStreams chan struct{}
	work                   sync.WaitGroup // one for each query on its way and each connection
}

// start runs work in a goroutine of its own if both own and all have room for it.
func (sp *space) start(own, all chan struct{}, work func()) bool {
	select {
	case own <- struct{}{}:
	default:
		return false
	}
	select {
	case all <- struct{}{}:
	default:
		<-own
		return false
	}
	sp.work.Go(func() {
		defer func() { <-all; <-own }()
		defer sp.protect()
		work()
	})
	return true
}

// protect keeps a mistake in the handling of one message from ending the daemon.
func (s *Server) protect() {
	if cause := recover(); cause != nil {
		s.failed.Add(1)
		s.log.Error("a name query failed because of a mistake in nodeproxy: please report it", "panic", cause, "stack", string(debug.Stack()))
	}
}

func (sp *space) servePackets(p Packets) {
	var b [edns]byte
	for {
		n, from, at, err := p.Read(b[:])
		switch {
		case isEnd(err):
			return
		case err != nil: // the kernel is short of memory, say: the next may be read
			time.Sleep(errorPause)
		case n < len(b): // else it was cut off
			sp.take(p, b[:n], from, at)
		}
	}
}

// isEnd says whether nothing is read any more.
func isEnd(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded)
}

// take deals with one datagram. query is the caller's again when it returns.
func (sp *space) take(p Packets, query []byte, from, at netip.AddrPort) {
	defer sp.protect()
	resolver, steered := sp.Resolver(at)
	if !steered {
		return // sent to our port by itself
	}
	reply, verdict := sp.zone.Load().Answer(query, false)
	if verdict == Foreign {
		query = bytes.Clone(query)
		if sp.start(sp.ownPending, sp.pending, func() { sp.forward(p, query, from, at, resolver) }) {
			return
		}
	}
	sp.count(verdict)
	if reply != nil {
		_ = p.Write(reply, from, at) // a client that is gone is nobody's loss
	}
}

func (s *Server) count(v Verdict) {
	if v == Answered {
		s.answered.Add(1)
	} else {
		s.failed.Add(1)
	}
}

// forward asks the name server and passes its answer on. No answer is passed on as none, and so is one that came too late for this
// daemon: who asks again asks the next.
func (sp *space) forward(p Packets, query []byte, from, at, resolver netip.AddrPort) {
	err := sp.exchange(query, from, resolver, func(reply []byte) error { return p.Write(reply, from, at) })
	if err == nil {
		sp.forwarded.Add(1)
		return
	}
	sp.failed.Add(1)
	if !errors.Is(err, os.ErrDeadlineExceeded) && sp.ctx.Err() == nil && len(query) >= headerSize {
		_ = p.Write(refusal(query, dns.RcodeServerFailure), from, at) // the client need not wait: nobody is there
	}
}

// exchange sends query with a random ID from a random port, and calls pass with the answer, which has the query's ID.
func (sp *space) exchange(query []byte, from, resolver netip.AddrPort, pass func(reply []byte) error) error {
	conn, err := sp.DialPackets(source(from), resolver)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(sp.ctx, func() { conn.Close() })()
	if err := conn.SetDeadline(time.Now().Add(forwardTimeout)); err != nil {
		return err
	}
	asked := bytes.Clone(query)
	if _, err := rand.Read(asked[:2]); err != nil {
		return err
	}
	if _, err := conn.Write(asked); err != nil {
		return err
	}
	for {
		passed, err := sp.receive(conn, func(reply []byte) (bool, error) {
			if !answers(reply, asked) {
				return false, nil // somebody guesses: the answer may still come
			}
			copy(reply, query[:2])
			return true, pass(reply)
		})
		if passed || err != nil {
			return err
		}
	}
}

// source is the address that the application bound its socket to, as the name server should see it; zero for none: such a
// socket has a loopback address since it was steered.
func source(from netip.AddrPort) netip.Addr {
	if from.Addr().IsLoopback() {
		return netip.Addr{}
	}
	return from.Addr()
}

// receive waits for a datagram and lends a buffer only while take looks at it.
func (s *Server) receive(conn *net.UDPConn, take func([]byte) (bool, error)) (taken bool, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	waitErr := raw.Read(func(fd uintptr) bool {
		b := s.buffers.Get().(*[dns.MaxMsgSize]byte)
		defer s.buffers.Put(b)
		n, done, errRead := read(int(fd), b[:])
		if !done {
			return false
		}
		if err = errRead; err == nil {
			taken, err = take(b[:n])
		}
		return true
	})
	return taken, errors.Join(waitErr, err)
}

// answers says whether reply is one to asked: the same ID and question, in the same letter case.
func answers(reply, asked []byte) bool {
	if len(reply) < headerSize || reply[2]&0x80 == 0 || !bytes.Equal(reply[:2], asked[:2]) {
		return false
	}
	if binary.BigEndian.Uint16(asked[4:]) != 1 || binary.BigEndian.Uint16(reply[4:]) != 1 {
		return true // a name server that makes nothing of the query may leave the question out
	}
	_, end, err := dns.UnpackDomainName(asked, headerSize)
	if err != nil || end+4 > len(asked) || end+4 > len(reply) {
		return false
	}
	return bytes.Equal(reply[headerSize:end+4], asked[headerSize:end+4])
}

func (sp *space) serveStreams(ln *net.TCPListener) {
	for {
		conn, err := ln.AcceptTCP()
		switch {
		case isEnd(err):
			return
		case err != nil: // out of file descriptors, say
			time.Sleep(errorPause)
		default:
			if !sp.start(sp.ownStreams, sp.streams, func() { sp.serveStream(conn) }) {
				sp.failed.Add(1)
				conn.Close()
			}
		}
	}
}

func (sp *space) serveStream(conn *net.TCPConn) {
	defer conn.Close()
	at, errAt := netip.ParseAddrPort(conn.LocalAddr().String())
	from, errFrom := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err := errors.Join(errAt, errFrom); err != nil {
		return
	}
	resolver, steered := sp.Resolver(at)
	if !steered {
		return
	}
	st := &stream{space: sp, client: conn, from: source(from), resolver: resolver}
	defer context.AfterFunc(sp.ctx, func() { st.end() })()
	defer context.AfterFunc(sp.leaving, st.extend)()
	if err := st.serve(); err != nil {
		sp.failed.Add(1)
		sp.log.Debug("a name query by TCP failed", "name server", resolver, "error", fmt.Errorf("serve it: %w", err))
	}
}

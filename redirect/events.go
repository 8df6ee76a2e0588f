package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

// Origin is where a redirected connection was going and whose it is.
type Origin struct {
	Workload    uint32
	Namespace   uint64 // cookie
	Destination netip.AddrPort
	Cookie      uint64 // of the client's socket
	PID         uint32
	Comm        string
}

// ErrNoOrigin says that no hook of ours redirected the connection.
var ErrNoOrigin = errors.New("connection has no origin: nothing of ours redirected it")

// Origin reads where conn, accepted from an Outbound listener, was going. accept(2) has waited for the kernel to store it.
func (r *Redirect) Origin(conn *net.TCPConn) (Origin, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Origin{}, err
	}
	var o outboundOrigin
	var errLookup error
	if err := raw.Control(func(fd uintptr) { errLookup = r.obj.SkAccepted.Lookup(int32(fd), &o) }); err != nil {
		return Origin{}, err
	}
	if errors.Is(errLookup, ebpf.ErrKeyNotExist) {
		return Origin{}, ErrNoOrigin
	}
	if errLookup != nil {
		return Origin{}, fmt.Errorf("read origin of %s: %w", conn.RemoteAddr(), errLookup)
	}
	return Origin{
		Workload: o.Workload, Namespace: o.Netns, Destination: fromEndpoint(o.Dst, o.Dport),
		Cookie: o.Cookie, PID: o.Pid, Comm: comm(o.Comm),
	}, nil
}

// Verdict is why a program refused a connection or let plaintext in.
type Verdict uint16

// The verdicts, as bpf/maps.h has them.
const (
	UnknownService  = Verdict(outboundReasonREASON_UNKNOWN_SERVICE)
	BoundDevice     = Verdict(outboundReasonREASON_BOUND_DEVICE)
	Stale           = Verdict(outboundReasonREASON_STALE)
	NotReady        = Verdict(outboundReasonREASON_NOT_READY)
	UnknownWorkload = Verdict(outboundReasonREASON_UNKNOWN_WORKLOAD)
	Capacity        = Verdict(outboundReasonREASON_CAPACITY)
	Storage         = Verdict(outboundReasonREASON_STORAGE)
	Plaintext       = Verdict(outboundReasonREASON_PLAINTEXT)
	NoListener      = Verdict(outboundReasonREASON_NO_LISTENER)
	OutsideMesh     = Verdict(outboundReasonREASON_OUTSIDE_MESH)
	ConsulAccess    = Verdict(outboundReasonREASON_CONSUL_ACCESS)
)

// Event is one verdict.
type Event struct {
	Verdict     Verdict
	Inbound     bool
	Allowed     bool
	Observed    bool // nothing was done: Verdict is why it would have been refused, or 0 where it would have been redirected
	Workload    uint32
	Source      netip.AddrPort
	Destination netip.AddrPort
	PID         uint32
	Comm        string
}

// GrantStage says what became of a connection on a grant.
type GrantStage uint16

// The stages. A connection that was opened is closed once; one that failed was never open.
const (
	GrantOpened = GrantStage(outboundGrantStageGRANT_OPENED)
	GrantClosed = GrantStage(outboundGrantStageGRANT_CLOSED)
	GrantFailed = GrantStage(outboundGrantStageGRANT_FAILED)

	// GrantImpostor is a connection that reached a listener of another workload. It can neither send nor
	// receive, and has to be destroyed; then it fails.
	GrantImpostor = GrantStage(outboundGrantStageGRANT_IMPOSTOR)
)

// GrantEvent is a change of a connection on a grant.
type GrantEvent struct {
	Granted
	Stage          GrantStage
	Sent, Received uint64 // bytes of the application, seen from the client
	RTT            time.Duration
	// Of one that failed. Neither: its SYN did not arrive as it left.
	Admitted bool // the destination's guard let it pass, so the application did not accept it
	Refused  bool // the grant had ended when it arrived
	// Impostor: it was not proved that one of the grant's workloads listens. One that opens so has to be looked at: it may
	// be a stranger, or a listener that answers with SYN cookies.
	Impostor bool
}

// flushEvery is how late news of grants may be: the kernel does not wake us for them.
const flushEvery = 100 * time.Millisecond

// Events calls verdict with each verdict and grant with each change of a connection on a grant, in their order, until
// Close. What they are too slow for is lost and counted by the kernel.
func (r *Redirect) Events(verdict func(Event), grant func(GrantEvent)) error {
	var rec ringbuf.Record
	var clocks clock
	var read time.Time // when clocks were
	for {
		now := time.Now()
		r.reading.Lock()
		r.events.SetDeadline(now.Add(flushEvery))
		err := r.events.ReadInto(&rec)
		r.reading.Unlock()
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return fmt.Errorf("read kernel events: %w", err)
		}
		if now.Sub(read) > flushEvery { // not for each event: that is three system calls
			if clocks, err = readClock(); err != nil {
				return err
			}
			read = now
		}
		if err := decode(rec.RawSample, clocks, verdict, grant); err != nil {
			return fmt.Errorf("decode kernel event: %w", err)
		}
	}
}

// decode tells the two kinds of a record by their size.
func decode(raw []byte, c clock, verdict func(Event), grant func(GrantEvent)) error {
	if uintptr(len(raw)) == unsafe.Sizeof(outboundGrantEvent{}) {
		e := (*outboundGrantEvent)(unsafe.Pointer(unsafe.SliceData(raw))) // they are many: no reflection
		grant(c.grantEvent(e))
		return nil
	}
	var e outboundEvent
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &e); err != nil {
		return err
	}
	verdict(Event{
		Verdict: Verdict(e.Reason), Workload: e.Workload, PID: e.Pid, Comm: comm(e.Comm),
		Inbound:  e.Flags&uint16(outboundEventFlagEVENT_INBOUND) != 0,
		Allowed:  e.Flags&uint16(outboundEventFlagEVENT_ALLOWED) != 0,
		Observed: e.Flags&uint16(outboundEventFlagEVENT_OBSERVED) != 0,
		Source:   fromEndpoint(e.Src, e.Sport), Destination: fromEndpoint(e.Dst, e.Dport),
	})
	return nil
}

func (c clock) grantEvent(e *outboundGrantEvent) GrantEvent {
	return GrantEvent{
		Granted: Granted{
			Cookie: e.Cookie, Workload: e.Workload, From: e.From, To: e.To, PID: e.Pid, Comm: comm(e.Comm),
			Client: fromEndpoint(e.Src, e.Sport), Dialled: fromEndpoint(e.Dialled, e.DialledPort),
			Destination: fromEndpoint(e.Dst, e.Dport), Opened: c.wall(e.Opened), Muzzled: e.Device == noDevice, device: e.Device,
		},
		Stage: GrantStage(e.Stage), Sent: e.Sent, Received: e.Received, RTT: time.Duration(e.RttUs) * time.Microsecond,
		Admitted: e.Seen == uint16(outboundDirectSeenSEEN_ADMITTED), Refused: e.Seen == uint16(outboundDirectSeenSEEN_REFUSED),
		Impostor: e.Seen == uint16(outboundDirectSeenSEEN_IMPOSTOR),
	}
}

// Stop ends Events.
func (r *Redirect) Stop() error { return r.events.Close() }

// Counters are the programs' own counts since the maps were made.
func (r *Redirect) Counters() (map[string]uint64, error) {
	names := map[outboundStat]string{
		outboundStatSTAT_REDIRECTED: "redirected", outboundStatSTAT_REFUSED: "refused",
		outboundStatSTAT_STEERED: "steered", outboundStatSTAT_DELIVERED: "delivered",
		outboundStatSTAT_PLAINTEXT_REFUSED: "plaintext_refused", outboundStatSTAT_PLAINTEXT_ALLOWED: "plaintext_allowed",
		outboundStatSTAT_FAILED_OPEN: "failed_open", outboundStatSTAT_UNPROTECTED_UDP: "unprotected_udp",
		outboundStatSTAT_EVENTS_LOST: "events_lost", outboundStatSTAT_PROBED: "probed",
		outboundStatSTAT_GRANTED: "granted", outboundStatSTAT_GRANT_FAILED: "grant_failed",
	}
	counts := make(map[string]uint64, len(names))
	for stat, name := range names {
		var perCPU []uint64
		if err := r.obj.Stats.Lookup(uint32(stat), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			counts[name] += n
		}
	}
	return r.addCounters(counts)
}

// Fill is how full a map is.
type Fill struct {
	Name         string
	Entries, Max int
}

// Fills counts the entries of the maps that connections and enrolments fill.
func (r *Redirect) Fills() ([]Fill, error) {
	r.mu.Lock()
	fills := []Fill{
		{"destinations", len(r.dests) + len(r.single), int(r.obj.Destinations.MaxEntries())},
		{"rules", len(r.rules), int(r.obj.Rules.MaxEntries())},
		{"virtual_ranges", len(r.ranges), int(r.obj.VirtualRanges.MaxEntries())},
		{"probes", len(r.probes), int(r.obj.Probes.MaxEntries())},
		{"mapped_probes", len(r.mappedProbes), int(r.obj.MappedProbes.MaxEntries())},
		{"plaintext_from", len(r.plaintext), int(r.obj.PlaintextFrom.MaxEntries())},
		{"exclusions", len(r.exclusions), int(r.obj.Exclusions.MaxEntries())},
		{"grants", len(r.grants), int(r.obj.Grants.MaxEntries())},
	}
	r.mu.Unlock()
	counted := []countedMap{
		{"workloads", r.obj.Workloads, new(uint32)},
		{"ns_ready", r.obj.NsReady, new(uint64)},
		{"pending", r.obj.Pending, new(outboundTuple)},
		{"direct", r.obj.Direct, new(outboundTuple)},
		{"granted", r.obj.Granted, new(uint64)},
	}
	if r.dns != nil {
		counted = append(counted, countedMap{"dns_spaces", r.dns.Spaces, new(uint64)}, countedMap{"dns_resolvers", r.dns.Resolvers, new(dnsDnsSlotKey)})
	}
	for _, m := range counted {
		n, err := entries(m.m, m.key)
		if err != nil {
			return nil, fmt.Errorf("count entries of %s: %w", m.name, err)
		}
		fills = append(fills, Fill{Name: m.name, Entries: n, Max: int(m.m.MaxEntries())})
	}
	return fills, nil
}

type countedMap struct {
	name string
	m    *ebpf.Map
	key  any
}

// entries counts keys. A map that changes meanwhile is counted as it comes.
func entries(m *ebpf.Map, key any) (int, error) {
	n := 0
	err := m.NextKey(nil, key)
	for ; err == nil && n < int(m.MaxEntries()); n++ {
		err = m.NextKey(key, key)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, err
	}
	return n, nil
}

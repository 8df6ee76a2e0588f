// Package tunnel is what the tunnels between two nodeproxies agree on: the framing inside their TLS connections, the state
// that both ends keep, the memory of openings, and the pool of tunnels that are kept ready.
//
// It does no I/O of its own: its caller reads and writes, and closes a tunnel on the first error. docs/tunnel.md has the
// protocol byte by byte.
package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// ALPN is the protocol's name in the TLS handshake. It is offered alone, and answered only when it was offered alone.
const ALPN = "nodeproxy/1"

// Sizes in bytes.
const (
	HeaderSize  = 8
	OpeningSize = 34           // what the body of OPEN begins with; the application's first bytes follow
	MaxBody     = 64<<10 - 512 // with its header, four TLS records
	MaxReason   = 64
	PingSize    = 8
)

// Type is what a frame says.
type Type uint8

// The types of frames.
const (
	Open      Type = iota + 1 // client: begins a stream
	Accepted                  // server: the application is connected
	Refused                   // server: it is not, for the reason in the body, and nothing was passed on
	Duplicate                 // server: an opening with this id was seen before
	Data                      // either: bytes of the application
	End                       // either: the sender's application sends no more
	Reset                     // either: the stream is given up; the tunnel closes
	Ping                      // client, between streams
	Pong                      // server: the body of the Ping
	Ending                    // server, between streams: the instance is about to end; the tunnel closes
)

func (t Type) String() string {
	names := [...]string{"OPEN", "ACCEPTED", "REFUSED", "DUPLICATE", "DATA", "END", "RESET", "PING", "PONG", "ENDING"}
	if t < Open || int(t) > len(names) {
		return fmt.Sprintf("type %d", uint8(t))
	}
	return names[t-1]
}

// ErrMalformed is wrapped by the errors of all that no correct peer sends. The tunnel must be closed.
var ErrMalformed = errors.New("the peer broke the tunnel protocol")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// Header begins every frame.
type Header struct {
	Type   Type
	Length int    // of the body
	Stream uint32 // 1 for the first stream of a tunnel, one more for each following
}

// Put writes h into the first HeaderSize bytes of b.
func (h Header) Put(b []byte) {
	b[0], b[1] = byte(h.Type), 0
	binary.BigEndian.PutUint16(b[2:], uint16(h.Length))
	binary.BigEndian.PutUint32(b[4:], h.Stream)
}

// ParseHeader reads a header from the first HeaderSize bytes of b. The error wraps ErrMalformed.
func ParseHeader(b []byte) (Header, error) {
	h := Header{Type: Type(b[0]), Length: int(binary.BigEndian.Uint16(b[2:])), Stream: binary.BigEndian.Uint32(b[4:])}
	if b[1] != 0 {
		return h, malformed("the second byte of a header is %d", b[1])
	}
	least, most := 0, 0
	switch h.Type {
	case Open:
		least, most = OpeningSize, MaxBody
	case Refused:
		least, most = 1, MaxReason
	case Data:
		least, most = 1, MaxBody
	case Ping, Pong:
		least, most = PingSize, PingSize
	case Accepted, Duplicate, End, Reset, Ending:
	default:
		return h, malformed("a frame is of %s", h.Type)
	}
	if h.Length < least || h.Length > most {
		return h, malformed("the body of %s has %d bytes", h.Type, h.Length)
	}
	return h, nil
}

// ID names an opening. It is random: a client uses it again only to open the same stream at the same instance.
type ID [16]byte

// Opening is what the body of OPEN begins with. It names neither identity nor destination: they are those of the TLS
// connection.
type Opening struct {
	ID     ID
	Source netip.AddrPort // the application's own address; it is a claim
}

// Put writes o into the first OpeningSize bytes of b.
func (o Opening) Put(b []byte) {
	copy(b, o.ID[:])
	ip := o.Source.Addr().As16()
	copy(b[16:], ip[:])
	binary.BigEndian.PutUint16(b[32:], o.Source.Port())
}

// ParseOpening reads an Opening from the first OpeningSize bytes of b. IPv4 is never v4-mapped in what it returns.
func ParseOpening(b []byte) (o Opening) {
	copy(o.ID[:], b)
	ip := netip.AddrFrom16([16]byte(b[16:32]))
	o.Source = netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(b[32:]))
	return o
}

// ParseReason reads the body of REFUSED: lower-case letters and hyphens.
func ParseReason(b []byte) (string, error) {
	for _, c := range b {
		if c != '-' && (c < 'a' || c > 'z') {
			return "", malformed("the reason %q is no reason", b)
		}
	}
	return string(b), nil
}

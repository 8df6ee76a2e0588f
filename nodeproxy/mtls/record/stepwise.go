package record

import (
	"encoding/binary"
	"net"
)

// Stepwise returns conn with a Read that returns bytes of one record at most, so that crypto/tls over it reads its handshake and
// not a byte more: what follows stays with conn.
func Stepwise(conn net.Conn) net.Conn { return &stepwise{Conn: conn} }

type stepwise struct {
	net.Conn
	header [HeaderSize]byte
	have   int // of header
	left   int // of the body, when header is whole
}

func (s *stepwise) Read(p []byte) (int, error) {
	if s.have == HeaderSize && s.left == 0 {
		s.have = 0
	}
	if s.have < HeaderSize {
		n, err := s.Conn.Read(p[:min(len(p), HeaderSize-s.have)])
		copy(s.header[s.have:], p[:n])
		if s.have += n; s.have == HeaderSize {
			s.left = int(binary.BigEndian.Uint16(s.header[3:]))
		}
		return n, err
	}
	n, err := s.Conn.Read(p[:min(len(p), s.left)])
	s.left -= n
	return n, err
}

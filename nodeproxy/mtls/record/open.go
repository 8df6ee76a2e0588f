package record

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
)

// Open opens the first record of p where it is. It takes n bytes, 0 while it is not whole; size bytes of application data are
// at p[HeaderSize:] then, none if the record was for Layer alone. What is behind the record is not touched.
//
// io.EOF is the peer's close_notify; a *net.OpError with Op "remote error" its fatal alert, as of crypto/tls; a *Violation what
// no correct peer sends. An error comes again with each further call.
func (l *Layer) Open(p []byte) (n, size int, err error) {
	if l.ended != nil || len(p) < HeaderSize {
		return 0, 0, l.ended
	}
	if n, size, err = l.open(p); err != nil {
		l.ended = err
		return 0, 0, err
	}
	return n, size, nil
}

func (l *Layer) open(p []byte) (n, size int, err error) {
	length := int(binary.BigEndian.Uint16(p[3:]))
	switch {
	case p[0] != typeApplication:
		return 0, 0, violation(alertUnexpectedMessage, "its type is %d, in the clear", p[0])
	case length > maxCiphertext:
		return 0, 0, violation(alertRecordOverflow, "it has %d bytes", length)
	case len(p) < HeaderSize+length:
		return 0, 0, nil
	}
	body := p[HeaderSize : HeaderSize+length]
	inner, err := l.in.aead.Open(body[:0], l.in.next(), body, p[:HeaderSize])
	if err != nil {
		return 0, 0, violation(alertBadRecordMAC, "it is not the peer's")
	}
	if len(inner) > MaxData+1 {
		return 0, 0, violation(alertRecordOverflow, "it has %d bytes of content", len(inner))
	}
	inner = bytes.TrimRight(inner, "\x00") // padding
	if len(inner) == 0 {
		return 0, 0, violation(alertUnexpectedMessage, "it has no content type")
	}
	content := inner[len(inner)-1]
	inner = inner[:len(inner)-1]
	if content == typeApplication && len(inner) > 0 && !l.message.begun() {
		l.idle = 0
		return HeaderSize + length, len(inner), nil
	}
	if l.idle++; l.idle > maxIdle {
		return 0, 0, violation(alertUnexpectedMessage, "it is the %dth in a row without data", l.idle)
	}
	return HeaderSize + length, 0, l.control(content, inner)
}

// control takes a record that has no application data.
func (l *Layer) control(content byte, p []byte) error {
	switch {
	case content != typeHandshake && l.message.begun():
		return violation(alertUnexpectedMessage, "type %d came within a handshake message", content)
	case content == typeApplication:
		return nil
	case content == typeAlert:
		return l.alert(p)
	case content == typeHandshake && len(p) > 0:
		return l.handshake(p)
	}
	return violation(alertUnexpectedMessage, "it has %d bytes of type %d", len(p), content)
}

func (l *Layer) alert(p []byte) error {
	if len(p) != 2 {
		return violation(alertDecodeError, "an alert has %d bytes", len(p))
	}
	switch alert := tls.AlertError(p[1]); alert { // its level means nothing (RFC 8446, section 6)
	case CloseNotify:
		return io.EOF
	case alertUserCanceled:
		return nil // a close_notify follows
	default:
		return remoteAlert(alert)
	}
}

// The handshake messages that may come after the handshake (RFC 8446, section 4.6).
const (
	typeNewSessionTicket = 4
	typeKeyUpdate        = 24

	updateNotRequested = 0
	updateRequested    = 1

	messageHeader = 4
	maxTicket     = 64 << 10
)

// message is the handshake message that is being received, over one record or several.
type message struct {
	header [messageHeader]byte
	have   int // of header
	left   int // of the body, when header is whole
}

func (m *message) begun() bool { return m.have > 0 }

func (m *message) length() int {
	return int(m.header[1])<<16 | int(m.header[2])<<8 | int(m.header[3])
}

// handshake takes the content of a record, which may have several messages and parts of them.
func (l *Layer) handshake(p []byte) error {
	m := &l.message
	for len(p) > 0 {
		if m.have < messageHeader {
			n := copy(m.header[m.have:], p)
			m.have += n
			p = p[n:]
			if m.have < messageHeader {
				return nil
			}
			if err := l.begin(); err != nil {
				return err
			}
		}
		body := p[:min(m.left, len(p))]
		p = p[len(body):]
		if m.left -= len(body); m.left > 0 {
			return nil
		}
		m.have = 0
		if m.header[0] == typeKeyUpdate {
			if len(p) > 0 {
				return violation(alertUnexpectedMessage, "something follows a KeyUpdate under the old key")
			}
			return l.keyUpdate(body[0])
		}
	}
	return nil
}

// begin checks the header of a message.
func (l *Layer) begin() error {
	m := &l.message
	m.left = m.length()
	switch kind := m.header[0]; {
	case kind == typeKeyUpdate && m.left != 1, kind == typeNewSessionTicket && l.client && (m.left == 0 || m.left > maxTicket):
		return violation(alertDecodeError, "handshake message %d has %d bytes", kind, m.left)
	case kind == typeKeyUpdate, kind == typeNewSessionTicket && l.client:
		return nil
	default:
		return violation(alertUnexpectedMessage, "handshake message %d came after the handshake", kind)
	}
}

// keyUpdate takes the peer's next keys. Whoever answers before he has to would write while he reads: the answer goes before the
// next application data, one for all that asked until then (RFC 8446, section 4.6.3).
func (l *Layer) keyUpdate(request byte) error {
	if request != updateNotRequested && request != updateRequested {
		return violation(alertIllegalParameter, "a KeyUpdate asks for %d", request)
	}
	if err := l.in.update(); err != nil {
		return err
	}
	if request == updateRequested && !l.owed.Swap(true) {
		l.idle = 0 // it waited for the answer to the last one
	}
	return nil
}

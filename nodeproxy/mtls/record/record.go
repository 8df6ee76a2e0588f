// Package record protects what follows a TLS 1.3 handshake: it seals application data into records, opens records where they
// were received, and keeps both directions' keys up to date (RFC 8446, sections 4.6 and 5 to 7).
//
// It does no I/O, and no handshake: crypto/tls does that, and gives its secrets away (Secrets). Of post-handshake messages it
// knows those that need no certificate: tickets are passed over, keys are updated, all else is a violation.
package record

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync/atomic"
)

// Sizes in bytes.
const (
	HeaderSize = 5
	MaxData    = 16 << 10 // application data in one record

	tagSize       = 16
	overhead      = HeaderSize + 1 + tagSize // by how much a record is larger than its data
	maxCiphertext = MaxData + 256
	updateSize    = 5 // of a KeyUpdate message
	AlertSize     = overhead + 2
)

// SealedSize is how much room Seal needs for n bytes of application data.
func SealedSize(n int) int {
	return n + (n+MaxData-1)/MaxData*(overhead+overhead+updateSize)
}

// renewAfter is how many records are sealed with one key. RFC 8446, section 5.5, allows AES-GCM 2^24.5 of full size.
const renewAfter = 1 << 24

// maxIdle is how many records in a row may carry no application data.
const maxIdle = 32

// The types of contents (RFC 8446, section 5.1).
const (
	typeAlert       = 21
	typeHandshake   = 22
	typeApplication = 23
)

// The alerts that are sent or known here (RFC 8446, section 6).
const (
	CloseNotify            tls.AlertError = 0
	alertUnexpectedMessage tls.AlertError = 10
	alertBadRecordMAC      tls.AlertError = 20
	alertRecordOverflow    tls.AlertError = 22
	alertIllegalParameter  tls.AlertError = 47
	alertDecodeError       tls.AlertError = 50
	alertUserCanceled      tls.AlertError = 90
)

// Violation is what no correct peer sends. Alert is what it is to be told.
type Violation struct {
	Alert tls.AlertError
	what  string
}

func (v *Violation) Error() string { return fmt.Sprintf("read a TLS record: %s: %v", v.what, v.Alert) }

func violation(alert tls.AlertError, format string, args ...any) error {
	return &Violation{Alert: alert, what: fmt.Sprintf(format, args...)}
}

// remoteAlert is the error that crypto/tls has for a peer's fatal alert.
func remoteAlert(alert tls.AlertError) error { return &net.OpError{Op: "remote error", Err: alert} }

// Layer is both directions of a connection after its handshake. One goroutine may call Open while another calls Seal and
// SealAlert.
type Layer struct {
	client bool

	// Used by Open.
	in      direction
	message message
	idle    int   // records without application data since the last that had some
	ended   error // what Open returns from now on

	owed atomic.Bool // the peer has asked for a KeyUpdate, which goes before the next application data

	// Used by Seal and SealAlert.
	out direction
}

func newLayer(suite uint16, in, out []byte, client bool) (*Layer, error) {
	s, ok := suites[suite]
	if !ok {
		return nil, fmt.Errorf("protect records: %s is unknown", tls.CipherSuiteName(suite))
	}
	l := &Layer{client: client, in: direction{suite: s}, out: direction{suite: s}}
	if err := l.in.use(in); err != nil {
		return nil, err
	}
	if err := l.out.use(out); err != nil {
		return nil, err
	}
	return l, nil
}

package nodeproxy

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
)

// TestLookingForFirstBytesLosesNoEnd looks for the first bytes of an application that has gone already, more than once as
// when an opening is done again.
func TestLookingForFirstBytesLosesNoEnd(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(*net.TCPConn)
		want error
	}{
		"reset":      {func(conn *net.TCPConn) { abort(conn) }, syscall.ECONNRESET},
		"half-close": {func(conn *net.TCPConn) { conn.CloseWrite() }, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			application, conn := tcpPair(t)
			l, err := newPlainLeg(conn, newBuffers())
			if err != nil {
				t.Fatal(err)
			}
			tc.end(application)
			eventually(t, "its end has arrived", func() bool {
				if b := l.first(plainChunk); b.buf != nil {
					t.Fatalf("first returns %q", b.text())
				}
				return l.ended != nil
			})
			l.first(plainChunk)
			if _, err := l.next(); !errors.Is(err, tc.want) {
				t.Errorf("next returns %v, want %v", err, tc.want)
			}
		})
	}
}

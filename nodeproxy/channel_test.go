package nodeproxy

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls/record"
	"nodeproxy.io/nodeproxy/tunnel"
)

// sealed is what a leg would send for text, without sending it.
func sealed(t testing.TB, l *secureLeg, text string) []byte {
	t.Helper()
	out := make([]byte, record.SealedSize(len(text)))
	b := roomFor(text)
	n, err := l.records.Seal(out, b.buf.bytes[b.spans[0].from:b.spans[0].to])
	if err != nil {
		t.Fatal(err)
	}
	return out[:n]
}

// A peer that begins a record and does not go on must not have 72 KiB of memory for one byte.
func TestABeginningOfARecordHoldsNoMoreMemoryThanItHasBytes(t *testing.T) {
	client, server := securePair(t, newBuffers())
	whole := sealed(t, client, "hello")
	for _, begun := range []int{1, record.HeaderSize, len(whole) - 1} {
		if _, err := client.conn.Write(whole[:begun]); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(patience); len(server.kept) != begun; {
			if time.Now().After(end) {
				t.Fatalf("of %d bytes it keeps %d", begun, len(server.kept))
			}
			if err := server.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := server.next(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("of a record without its end there is %v", err)
			}
			if server.in != nil {
				t.Fatalf("it waits with a buffer for the rest of a record of which %d bytes have come", begun)
			}
			if cap(server.kept) > 2*len(whole) {
				t.Fatalf("for %d bytes it holds %d", begun, cap(server.kept))
			}
		}
		if err := server.conn.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.conn.Write(whole[begun:]); err != nil {
			t.Fatal(err)
		}
		if b, err := server.next(); err != nil || b.text() != "hello" {
			t.Fatalf("the record's end came, and there is %q, %v", b.text(), err)
		}
		server.release()
		whole = sealed(t, client, "hello")
	}
}

// An OPEN may come in any number of records.
func TestAFrameOverManyRecordsIsReadWhenItsLastHasCome(t *testing.T) {
	client, server := securePair(t, newBuffers())
	l := linkOver(server, true)
	frame := make([]byte, tunnel.HeaderSize+tunnel.OpeningSize)
	tunnel.Header{Type: tunnel.Open, Length: tunnel.OpeningSize, Stream: 1}.Put(frame)
	var begin []byte
	for _, b := range frame[:3] {
		begin = append(begin, sealed(t, client, string([]byte{b}))...)
	}
	if err := l.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for _, part := range [][]byte{begin, sealed(t, client, string(frame[3:]))} {
		if _, err := client.conn.Write(part); err != nil {
			t.Fatal(err)
		}
		if err := l.more(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.awaitOpening(time.Now().Add(patience), patience); err != nil {
		t.Error(err)
	}
}

// Part of a record may have left when a write fails: what came behind it would be garbage to the peer.
func TestNothingIsWrittenAfterAWriteThatFailed(t *testing.T) {
	l, _ := stuckLink(t)
	if err := l.conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	var err error
	for err == nil { // what the peer's system has taken meanwhile makes room
		err = l.control(tunnel.Ping, make([]byte, tunnel.PingSize))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a write to a peer that reads nothing ended with %v", err)
	}
	if err := l.conn.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if l.ready() {
		t.Error("the tunnel is ready for another stream")
	}
	within(t, l, "a write", func() {
		if err := l.control(tunnel.Ping, make([]byte, tunnel.PingSize)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("another write ended with %v", err)
		}
	})
}

func TestNoAlertFollowsACloseNotify(t *testing.T) {
	client, server := securePair(t, newBuffers())
	if err := client.closeWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.conn.Write(make([]byte, record.HeaderSize)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.next(); err == nil {
		t.Fatal("what is no record is read")
	}
	client.close()
	got, err := io.ReadAll(server.conn)
	if err != nil || len(got) != record.AlertSize {
		t.Errorf("%d bytes were sent, %v, and a close_notify has %d", len(got), err, record.AlertSize)
	}
}

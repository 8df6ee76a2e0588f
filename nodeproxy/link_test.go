package nodeproxy

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/nodeproxy/mtls/record"
	"nodeproxy.io/nodeproxy/tunnel"
)

// stuckLink is a tunnel between streams to a peer that reads nothing: not a byte more can be written to it.
func stuckLink(t testing.TB) (l *link, peer *secureLeg) {
	t.Helper()
	client, server := securePair(t, newBuffers())
	for _, size := range []int{chunk, 16} { // there is room for less when there is none for more
		for piece, err := make([]byte, size), error(nil); !errors.Is(err, os.ErrDeadlineExceeded); {
			if err = client.conn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err = client.conn.Write(piece); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
	}
	if err := client.conn.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	return linkOver(client, false), server
}

// within fails the test unless what is done in time. l is reset then, so that it ends.
func within(t testing.TB, l *link, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Errorf("%s waits for a peer that reads nothing", what)
		l.reset()
		<-done
	}
}

func TestRetiringATunnelDoesNotWaitForItsPeer(t *testing.T) {
	l, _ := stuckLink(t)
	pool := tunnel.NewPool[int, *link](1)
	pool.Take(t.Context(), 1, nil)
	pool.Put(1, l)
	within(t, l, "Retire", func() { pool.Retire(func(int) bool { return false }) })
	if _, err := l.conn.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
}

func TestLookingAtATunnelDoesNotWaitForItsPeer(t *testing.T) {
	l, peer := stuckLink(t)
	// What is no record is answered by an alert.
	if _, err := peer.conn.Write(make([]byte, chunk)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has arrived", func() bool { return !l.socket.quiet() })
	if err := l.fill(); err != nil {
		t.Fatal(err)
	}
	within(t, l, "Alive", func() {
		if l.Alive() {
			t.Error("it is alive")
		}
	})
}

// A tunnel that was just made has nothing in hand, and looking at it leaves it fit for a stream.
func TestLookingAtATunnelLeavesItFitForUse(t *testing.T) {
	client, server := securePair(t, newBuffers())
	l := linkOver(client, false)
	if err := l.unseal(); err != nil || l.in != nil || !l.socket.quiet() {
		t.Fatalf("it is not alive: %v", err)
	}
	if err := l.write(roomFor("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := server.next(); err != nil {
		t.Error(err)
	}
}

// A KeyUpdate that asks for an answer gets none between streams, when a peer that reads nothing would be waited for: it comes
// before the next frame.
func TestAnAnswerThatIsOwedComesWithTheNextFrame(t *testing.T) {
	a, b := tcpPair(t)
	w, err := newWire(a, newBuffers())
	if err != nil {
		t.Fatal(err)
	}
	var keys bytes.Buffer
	var secrets record.Secrets
	leaf := mtlstest.NewRoot(t).Leaf(t, spiffe("api"))
	server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{*leaf}, SessionTicketsDisabled: true})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	client := tls.Client(record.Stepwise(w), &tls.Config{InsecureSkipVerify: true, KeyLogWriter: io.MultiWriter(&keys, &secrets)})
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	if suite := client.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Fatalf("the test seals for another suite than %s", tls.CipherSuiteName(suite))
	}
	records, err := secrets.Layer(client.ConnectionState(), true)
	if err != nil {
		t.Fatal(err)
	}
	l := newLink(w, &mtls.Secured{Records: records}, false)
	if _, err := b.Write(sealFirst(t, keys.String(), []byte{24, 0, 0, 1, 1, 22})); err != nil { // KeyUpdate, update_requested; a handshake record
		t.Fatal(err)
	}
	if err := l.fill(); err != nil {
		t.Fatal(err)
	}
	if err := l.unseal(); err != nil || l.in != nil {
		t.Fatalf("%v; a buffer is held: %v", err, l.in != nil)
	}
	b.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) // nothing is to come
	if n, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes came between streams: %v", n, err)
	}
	b.SetReadDeadline(time.Now().Add(patience))
	if err := l.control(tunnel.Ping, make([]byte, tunnel.PingSize)); err != nil {
		t.Fatal(err)
	}
	ping := make([]byte, tunnel.HeaderSize+tunnel.PingSize)
	if _, err := io.ReadFull(server, ping); err != nil || tunnel.Type(ping[0]) != tunnel.Ping {
		t.Errorf("%x, %v", ping, err)
	}
}

// sealFirst makes the first record that a TLS server sends after its handshake, as RFC 8446 says.
func sealFirst(t testing.TB, keyLog string, inner []byte) []byte {
	t.Helper()
	_, line, _ := strings.Cut(keyLog, "SERVER_TRAFFIC_SECRET_0 ")
	secret, err := hex.DecodeString(strings.Fields(line)[1])
	if err != nil {
		t.Fatal(err)
	}
	expand := func(label string, n int) []byte {
		label = "tls13 " + label
		p, err := hkdf.Expand(sha256.New, secret, string([]byte{0, byte(n), byte(len(label))})+label+"\x00", n)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	block, err := aes.NewCipher(expand("key", 16))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	header := []byte{23, 3, 3, 0, byte(len(inner) + aead.Overhead())}
	return append(header, aead.Seal(nil, expand("iv", 12), inner, header)...)
}

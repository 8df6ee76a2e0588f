package record

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/tests/netlab"
)

const patience = 30 * time.Second

// end is one end of a connection after a handshake that crypto/tls did, for Layer to go on with.
type end struct {
	*Layer
	conn     net.Conn
	received []byte // and not opened
	opened   []byte // and not read
}

// shake does a handshake with config on conn, and drops crypto/tls.
func shake(conn net.Conn, config *tls.Config, client bool) (*end, error) {
	secrets := new(Secrets)
	config = config.Clone()
	config.KeyLogWriter = secrets
	secure := tls.Server(Stepwise(conn), config)
	if client {
		secure = tls.Client(Stepwise(conn), config)
	}
	if err := secure.Handshake(); err != nil {
		return nil, err
	}
	layer, err := secrets.Layer(secure.ConnectionState(), client)
	return &end{Layer: layer, conn: conn}, err
}

func (e *end) Write(p []byte) (int, error) {
	out := make([]byte, SealedSize(len(p)))
	n, err := e.Seal(out, append(bytes.Clone(p), 0)[:len(p)])
	if err != nil {
		return 0, err
	}
	_, err = e.conn.Write(out[:n])
	return len(p), err
}

func (e *end) Read(p []byte) (int, error) {
	for len(e.opened) == 0 {
		n, size, err := e.Open(e.received)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			e.opened, e.received = e.received[HeaderSize:HeaderSize+size], e.received[n:]
			continue
		}
		more := make([]byte, 1+mathrand.IntN(40<<10))
		if n, err = e.conn.Read(more); err != nil {
			return 0, err
		}
		e.received = append(e.received, more[:n]...)
	}
	n := copy(p, e.opened)
	e.opened = e.opened[n:]
	return n, nil
}

func (e *end) sendMessage(t testing.TB, message ...byte) {
	t.Helper()
	out := make([]byte, overhead+len(message))
	n := e.out.seal(out, append(message, 0)[:len(message)], typeHandshake)
	if _, err := e.conn.Write(out[:n]); err != nil {
		t.Fatal(err)
	}
}

func (e *end) closeWrite() {
	out := make([]byte, AlertSize)
	e.conn.Write(out[:e.SealAlert(out, CloseNotify)])
}

// tcp is both ends of a connection.
func tcp(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{client, server} {
		conn.SetDeadline(time.Now().Add(patience))
		t.Cleanup(func() { conn.Close() })
	}
	return client, server
}

func configs(t testing.TB) (client, server *tls.Config) {
	leaf := mtlstest.NewRoot(t).Leaf(t, "spiffe://td.consul/ns/default/dc/dc1/svc/api")
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*leaf}},
		&tls.Config{Certificates: []tls.Certificate{*leaf}, ClientAuth: tls.RequireAnyClientCert}
}

// withPeer is our end, and crypto/tls at the other. The peer has tickets to send if it is the server.
func withPeer(t testing.TB, client bool) (*end, *tls.Conn) {
	t.Helper()
	here, there := tcp(t)
	clientConfig, serverConfig := configs(t)
	config, peer := clientConfig, tls.Server(there, serverConfig)
	if !client {
		serverConfig.SessionTicketsDisabled = true
		config, peer = serverConfig, tls.Client(there, clientConfig)
	}
	shaken := make(chan error, 1)
	go func() { shaken <- peer.Handshake() }()
	e, err := shake(here, config, client)
	if err = errors.Join(err, <-shaken); err != nil {
		t.Fatal(err)
	}
	return e, peer
}

func onBothSides(t *testing.T, test func(*testing.T, *end, *tls.Conn)) {
	for name, client := range map[string]bool{"client": true, "server": false} {
		t.Run(name, func(t *testing.T) {
			e, peer := withPeer(t, client)
			test(t, e, peer)
		})
	}
}

func TestCryptoTLSReadsWhatIsSealedAndIsRead(t *testing.T) {
	onBothSides(t, func(t *testing.T, e *end, peer *tls.Conn) {
		const total = 3 << 20
		sent := [2][]byte{make([]byte, total), make([]byte, total)}
		rand.Read(sent[0])
		rand.Read(sent[1])
		done := make(chan error, 2)
		for i, to := range []io.Writer{e, peer} {
			go func() {
				p := sent[i]
				for len(p) > 0 {
					n := min(len(p), 1+mathrand.IntN(100<<10))
					if _, err := to.Write(p[:n]); err != nil {
						done <- err
						return
					}
					p = p[n:]
				}
				if i == 0 {
					e.closeWrite()
				} else {
					peer.CloseWrite()
				}
				done <- nil
			}()
		}
		got := make(chan []byte, 1)
		go func() {
			p, err := io.ReadAll(peer)
			if err != nil {
				t.Error(err)
			}
			got <- p
		}()
		p, err := io.ReadAll(e)
		if err != nil || !bytes.Equal(p, sent[1]) {
			t.Errorf("%d bytes of the peer's are not what it sent: %v", len(p), err)
		}
		if p := <-got; !bytes.Equal(p, sent[0]) {
			t.Errorf("the peer read %d bytes that are not what was sent", len(p))
		}
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
	})
}

// The peer's first data, its tickets and its Finished may come in one segment: nothing is lost to crypto/tls.
func TestNothingBeyondTheHandshakeIsRead(t *testing.T) {
	here, there := tcp(t)
	clientConfig, serverConfig := configs(t)
	serverConfig.SessionTicketsDisabled = true
	go func() {
		corked := &corked{Conn: there}
		peer := tls.Client(corked, clientConfig)
		if err := peer.Handshake(); err != nil {
			t.Error(err)
		}
		peer.Write([]byte("early "))
		peer.Write([]byte("data"))
		peer.CloseWrite()
		there.SetWriteDeadline(time.Time{}) // crypto/tls has set one
		there.Write(corked.kept)
	}()
	e, err := shake(here, serverConfig, false)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := io.ReadAll(e); err != nil || string(p) != "early data" {
		t.Errorf("%q, %v", p, err)
	}
}

// corked keeps all that is written but the first.
type corked struct {
	net.Conn
	first bool
	kept  []byte
}

func (c *corked) Write(p []byte) (int, error) {
	if !c.first {
		c.first = true
		return c.Conn.Write(p)
	}
	c.kept = append(c.kept, p...)
	return len(p), nil
}

// In the middle of data either side takes new keys; crypto/tls answers as it is asked to.
func TestCryptoTLSFollowsAKeyUpdate(t *testing.T) {
	onBothSides(t, func(t *testing.T, e *end, peer *tls.Conn) {
		go io.Copy(struct{ io.Writer }{peer}, struct{ io.Reader }{peer})
		for i := range 40 {
			text := fmt.Sprintf("the %dth", i)
			switch i % 4 {
			case 1: // ours
				e.owed.Store(true)
			case 2: // both
				e.sendMessage(t, 24, 0, 0, 1, updateRequested)
				if err := e.out.update(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := e.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, len(text))
			if _, err := io.ReadFull(e, p); err != nil || string(p) != text {
				t.Fatalf("%q, %v; want %q", p, err, text)
			}
		}
	})
}

func TestARefusedCertificateIsARemoteError(t *testing.T) {
	here, there := tcp(t)
	clientConfig, serverConfig := configs(t)
	serverConfig.VerifyConnection = func(tls.ConnectionState) error { return errors.New("no") }
	go tls.Server(there, serverConfig).Handshake()
	e, err := shake(here, clientConfig, true)
	if err != nil {
		t.Fatal(err)
	}
	_, err = e.Read(make([]byte, 1))
	if remote, ok := errors.AsType[*net.OpError](err); !ok || remote.Op != "remote error" || !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("got %v", err)
	}
}

func TestEverySuite(t *testing.T) {
	for suite := range suites {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) {
			e := withOpenSSL(t, suite)
			io.WriteString(e, "GET / HTTP/1.0\r\n\r\n")
			p, err := io.ReadAll(e)
			if err != nil || !bytes.Contains(p, []byte(tls.CipherSuiteName(suite))) {
				t.Errorf("%q, %v", p, err)
			}
		})
	}
}

// openssl runs the tool, which Debian has, and returns its standard input and what it says.
func openssl(t testing.TB, args ...string) (io.Writer, *bufio.Scanner) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		netlab.Lacks(t, "openssl")
	}
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return in, bufio.NewScanner(out)
}

// withOpenSSL is our end as the client of a web server that sends as many tickets as it may, and takes one suite.
func withOpenSSL(t testing.TB, suite uint16) *end {
	t.Helper()
	root := mtlstest.NewRoot(t)
	dir := t.TempDir()
	root.Write(t, dir)
	_, says := openssl(t, "s_server", "-accept", "127.0.0.1:0", "-cert", filepath.Join(dir, "root.pem"), "-key", filepath.Join(dir, "key.pem"),
		"-tls1_3", "-www", "-num_tickets", "20", "-ciphersuites", tls.CipherSuiteName(suite))
	at, found := "", false
	for !found && says.Scan() {
		at, found = strings.CutPrefix(says.Text(), "ACCEPT ")
	}
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { conn.Close() })
	e, err := shake(conn, &tls.Config{InsecureSkipVerify: true}, true)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// OpenSSL's client asks for new keys of ours, or takes new ones itself, when it is told K or k.
func TestOpenSSLUpdatesKeysBothWays(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, config := configs(t)
	config.ClientAuth, config.SessionTicketsDisabled = tls.NoClientCert, true
	in, says := openssl(t, "s_client", "-connect", ln.Addr().String(), "-tls1_3")
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	e, err := shake(conn, config, false)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(e)
	secret := bytes.Clone(e.in.secret)
	for i, command := range []string{"K", "k", "K", "k"} {
		ours := bytes.Clone(e.out.secret)
		fmt.Fprintln(in, command)
		// The tool takes what it reads at once for text.
		for says.Scan() && !strings.Contains(says.Text(), "KEYUPDATE") {
			t.Log(says.Text())
		}
		text := fmt.Sprintf("line %d", i)
		fmt.Fprintln(in, text)
		if !lines.Scan() || lines.Text() != text {
			t.Fatalf("%q, %v; want %q", lines.Text(), lines.Err(), text)
		}
		if bytes.Equal(secret, e.in.secret) {
			t.Fatalf("after %s the peer's key is the same", command)
		}
		secret = bytes.Clone(e.in.secret)
		fmt.Fprintln(e, "answer", i)
		for says.Scan() && says.Text() != fmt.Sprint("answer ", i) {
			t.Log(says.Text())
		}
		if asked := command == "K"; asked == bytes.Equal(ours, e.out.secret) {
			t.Errorf("after %s our key has changed: %v", command, !asked)
		}
	}
}

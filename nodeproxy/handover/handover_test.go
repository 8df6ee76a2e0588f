package handover

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

const deadline = 30 * time.Second

// owner notes what is asked of it.
type owner struct {
	estate *Estate
	err    error
	asked  chan string
}

func (o *owner) Bequeath(context.Context, Self) (*Estate, error) {
	o.asked <- "bequeath"
	return o.estate, o.err
}
func (o *owner) Resume(_ Self, why error) { o.asked <- fmt.Sprint("resume: ", why) }
func (o *owner) Release(Self)             { o.asked <- "release" }

func (o *owner) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-o.asked:
		if !strings.HasPrefix(got, want) {
			t.Fatalf("asked of the owner: %s, want %s", got, want)
		}
	case <-time.After(deadline):
		t.Fatalf("nobody asked the owner to %s", want)
	}
}

var older = Self{Version: "1.0.0", MapABI: 3, Node: "node-1", Pins: "/sys/fs/bpf/nodeproxy"}

// serve runs the older daemon's side until the test ends, and returns where.
func serve(t *testing.T, o *owner) (path string, stop func(), ended <-chan error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "handover.sock")
	s, err := Listen(path, older, o, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	stopped := make(chan struct{})
	go func() { done <- s.Serve(ctx); close(stopped) }()
	t.Cleanup(func() { stop(); <-stopped })
	return path, stop, done
}

func newOwner(t *testing.T) *owner {
	t.Helper()
	files := make(Files)
	for i := range 3 * filesAFrame {
		f, err := os.CreateTemp(t.TempDir(), "file")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := fmt.Fprint(f, i); err != nil {
			t.Fatal(err)
		}
		files[fmt.Sprint("file ", i)] = f
	}
	return &owner{estate: &Estate{State: []byte(`{"known": true}`), Snapshot: make([]byte, 3<<20), Files: files}, asked: make(chan string, 16)}
}

func TestAnEstateChangesHandsWhole(t *testing.T) {
	netlab.Require(t)
	o := newOwner(t)
	path, stop, ended := serve(t, o)
	s, err := Begin(path, older)
	if err != nil || s == nil {
		t.Fatalf("begin: %v, %v", s, err)
	}
	o.expect(t, "bequeath")
	if s.From.Version != older.Version || s.From.PID != os.Getpid() || string(s.Estate.State) != `{"known": true}` || len(s.Estate.Snapshot) != 3<<20 {
		t.Errorf("from %+v came %q and %d bytes", s.From, s.Estate.State, len(s.Estate.Snapshot))
	}
	for i := range 3 * filesAFrame {
		f := s.Estate.Files.Take(fmt.Sprint("file ", i))
		if f == nil {
			t.Fatalf("file %d is missing", i)
		}
		text := make([]byte, 8)
		n, err := f.ReadAt(text, 0)
		f.Close()
		if string(text[:n]) != fmt.Sprint(i) || err != io.EOF {
			t.Errorf("file %d holds %q: %v", i, text[:n], err)
		}
	}
	if s.Estate.Files.Take("file 0") != nil {
		t.Error("a file can be taken twice")
	}
	if err := s.Commit(); err != nil {
		t.Error(err)
	}
	o.expect(t, "release")
	select {
	case <-s.Drained():
		t.Error("the older daemon is taken for drained, and is not")
	default:
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	select {
	case <-s.Drained():
	case <-time.After(deadline):
		t.Error("that the older daemon is drained is not seen")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket's file is the next daemon's, and is gone: %v", err)
	}
	_ = s.Close()
}

func TestWhereNoDaemonListensNothingIsTakenOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	if s, err := Begin(path, older); s != nil || err != nil {
		t.Errorf("without a socket: %v, %v", s, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if s, err := Begin(path, older); s != nil || err != nil {
		t.Errorf("at a dead daemon's socket: %v, %v", s, err)
	}
}

func TestADaemonThatCannotTakeOverIsToldWhy(t *testing.T) {
	netlab.Require(t)
	o := newOwner(t)
	path, _, _ := serve(t, o)
	for name, c := range map[string]struct {
		change func(*Self)
		says   []string
	}{
		"an older map ABI": {func(s *Self) { s.Version, s.MapABI = "0.9.0", 2 }, []string{"1.0.0", "v3", "0.9.0", "v2"}},
		"a newer map ABI":  {func(s *Self) { s.Version, s.MapABI = "2.0.0", 4 }, []string{"1.0.0", "v3", "2.0.0", "v4"}},
		"another node":     {func(s *Self) { s.Node = "node-2" }, []string{"node-1", "node-2"}},
		"other pins":       {func(s *Self) { s.Pins = "/elsewhere" }, []string{older.Pins, "/elsewhere"}},
	} {
		self := older
		c.change(&self)
		s, err := Begin(path, self)
		if _, is := errors.AsType[*Refused](err); !is || s != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, text := range c.says {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v does not say %s", name, err, text)
			}
		}
	}
	if got, want := mismatch(Self{Protocol: 1, Version: "1.0.0"}, Self{Protocol: 2, Version: "2.0.0"}), "speaks hand-over 1, and version 2.0.0 speaks 2"; !strings.Contains(got, want) {
		t.Errorf("another protocol: %q, want %q in it", got, want)
	}
	o.err = errors.New("it is stopping")
	if _, err := Begin(path, older); err == nil || !strings.Contains(err.Error(), "it is stopping") {
		t.Errorf("the owner's own reason: %v", err)
	}
}

func TestWhenTheNextDaemonIsGoneBeforeItServesTheOlderOneResumes(t *testing.T) {
	netlab.Require(t)
	o := newOwner(t)
	path, _, _ := serve(t, o)
	for range 2 { // and then it can hand over to another
		s, err := Begin(path, older)
		if err != nil || s == nil {
			t.Fatalf("begin: %v, %v", s, err)
		}
		o.expect(t, "bequeath")
		if _, err := Begin(path, older); err == nil || !strings.Contains(err.Error(), "another hand-over is under way") {
			t.Errorf("a third daemon meanwhile: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		o.expect(t, "resume")
	}
}

// dying answers as the older daemon does until it dies, after so many bytes.
func dying(t *testing.T, after int) (path string) {
	t.Helper()
	inner, _, _ := serve(t, newOwner(t))
	path = filepath.Join(t.TempDir(), "handover.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			real, err := net.Dial("unix", inner)
			if err == nil {
				go func() { _, _ = io.Copy(real, conn) }()
				_, _ = io.CopyN(conn, real, int64(after)) // the files do not come along
				real.Close()
			}
			conn.Close()
		}
	}()
	return path
}

func TestWhenTheOlderDaemonDiesBeforeItsEstateIsWholeNoneRan(t *testing.T) {
	netlab.Require(t)
	for _, after := range []int{0, 4, 20, 200, 1 << 20} {
		if s, err := Begin(dying(t, after), older); s != nil || err != nil {
			t.Errorf("after %d bytes: %v, %v", after, s, err)
		}
	}
}

func TestWhenTheOlderDaemonDiesLaterTheNextOneHasAllItNeeds(t *testing.T) {
	netlab.Require(t)
	path := filepath.Join(t.TempDir(), "handover.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		s := &Server{self: older, log: slog.New(slog.DiscardHandler)}
		s.self.Protocol = Protocol
		w := wire{conn}
		if _, err := s.greet(w); err == nil {
			_ = w.send(greeting, hello, []byte(`{"protocol":1,"version":"1.0.0","map_abi":3,"node":"node-1","pins":"/sys/fs/bpf/nodeproxy"}`))
			_ = w.sendEstate(&Estate{State: []byte("{}")})
		}
		conn.Close()
	}()
	s, err := Begin(path, older)
	if err != nil || s == nil {
		t.Fatalf("begin: %v, %v", s, err)
	}
	defer s.Close()
	select {
	case <-s.Lost():
	case <-time.After(deadline):
		t.Fatal("its death is not noticed")
	}
	if err := errors.Join(s.Err(), s.Commit()); err != nil {
		t.Error(err)
	}
}

// TestHostileBytesEndAHandOverAndNothingElse: who can write there is root, but need not be a daemon.
func TestHostileBytesEndAHandOverAndNothingElse(t *testing.T) {
	netlab.Require(t)
	o := newOwner(t)
	path, _, _ := serve(t, o)
	frame := func(k kind, size int, body string) []byte {
		b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(k)), uint32(size))
		return append(b, body...)
	}
	for name, bytes := range map[string][]byte{
		"noise":               []byte("GET / HTTP/1.1\r\nHost: nodeproxy\r\n\r\n"),
		"another frame":       frame(serving, 0, ""),
		"an unknown frame":    frame(99, 0, ""),
		"a frame too long":    frame(hello, 1<<31, ""),
		"no JSON":             frame(hello, 3, "{}}"),
		"of another protocol": frame(hello, 14, `{"protocol":7}`),
	} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(deadline))
		if _, err := conn.Write(bytes); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		answer, err := io.ReadAll(conn)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) || len(answer) > 0 && kind(binary.BigEndian.Uint32(answer)) != refused {
			t.Errorf("%s is answered by %q: %v", name, answer, err)
		}
		conn.Close()
	}
	select {
	case asked := <-o.asked:
		t.Errorf("the owner was asked to %s", asked)
	default:
	}
	s, err := Begin(path, older)
	if err != nil || s == nil {
		t.Fatalf("a daemon that comes afterwards: %v, %v", s, err)
	}
	_ = s.Close()
	o.expect(t, "bequeath")
	o.expect(t, "resume")
}

// TestAnotherUserIsRefused runs this test again as another user.
func TestAnotherUserIsRefused(t *testing.T) {
	const variable = "NODEPROXY_TEST_HANDOVER"
	if path := os.Getenv(variable); path != "" {
		s, err := Begin(path, older)
		fmt.Printf("got: %v, %v\n", s, err)
		return
	}
	netlab.Require(t)
	o := newOwner(t)
	path, _, _ := serve(t, o)
	dir, err := os.MkdirTemp("/tmp", "nodeproxy-handover-") // which the user can search, unlike the test's own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	test, socket := filepath.Join(dir, "test"), filepath.Join(dir, "handover.sock")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(test, program, 0o755), os.Rename(path, socket)); err != nil {
		t.Fatal(err)
	}
	ask := func() string {
		cmd := exec.Command(test, "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), variable+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	if out := ask(); !strings.Contains(out, "permission denied") {
		t.Errorf("the socket's mode lets it in: %s", out)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	if out := ask(); !strings.Contains(out, "of uid 65534 is not root") {
		t.Errorf("with a mode that lets it in it %s", out)
	}
	select {
	case asked := <-o.asked:
		t.Errorf("the owner was asked to %s", asked)
	default:
	}
}

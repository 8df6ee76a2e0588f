package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func newTwoNodes(t *testing.T) *TwoNodes {
	t.Helper()
	Require(t)
	lab, err := NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if leaks := lab.Leaks(); len(leaks) > 0 {
			t.Errorf("after close there remain: %s", strings.Join(leaks, ", "))
		}
	})
	return lab
}

func newWorkload(t *testing.T, n *Node, name string) *Workload {
	t.Helper()
	w, err := n.Workload(name)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWorkloadsOfBothNodesReachEachOtherUnderTheirOwnAddresses(t *testing.T) {
	lab := newTwoNodes(t)
	web, batch := newWorkload(t, lab.Nodes[0], "web"), newWorkload(t, lab.Nodes[0], "batch")
	api := newWorkload(t, lab.Nodes[1], "api")
	host, err := lab.Nodes[1].HostWorkload("host")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		from, to *Workload
		fromIP   netip.Addr
		toIP     netip.Addr
	}{
		{web, api, web.IPv4, api.IPv4},
		{web, api, web.IPv6, api.IPv6},
		{api, web, api.IPv4, web.IPv4},
		{web, batch, web.IPv4, batch.IPv4},
		{web, batch, web.IPv6, batch.IPv6},
		{web, host, web.IPv4, host.IPv4},
		{web, host, web.IPv6, host.IPv6},
	} {
		ln, err := tc.to.Namespace.Listen("tcp", netip.AddrPortFrom(tc.toIP, 7000).String())
		if err != nil {
			t.Fatal(err)
		}
		conn, err := tc.from.Namespace.Dial(testContext(t), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatalf("%s to %s at %s: %v", tc.from.Name, tc.to.Name, tc.toIP, err)
		}
		accepted, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := accepted.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != tc.fromIP {
			t.Errorf("%s to %s: the peer is seen as %s, not %s", tc.from.Name, tc.to.Name, got, tc.fromIP)
		}
		for _, c := range []io.Closer{conn, accepted, ln} {
			_ = c.Close()
		}
	}
}

func TestAProcessStartsInItsCgroupAndNamespace(t *testing.T) {
	lab := newTwoNodes(t)
	w := newWorkload(t, lab.Nodes[0], "web")
	p, err := w.Start(Command{Path: "sh", Args: []string{"-c", "grep ^0: /proc/self/cgroup; readlink /proc/self/ns/net"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/" + lab.Name() + "/node-1/web\n", fmt.Sprintf("net:[%d]", w.Namespace.Inode())} {
		if !strings.Contains(p.Output(), want) {
			t.Errorf("a process of the workload reports %q, without %q", p.Output(), want)
		}
	}
	outside, err := lab.Run(testContext(t), Command{Path: "readlink", Args: []string{"/proc/self/ns/net"}})
	if err != nil {
		t.Fatal(err)
	}
	if mine, _ := os.Readlink("/proc/thread-self/ns/net"); strings.TrimSpace(outside) != mine {
		t.Errorf("a process without a namespace is in %s, not in ours, %s", outside, mine)
	}
}

func TestAFailingCommandIsAnErrorWithItsOutput(t *testing.T) {
	lab := newTwoNodes(t)
	_, err := lab.Run(testContext(t), Command{Path: "sh", Args: []string{"-c", "echo broken pipe dream >&2; exit 3"}})
	if err == nil || !strings.Contains(err.Error(), "broken pipe dream") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error is %v", err)
	}
	if _, err := lab.Start(Command{Path: "/nonexistent"}); err == nil {
		t.Error("a program that does not exist was started")
	}
}

func TestWaitOutputReturnsWhenTheTextAppearsAndFailsWhenTheProcessEndsWithoutIt(t *testing.T) {
	lab := newTwoNodes(t)
	p, err := lab.Start(Command{Path: "sh", Args: []string{"-c", "echo rea; echo dy; read wait"}, Stdin: blockedReader(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitOutput(testContext(t), "dy\n"); err != nil {
		t.Error(err)
	}
	ended, err := lab.Start(Command{Path: "true"})
	if err != nil {
		t.Fatal(err)
	}
	if err := ended.WaitOutput(testContext(t), "never"); err == nil {
		t.Error("the text was found in nothing")
	}
	p.Kill()
}

func blockedReader(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r
}

func TestDoLeavesTheCallersNamespaceAlone(t *testing.T) {
	lab := newTwoNodes(t)
	before, _ := os.Readlink("/proc/thread-self/ns/net")
	var inside string
	if err := lab.Nodes[0].Namespace.Do(func() (err error) {
		inside, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("net:[%d]", lab.Nodes[0].Namespace.Inode()); inside != want {
		t.Errorf("inside Do the namespace is %s, not %s", inside, want)
	}
	for range 50 {
		if after, _ := os.Readlink("/proc/thread-self/ns/net"); after != before {
			t.Fatalf("after Do a thread is left in %s", after)
		}
	}
	sentinel := errors.New("sentinel")
	if err := lab.Nodes[0].Namespace.Do(func() error { return sentinel }); !errors.Is(err, sentinel) {
		t.Errorf("Do returned %v", err)
	}
}

func TestACaptureSeesWhatCrossesTheWire(t *testing.T) {
	lab := newTwoNodes(t)
	web, api := newWorkload(t, lab.Nodes[0], "web"), newWorkload(t, lab.Nodes[1], "api")
	marker := []byte("a marker in the clear")
	tlsRecord := append([]byte{23, 3, 3, 0, 4}, "\x00\x01\x02\x03"...)
	for _, to := range []netip.Addr{api.IPv4, api.IPv6} {
		capture, err := lab.Capture()
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, web, api, to, marker)
		exchange(t, web, api, to, tlsRecord)
		rec, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		if !rec.Contains(marker) {
			t.Errorf("to %s: the marker is not in the %d packets captured", to, len(rec.Packets))
		}
		if rec.Contains([]byte("another marker")) {
			t.Errorf("to %s: text was found that was never sent", to)
		}
		if got := rec.TLSRecords()[23]; got != 1 {
			t.Errorf("to %s: %d TLS records were seen, 1 was sent", to, got)
		}
		if got, want := rec.PayloadBytes(), len(marker)+len(tlsRecord); got != want {
			t.Errorf("to %s: %d payload bytes were seen, %d were sent", to, got, want)
		}
		if rec.Dropped != 0 {
			t.Errorf("to %s: %d packets were dropped", to, rec.Dropped)
		}
	}
}

// exchange sends payload once and waits until the receiver has it.
func exchange(t *testing.T, from, to *Workload, ip netip.Addr, payload []byte) {
	t.Helper()
	ln, err := to.Namespace.Listen("tcp", netip.AddrPortFrom(ip, 7001).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := from.Namespace.Dial(testContext(t), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(payload); err != nil {
		t.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	got := make([]byte, len(payload))
	if _, err := io.ReadFull(accepted, got); err != nil || !bytes.Equal(got, payload) {
		t.Fatalf("received %q, %v", got, err)
	}
}

func TestABridgeForwardsBetweenItsPorts(t *testing.T) {
	lab := newTwoNodes(t)
	sw, a, b := namespace(t, lab), namespace(t, lab), namespace(t, lab)
	for _, err := range []error{
		Join(sw, "p1", a, "eth0"), Join(sw, "p2", b, "eth0"), sw.Bridge("br0", "p1", "p2"),
		a.Address("eth0", netip.MustParsePrefix("172.16.0.1/24")), b.Address("eth0", netip.MustParsePrefix("172.16.0.2/24")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ln, err := b.Listen("tcp", "172.16.0.2:7002")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := a.Dial(testContext(t), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

func namespace(t *testing.T, lab *TwoNodes) *Namespace {
	t.Helper()
	n, err := lab.Namespace()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTheLabsBPFFSIsItsOwn(t *testing.T) {
	lab := newTwoNodes(t)
	dir, err := lab.BPFFS()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		t.Errorf("%s is of type %x, %v", dir, st.Type, err)
	}
	if again, err := lab.BPFFS(); again != dir || err != nil {
		t.Errorf("the second call returns %s, %v", again, err)
	}
}

func TestCloseKillsProcessesAndTheirChildren(t *testing.T) {
	lab := newTwoNodes(t)
	w := newWorkload(t, lab.Nodes[0], "web")
	// setsid takes the child out of the process group, so that only the cgroup can find it.
	p, err := w.Start(Command{Path: "sh", Args: []string{"-c", "setsid sleep 1000 & echo child=$!; wait"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitOutput(testContext(t), "child="); err != nil {
		t.Fatal(err)
	}
	pids, err := w.Cgroup.PIDs()
	if err != nil || len(pids) != 2 {
		t.Fatalf("the cgroup holds %v, %v", pids, err)
	}
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) && !zombie(pid) {
			t.Errorf("process %d lives: %v", pid, err)
		}
	}
	if _, err := w.Start(Command{Path: "true"}); err == nil {
		t.Error("a process was started in a closed lab")
	}
}

// zombie says whether pid waits for its parent, init, to reap it.
func zombie(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(text), ") Z ")
}

func TestLeaksNamesWhatIsStillThere(t *testing.T) {
	Require(t)
	lab, err := NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	bpffs, err := lab.BPFFS()
	if err != nil {
		t.Fatal(err)
	}
	p, err := lab.Start(Command{Path: "sleep", Args: []string{"1000"}, Namespace: lab.Nodes[0].Namespace})
	if err != nil {
		t.Fatal(err)
	}
	leaks := lab.Leaks()
	for _, want := range []string{lab.Dir(), lab.Cgroup().Path(), "mount on " + bpffs, fmt.Sprintf("process %d/%d in", p.PID(), p.PID())} {
		if !slices.ContainsFunc(leaks, func(leak string) bool { return strings.HasPrefix(leak, want) }) {
			t.Errorf("%q is not among the leaks %q", want, leaks)
		}
	}
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	if leaks := lab.Leaks(); len(leaks) > 0 {
		t.Errorf("after close there remain: %q", leaks)
	}
	if err := lab.Close(); err != nil {
		t.Errorf("the second close: %v", err)
	}
}

func TestAPartialFailureIsCleanedUp(t *testing.T) {
	lab := newTwoNodes(t)
	if _, err := lab.Nodes[0].Workload("web"); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Nodes[0].Workload("web"); err == nil {
		t.Error("a second cgroup of the same name was made")
	}
	// The cleanup of newTwoNodes asserts that nothing remains.
}

// TestAKilledOwnerLeavesNothingThatTheNextLabDoesNotRemove runs this test binary as the owner of a lab and kills it.
func TestAKilledOwnerLeavesNothingThatTheNextLabDoesNotRemove(t *testing.T) {
	if os.Getenv("NETLAB_TEST_OWNER") == "1" {
		ownLabForever(t)
	}
	Require(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.Command(exe, "-test.run", "^"+t.Name()+"$", "-test.v")
	owner.Env = append(os.Environ(), "NETLAB_TEST_OWNER=1")
	stdout, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	var name string
	var pid int
	for name == "" {
		var word string
		if _, err := fmt.Fscan(stdout, &word); err != nil {
			t.Fatalf("the owner ended early: %v", err)
		}
		_, _ = fmt.Sscanf(strings.ReplaceAll(word, ",", " "), "lab= %s %d", &name, &pid)
	}
	_ = owner.Process.Kill()
	_ = owner.Wait()

	deadline := time.Now().Add(10 * time.Second)
	for unix.Kill(pid, 0) == nil && !zombie(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d outlived its owner", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
	next := newTwoNodes(t)
	root := filepath.Dir(next.Cgroup().Path())
	for _, path := range []string{filepath.Join(root, name), filepath.Join(os.TempDir(), name)} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	for _, m := range mounts() {
		if strings.Contains(m.point, name) {
			t.Errorf("%s is still mounted", m.point)
		}
	}
}

func ownLabForever(t *testing.T) {
	lab, err := NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lab.BPFFS(); err != nil {
		t.Fatal(err)
	}
	w := newWorkload(t, lab.Nodes[0], "web")
	p, err := w.Start(Command{Path: "sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nlab=,%s,%d\n", lab.Name(), p.PID())
	select {}
}

// fakeTB records how Require ends.
type fakeTB struct{ skipped, failed string }

func (f *fakeTB) Helper()                      {}
func (f *fakeTB) Skipf(form string, a ...any)  { f.skipped = fmt.Sprintf(form, a...) }
func (f *fakeTB) Fatalf(form string, a ...any) { f.failed = fmt.Sprintf(form, a...) }

func TestRequireSkipsOrFailsAndNamesWhatIsMissing(t *testing.T) {
	if len(Missing()) == 0 {
		t.Run("all there", func(t *testing.T) {
			var tb fakeTB
			if Require(&tb); tb != (fakeTB{}) {
				t.Errorf("nothing is missing, and Require says %+v", tb)
			}
		})
		withoutRoot(t)
		return
	}
	assertRequire(t)
}

// withoutRoot runs the test again as nobody, where root is missing.
func withoutRoot(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "netlab.test")
	if err := os.WriteFile(copied, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	lab, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	const nobody = 65534
	if _, err := lab.Run(testContext(t), Command{Path: copied, Args: []string{"-test.run", "^TestRequire"}, Dir: "/", UID: nobody}); err != nil {
		t.Error(err)
	}
}

func assertRequire(t *testing.T) {
	var tb fakeTB
	t.Setenv("REQUIRE_PRIVILEGED", "")
	if Require(&tb); !strings.Contains(tb.skipped, "root") || tb.failed != "" {
		t.Errorf("without privileges Require says %+v", tb)
	}
	tb = fakeTB{}
	t.Setenv("REQUIRE_PRIVILEGED", "1")
	if Require(&tb); !strings.Contains(tb.failed, "root") || tb.skipped != "" {
		t.Errorf("with REQUIRE_PRIVILEGED=1 Require says %+v", tb)
	}
}

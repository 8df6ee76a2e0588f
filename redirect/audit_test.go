package redirect_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"nodeproxy.io/redirect"
)

// audited runs an audit and returns what it found, sorted; what could not be repaired fails the test.
func (n *node) audited() []string {
	n.t.Helper()
	var found []string
	for _, d := range n.r.Audit(true) {
		found = append(found, d.What)
		if d.Err != nil {
			n.t.Errorf("%s: %v", d.What, d.Err)
		}
	}
	slices.Sort(found)
	return found
}

func (n *node) expectAudit(want ...string) {
	n.t.Helper()
	slices.Sort(want)
	if got := n.audited(); !slices.Equal(got, want) {
		n.t.Errorf("the audit finds %q, want %q", got, want)
	}
	if again := n.audited(); len(again) > 0 {
		n.t.Errorf("the next audit still finds %q", again)
	}
}

// detach does what "bpftool link detach" does.
func detach(t *testing.T, pin string) {
	t.Helper()
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.(interface{ Detach() error }).Detach(); err != nil {
		t.Fatal(err)
	}
}

func TestAnAuditRepairsWhatSomebodyElseChanged(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	if err := n.r.SetRules([]redirect.Rule{{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id}}); err != nil {
		t.Fatal(err)
	}
	id := cgroupID(t, p.cgroup.Path())
	hooks := filepath.Join(n.r.Dir(), "cgroups", strconv.FormatUint(id, 10))
	guard := filepath.Join(n.r.Dir(), "namespaces", strconv.FormatUint(p.ns.Cookie, 10), "sk_lookup")
	works := func() {
		t.Helper()
		if out := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(out, "240.0.0.1:80 for workload "+strconv.Itoa(int(p.id))) {
			t.Errorf("the redirect: %s", out)
		}
		if out := p.dialFrom(nil, "tcp4", at(p.v4, 7001)); !strings.Contains(out, "error") {
			t.Errorf("the guard: %s", out)
		}
	}
	waitFor(t, p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7001"), "listening")
	works()
	n.expectAudit()

	for _, hook := range []string{"connect4", "connect6", "getpeername4", "getpeername6", "sockops"} {
		detach(t, filepath.Join(hooks, hook))
	}
	n.expectAudit("connect4 was detached", "connect6 was detached", "getpeername4 was detached", "getpeername6 was detached", "sockops was detached")
	works()

	detach(t, filepath.Join(n.r.Dir(), "daemon"))
	n.expectAudit("daemon was detached")
	works()

	detach(t, guard)
	if out := p.dialFrom(nil, "tcp4", at(p.v4, 7001)); !strings.Contains(out, "hello") {
		t.Errorf("without the guard: %s", out)
	}
	n.expectAudit("the guard was detached")
	works()

	if err := os.RemoveAll(hooks); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(guard); err != nil {
		t.Fatal(err)
	}
	n.expectAudit("the pin of connect4 was removed", "the pin of connect6 was removed", "the pin of getpeername4 was removed",
		"the pin of getpeername6 was removed", "the pin of sockops was removed", "the pin of the guard was removed")
	works()

	l, err := link.LoadPinnedLink(filepath.Join(hooks, "connect4"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Update(passing(t, filepath.Join(n.r.Dir(), "maps", "memberships"))); err != nil {
		t.Fatal(err)
	}
	n.expectAudit("connect4 was replaced")
	works()

	for name, spoil := range map[string]func(m *ebpf.Map) error{
		"rules": empty, "destinations": empty, "virtual_ranges": empty, "ns_ready": empty, "listeners": empty, "workloads": empty,
		"guard": func(m *ebpf.Map) error {
			err := m.Delete(uint32(0))
			if out := p.dialFrom(nil, "tcp4", at(p.v4, 7001)); !strings.Contains(out, "error") {
				t.Errorf("without what the guard of the namespace calls: %s", out)
			}
			return err
		},
	} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(n.r.Dir(), "maps", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := spoil(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		m.Close()
	}
	n.expectAudit("1 entries of map rules were changed", "1 entries of map destinations were changed", "1 entries of map virtual_ranges were changed",
		"the guard of all namespaces was replaced", "the namespace was not open for redirects", "the workload was unknown to the kernel",
		"the guard did not know a listener", "the guard did not know a listener", "the guard did not know a listener", "the guard did not know a listener")
	works()

	n.r.Close() // what was repaired outlives the daemon like what was not
	n.open()
	if got := n.r.Enrolled(); len(got) != 1 || got[0].Cgroup != id {
		t.Errorf("the next daemon finds %v", got)
	}
}

func TestAnAuditOfACgroupThatIsGoneFindsNothing(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	if err := p.cgroup.Remove(); err != nil {
		t.Fatal(err)
	}
	n.expectAudit()
}

func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

func empty(m *ebpf.Map) error {
	var keys [][]byte
	key := make([]byte, m.KeySize())
	for err := m.NextKey(nil, &key); err == nil; err = m.NextKey(key, &key) {
		keys = append(keys, slices.Clone(key))
	}
	for _, k := range keys {
		if err := m.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// passing is a program that lets every connect pass. It uses the cgroup storage pinned at storage: kernels with the check of
// cgroup_storage in cgroup_bpf_replace() answer EINVAL to a program that uses another or none (Debian's 6.1.192 and 6.12.117 do).
func passing(t *testing.T, storage string) *ebpf.Program {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(storage, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Imm(asm.R2, 0), asm.FnGetLocalStorage.Call(), // storage is used
			asm.Mov.Imm(asm.R0, 1), asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

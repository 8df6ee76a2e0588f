package file

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
)

func demandFor(node string, services ...string) demand {
	return demand{
		node: node, address: netip.MustParseAddr("10.0.0.1"), services: services, mesh: services, taken: map[uint16]bool{},
		virtual: netip.MustParsePrefix("240.0.0.0/29"), ports: Ports{100, 105},
	}
}

func mustSettle(t *testing.T, dir string, d demand, known *state) *state {
	t.Helper()
	s, err := settle(context.Background(), dir, d, known)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAssignmentsAreStableAndNeverTheEndsOfTheRange(t *testing.T) {
	d := t.TempDir()
	all := demandFor("n1", "a", "b", "c", "d", "e", "f")
	first := mustSettle(t, d, all, nil)
	used := make(map[netip.Addr]bool)
	ports := make(map[uint16]bool)
	for _, name := range all.services {
		ip, port := first.Virtual[name], first.Ports["n1"][name]
		if !all.virtual.Contains(ip) || ip.String() == "240.0.0.0" || ip.String() == "240.0.0.7" || used[ip] || !all.ports.contains(port) || ports[port] {
			t.Errorf("%s has %s and port %d", name, ip, port)
		}
		used[ip], ports[port] = true, true
	}
	less := all
	less.services, less.mesh = []string{"b"}, []string{"b"}
	mustSettle(t, d, less, nil)
	if again := mustSettle(t, d, all, nil); !again.equal(first) {
		t.Errorf("a service that came back has another address: %v, was %v", again, first)
	}
	more := all
	more.services = append(more.services, "g")
	if _, err := settle(context.Background(), d, more, nil); err == nil || !strings.Contains(err.Error(), "240.0.0.0/29 is full") {
		t.Errorf("a seventh virtual IP of six: %v", err)
	}
	more = all
	more.mesh = append(more.mesh, "g")
	if _, err := settle(context.Background(), d, more, nil); err == nil || !strings.Contains(err.Error(), "6 ports for 7 instances") {
		t.Errorf("a seventh port of six: %v", err)
	}
	swap := all
	swap.services, swap.mesh = []string{"a", "g"}, []string{"a", "g"}
	swapped := mustSettle(t, d, swap, nil)
	if swapped.Virtual["a"] != first.Virtual["a"] || !used[swapped.Virtual["g"]] || swapped.Virtual["g"] == first.Virtual["a"] ||
		swapped.Ports["n1"]["a"] != first.Ports["n1"]["a"] || swapped.Ports["n1"]["g"] == first.Ports["n1"]["a"] {
		t.Errorf("g did not get what b to f left: %v", swapped)
	}
}

func TestPortsThatDefinitionsNameAreNotGivenOut(t *testing.T) {
	d := t.TempDir()
	want := demandFor("n1", "a", "b")
	first := mustSettle(t, d, want, nil)
	want.taken[first.Ports["n1"]["a"]] = true
	want.taken[102] = true
	next := mustSettle(t, d, want, nil)
	if p := next.Ports["n1"]["a"]; want.taken[p] || p == next.Ports["n1"]["b"] || next.Ports["n1"]["b"] != first.Ports["n1"]["b"] {
		t.Errorf("ports %v after %v", next.Ports, first.Ports)
	}
}

func TestManyNodesSettleAtOnce(t *testing.T) {
	d := t.TempDir()
	const nodes = 10
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			want := demandFor(fmt.Sprint("n", i), "shared", fmt.Sprint("svc-", i))
			want.virtual = netip.MustParsePrefix("fd00::/64")
			if _, err := settle(context.Background(), d, want, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s, err := readState(d)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[netip.Addr]string)
	for name, ip := range s.Virtual {
		if other, twice := seen[ip]; twice {
			t.Errorf("%s and %s both have %s", name, other, ip)
		}
		seen[ip] = name
	}
	if len(s.Virtual) != nodes+1 || len(s.Ports) != nodes || len(s.Nodes) != nodes {
		t.Errorf("a node's assignments were lost: %+v", s)
	}
}

func TestStateThatIsDeletedComesBack(t *testing.T) {
	d := dir(t, map[string]string{"nodes/node-1/b.hcl": "service { name = \"b\" port = 80 }"})
	s := start(t, testConfig(d, "node-1"))
	before := s.first()
	put(t, d, "nodes/node-1/a.hcl", "service { name = \"a\" port = 81 }") // would come first in a new assignment
	s.until("a", func(s *catalog.Snapshot) bool { return s.Services["a"] != nil })
	if err := os.Remove(filepath.Join(d, stateJSON)); err != nil {
		t.Fatal(err)
	}
	put(t, d, "nodes/node-1/c.hcl", "service { name = \"c\" port = 82 }")
	after := s.until("c", func(s *catalog.Snapshot) bool { return s.Services["c"] != nil })
	if after.Services["b"].Virtual[0] != before.Services["b"].Virtual[0] || find(after, "b", "b").Mesh != find(before, "b", "b").Mesh {
		t.Error("b has moved")
	}
	saved, err := readState(d)
	if err != nil || len(saved.Virtual) != 3 {
		t.Errorf("state.json: %+v, %v", saved, err)
	}
}

func TestALockThatIsNotGivenUpIsAnErrorUntilItIs(t *testing.T) {
	t.Parallel()
	d := t.TempDir()
	f, err := os.Create(filepath.Join(d, lockFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s := start(t, testConfig(d, "node-1"))
	s.untilError("another process has held it for too long", "fuser "+f.Name())
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil { // no event tells of that
		t.Fatal(err)
	}
	s.first()
	s.untilHealthy()
}

func TestWriteIsWholeOrNotAtAll(t *testing.T) {
	d := t.TempDir()
	path := filepath.Join(d, "f")
	if err := write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(d, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(d, "full"), []byte("x"), 0o600); err == nil { // the rename fails
		t.Error("a directory was replaced by a file")
	}
	if err := write(filepath.Join(d, "none", "f"), nil, 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("write below a directory that is not there: %v", err)
	}
	entries, err := os.ReadDir(d)
	if err != nil || len(entries) != 2 {
		t.Errorf("files left: %v, %v", entries, err)
	}
}

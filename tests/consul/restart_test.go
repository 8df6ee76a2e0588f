package consul

import (
	"bytes"
	"crypto/ecdsa"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// awaitKept waits until the snapshot that a daemon has in force is the one that is kept for the next.
func (m *mesh) awaitKept(node int) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.Store.Generation != s.Source.Generation {
			return fmt.Errorf("snapshot %d is in force, and kept is %+v", s.Source.Generation, s.Store)
		}
		return nil
	})
	m.must(err)
}

// storePin is where a node's snapshot is kept, and storeHeader what is in front of it.
func (m *mesh) storePin(node int) string {
	return filepath.Join(m.Daemons[node].Pins, m.Nodes[node].Name, fmt.Sprintf("v%d", redirect.MapABI), "maps", "snapshot")
}

const storeHeader = 48

// kept reads what is kept for a node's next daemon.
func (m *mesh) kept(node int) *catalog.Snapshot {
	m.t.Helper()
	store, err := ebpf.LoadPinnedMap(m.storePin(node), &ebpf.LoadPinOptions{ReadOnly: true})
	m.must(err)
	defer store.Close()
	var all []byte
	for i := range store.MaxEntries() {
		entry := make([]byte, store.ValueSize())
		m.must(store.Lookup(i, &entry))
		all = append(all, entry...)
	}
	kept, err := catalog.Decode(all[storeHeader:])
	m.must(err)
	return kept.Snapshot
}

// cli runs a command of nodeproxy on a node.
func (m *mesh) cli(node int, args ...string) (string, error) {
	return m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: args, Namespace: m.Nodes[node].Namespace})
}

func TestADaemonRestartedWhileItsAgentIsDownGoesOn(t *testing.T) {
	m, batch, calls := newFrontedMesh(t)
	for i := range m.Daemons {
		m.awaitKept(i)
	}
	m.keysAreInKernelMemoryAlone(0)

	// One daemon's agent dies. The other's is only out of reach: it is the server, which at its own restart would remove a
	// node without an agent from the catalog.
	killed := time.Now()
	m.agents[1].Process.Kill()
	m.fronts[0].Misbehave(aborts)
	m.fronts[0].Drop()
	for i, d := range m.Daemons {
		m.awaitSource(i, "failing", fails)
		d.Process.Kill()
	}
	for _, d := range m.Daemons {
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	m.load(100, calls...)()
	if out := m.dial(batch, calls[0].to, "peer"); reached(out) {
		t.Errorf("batch reaches api after the restart: %s", out)
	}
	for i, d := range m.Daemons {
		status, err := d.Admin().Status(m.ctx())
		m.must(err)
		if s := status.Source; !s.Restored || s.Error == "" || s.Updated.After(killed.Add(time.Second)) || killed.Sub(s.Updated) > 2*time.Minute {
			t.Errorf("the agents were killed at %s; status of %s says %+v", killed, m.Nodes[i].Name, s)
		}
		if age, since := m.sourceAge(i), time.Since(status.Source.Updated); age < since-10*time.Second || age > since+10*time.Second {
			t.Errorf("the metric says %s and status %s", age, since)
		}
		out, err := m.cli(i, "status", "--socket", d.Socket())
		m.must(err)
		if !strings.Contains(out, "as an earlier daemon knew it") || !strings.Contains(out, "kernel memory (BPF map)") {
			t.Errorf("status does not say what is in force:\n%s", out)
		}
	}

	for _, d := range m.Daemons { // what was restored is still there for the next one
		d.Process.Kill()
		m.must(d.Start(m.ctx()))
		_, err := d.AwaitProtected(m.ctx())
		m.must(err)
	}
	alive := m.streams(calls...)
	through := m.load(300, calls...)
	m.fronts[0].Misbehave(nil)
	m.must(m.agents[1].Restart(m.ctx()))
	for i := range m.Daemons {
		m.awaitSource(i, "well", works)
		m.awaitKept(i)
	}
	through()
	alive()
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "deny"}))
	m.eventually("fresh policy is in force", calls[0].from, calls[0].to, func(out string) bool { return !reached(out) })
}

// keysAreInKernelMemoryAlone looks for the key of a certificate in every file that the daemon of a node writes, and tries to
// read the store as somebody else.
func (m *mesh) keysAreInKernelMemoryAlone(node int) {
	m.t.Helper()
	key := m.kept(node).Leaves["web"].PrivateKey.(*ecdsa.PrivateKey)
	raw, err := key.Bytes()
	m.must(err)
	err = filepath.WalkDir(m.Nodes[node].Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, raw) || bytes.Contains(text, []byte("PRIVATE KEY")) {
			m.t.Errorf("a private key is in %s", path)
		}
		return err
	})
	m.must(err)
	p, err := m.Lab.Start(netlab.Command{Path: "cat", Args: []string{m.storePin(node)}, UID: 65534})
	m.must(err)
	if err := p.Wait(m.ctx()); err == nil || !strings.Contains(p.Output(), "Permission denied") {
		m.t.Errorf("somebody else opens the store: %v, %s", err, p.Output())
	}
}

// TestAStoreThatIsDamagedIsRefused: without the control plane and without a store the workloads are refused, not let out.
func TestAStoreThatIsDamagedIsRefused(t *testing.T) {
	m, _, calls := newFrontedMesh(t)
	m.awaitKept(0)
	m.agents[0].Process.Kill()
	m.Daemons[0].Process.Kill()
	damaged, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4096, MaxEntries: 3})
	m.must(err)
	defer damaged.Close()
	m.must(os.Remove(m.storePin(0)))
	m.must(damaged.Pin(m.storePin(0)))
	d := m.Daemons[0]
	d.Process, err = m.Lab.Start(netlab.Command{Path: d.Binary, Args: []string{"run", "--config", d.ConfigPath()}, Env: d.Env, Namespace: d.Node.Namespace})
	m.must(err)
	m.must(d.Process.WaitOutput(m.ctx(), "what an earlier daemon knew is not used"))
	m.awaitSource(0, "failing", fails)
	if out := m.dial(calls[0].from, calls[0].to, "peer"); reached(out) {
		t.Errorf("web without a mesh: %s", out)
	}
	m.must(m.agents[0].Restart(m.ctx()))
	m.awaitSource(0, "well", works)
	m.eventually("web reaches api", calls[0].from, calls[0].to, reached)
}

package redirect_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
)

func TestAStoredValueOutlivesTheDaemonAndNotCleanup(t *testing.T) {
	n := newNode(t)
	if _, err := n.r.Store().Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an empty store: %v", err)
	}
	for _, size := range []int{0, 1, 4095, 4096, 4097, redirect.MaxStored} {
		value := make([]byte, size)
		rand.Read(value)
		if err := n.r.Store().Save(value); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if err := n.r.Close(); err != nil {
			t.Fatal(err)
		}
		n.open()
		if got, err := n.r.Store().Load(); err != nil || !bytes.Equal(got, value) {
			t.Fatalf("%d bytes come back as %d: %v", size, len(got), err)
		}
	}
	if err := n.r.Store().Save(make([]byte, redirect.MaxStored+1)); !errors.Is(err, redirect.ErrTooLarge) {
		t.Errorf("too much is stored: %v", err)
	}
	pin := filepath.Join(n.r.Dir(), "maps", "snapshot")
	for path, want := range map[string]fs.FileMode{pin: 0o600, filepath.Dir(pin): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v: %v", path, info.Mode().Perm(), want, err)
		}
	}
	if err := n.r.Close(); err != nil {
		t.Fatal(err)
	}
	removed, err := redirect.Cleanup(n.cfg.Pins, n.cfg.Node)
	if err != nil || !strings.Contains(strings.Join(removed, "\n"), pin) {
		t.Errorf("cleanup removed %q: %v", removed, err)
	}
	if _, err := os.Stat(pin); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the store is left: %v", err)
	}
}

func TestAStoreThatIsNotWholeIsRefused(t *testing.T) {
	n := newNode(t)
	value := bytes.Repeat([]byte("what was last known "), 1000)
	pin := filepath.Join(n.r.Dir(), "maps", "snapshot")
	damage := map[string]func(entries []byte) []byte{
		"a byte is another":   func(b []byte) []byte { b[9000] ^= 1; return b },
		"the end is missing":  func(b []byte) []byte { return b[:len(b)-4096] },
		"nothing was written": func(b []byte) []byte { return make([]byte, len(b)) },
	}
	for what, change := range damage {
		if err := n.r.Store().Save(value); err != nil {
			t.Fatal(err)
		}
		replacePinned(t, pin, change(readPinned(t, pin)))
		if got, err := n.r.Store().Load(); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
}

// TestADaemonKilledWhileItStoresLeavesTheOlderValue leaves the pin behind that such a daemon does.
func TestADaemonKilledWhileItStoresLeavesTheOlderValue(t *testing.T) {
	n := newNode(t)
	store := n.r.Store()
	if err := store.Save([]byte("older")); err != nil {
		t.Fatal(err)
	}
	pin := filepath.Join(n.r.Dir(), "maps", "snapshot")
	replacePinned(t, pin+"_next", make([]byte, 8192))
	if got, err := store.Load(); err != nil || string(got) != "older" {
		t.Errorf("%q, %v", got, err)
	}
	if err := store.Save([]byte("newer")); err != nil {
		t.Fatal(err)
	}
	if got, err := store.Load(); err != nil || string(got) != "newer" {
		t.Errorf("%q, %v", got, err)
	}
}

func readPinned(t *testing.T, path string) []byte {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var all []byte
	for i := range m.MaxEntries() {
		var entry [4096]byte
		if err := m.Lookup(i, &entry); err != nil {
			t.Fatal(err)
		}
		all = append(all, entry[:]...)
	}
	return all
}

func replacePinned(t *testing.T, path string, entries []byte) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4096, MaxEntries: uint32(len(entries) / 4096), Flags: unix.BPF_F_MMAPABLE})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for i := range m.MaxEntries() {
		if err := m.Put(i, entries[i*4096:(i+1)*4096]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
}

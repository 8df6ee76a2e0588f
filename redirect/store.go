package redirect

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// MaxStored is how many bytes a Store takes.
const MaxStored = 32 << 20

// A Store keeps one value in the memory of the kernel: it survives the daemon, however that ends, and not the machine. The
// value is a BPF array of its own, sealed before it is pinned beside the maps, where only root can open it. It is never
// swapped or written to a disk; it counts as memory of the daemon's cgroup.
//
// A value replaces the one before by renaming its pin: whoever dies while writing leaves the older one whole.
type Store struct {
	path string // of the pin
}

// Store is the node's. It may be used until Close, by one goroutine at a time.
func (r *Redirect) Store() *Store { return &Store{filepath.Join(r.dir, "maps", "snapshot")} }

// storeHeader is in front of the value.
type storeHeader struct {
	Magic  [8]byte
	Length uint64
	Sum    [sha256.Size]byte
}

var storeMagic = [8]byte{'n', 'p', 's', 't', 'o', 'r', 'e', '1'}

const (
	storeEntry      = 4096
	storeHeaderSize = 8 + 8 + sha256.Size
)

// ErrTooLarge says that a value is larger than MaxStored.
var ErrTooLarge = fmt.Errorf("it is larger than %d MiB", MaxStored>>20)

// Save replaces the value. On error the one before is still there.
func (s *Store) Save(value []byte) error {
	if len(value) > MaxStored {
		return ErrTooLarge
	}
	var head bytes.Buffer
	if err := binary.Write(&head, binary.NativeEndian, storeHeader{storeMagic, uint64(len(value)), sha256.Sum256(value)}); err != nil {
		return err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "snapshot", Type: ebpf.Array, KeySize: 4, ValueSize: storeEntry,
		MaxEntries: uint32((storeHeaderSize + len(value) + storeEntry - 1) / storeEntry), Flags: unix.BPF_F_MMAPABLE,
	})
	if err != nil {
		return fmt.Errorf("make a map to store in: %w", err)
	}
	defer m.Close()
	err = within(m, unix.PROT_READ|unix.PROT_WRITE, func(memory []byte) error {
		copy(memory[copy(memory, head.Bytes()):], value)
		return nil
	})
	if err != nil {
		return err
	}
	if err := m.Freeze(); err != nil {
		return fmt.Errorf("seal the map: %w", err)
	}
	next := s.path + "_next"
	if err := errors.Join(removed(next), m.Pin(next), os.Rename(next, s.path)); err != nil {
		return fmt.Errorf("pin the map: %w", err)
	}
	return nil
}

// Load returns the value, or an error that is fs.ErrNotExist when there is none. What is not whole is an error.
func (s *Store) Load() ([]byte, error) {
	m, err := ebpf.LoadPinnedMap(s.path, nil) // the kernel does not map what was opened for reading only
	if err != nil {
		return nil, fmt.Errorf("open the map at %s: %w", s.path, err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.Flags()&unix.BPF_F_MMAPABLE == 0 || m.ValueSize() != storeEntry || m.MaxEntries() > MaxStored/storeEntry+1 {
		return nil, fmt.Errorf("read the map at %s: it is not one of ours", s.path)
	}
	var value []byte
	err = within(m, unix.PROT_READ, func(memory []byte) error {
		var head storeHeader
		if err := binary.Read(bytes.NewReader(memory), binary.NativeEndian, &head); err != nil {
			return err
		}
		rest := memory[storeHeaderSize:]
		switch {
		case head.Magic != storeMagic:
			return errors.New("it is of another version, or damaged")
		case head.Length > uint64(len(rest)) || sha256.Sum256(rest[:head.Length]) != head.Sum:
			return errors.New("it is damaged")
		}
		value = bytes.Clone(rest[:head.Length])
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the map at %s: %w", s.path, err)
	}
	return value, nil
}

// Remove removes the value, if there is one.
func (s *Store) Remove() error { return removed(s.path) }

func removed(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// within calls do with the memory of m, which is gone afterwards.
func within(m *ebpf.Map, protection int, do func(memory []byte) error) error {
	memory, err := unix.Mmap(m.FD(), 0, int(m.MaxEntries())*storeEntry, protection, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the store into memory: %w", err)
	}
	return errors.Join(do(memory), unix.Munmap(memory))
}

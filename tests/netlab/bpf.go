package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"
)

// BPFObject is a program, map or link in the kernel.
type BPFObject struct {
	Kind string // "program", "map" or "link"
	ID   uint32 // never used again by another of its kind
	Name string // of a link: its program's
}

func (o BPFObject) String() string { return fmt.Sprintf("%s %d (%s)", o.Kind, o.ID, o.Name) }

// Exists says whether the kernel still has the object. It frees one a moment after the last reference is gone.
func (o BPFObject) Exists() bool {
	var object interface{ Close() error }
	var err error
	switch o.Kind {
	case "program":
		object, err = ebpf.NewProgramFromID(ebpf.ProgramID(o.ID))
	case "map":
		// It is not opened: of an array of programs whose last user has just gone the kernel would lose a reference (prog_array_map_clear
		// takes one for work that may be queued already).
		id, err := ebpf.MapGetNextID(ebpf.MapID(o.ID - 1))
		return err == nil && uint32(id) == o.ID
	default:
		object, err = link.NewFromID(link.ID(o.ID))
	}
	if err == nil {
		_ = object.Close()
	}
	return !errors.Is(err, os.ErrNotExist)
}

// Pinned lists what is pinned below a directory of a bpffs: the maps, the links, and the programs that these run.
func Pinned(dir string) ([]BPFObject, error) {
	var all []BPFObject
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		objects, err := pinnedAt(path)
		all = append(all, objects...)
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return all, err
}

func pinnedAt(path string) ([]BPFObject, error) {
	object, err := pin.Load(path, nil)
	if err != nil {
		return nil, err
	}
	defer object.Close()
	switch object := object.(type) {
	case *ebpf.Map:
		info, err := object.Info()
		if err != nil {
			return nil, fmt.Errorf("ask for map %s: %w", path, err)
		}
		id, _ := info.ID()
		return []BPFObject{{"map", uint32(id), info.Name}}, nil
	case link.Link:
		return linkAndProgram(object, path)
	}
	return nil, nil
}

func linkAndProgram(l link.Link, path string) ([]BPFObject, error) {
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("ask for link %s: %w", path, err)
	}
	name := filepath.Base(path)
	if p, err := ebpf.NewProgramFromID(info.Program); err == nil {
		defer p.Close()
		if programInfo, err := p.Info(); err == nil {
			name = programInfo.Name
		}
	}
	return []BPFObject{{"link", uint32(info.ID), name}, {"program", uint32(info.Program), name}}, nil
}

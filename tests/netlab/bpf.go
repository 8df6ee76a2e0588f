package netlab

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// BPFObject is a program, map or link in the kernel.
type BPFObject struct {
	Kind string // "program", "map" or "link"
	ID   uint32
	Name string // of a link: its program's
}

func (o BPFObject) String() string { return fmt.Sprintf("%s %d (%s)", o.Kind, o.ID, o.Name) }

// BPFObjects lists every eBPF program, map and link of the whole machine. What goes while it looks is left out.
func BPFObjects() ([]BPFObject, error) {
	var all []BPFObject
	for _, list := range []func() ([]BPFObject, error){programs, maps, links} {
		objects, err := list()
		if err != nil {
			return nil, fmt.Errorf("list eBPF objects: %w", err)
		}
		all = append(all, objects...)
	}
	return all, nil
}

func programs() (all []BPFObject, _ error) {
	id, err := ebpf.ProgramGetNextID(0)
	for ; err == nil; id, err = ebpf.ProgramGetNextID(id) {
		if name, ok := programName(id); ok {
			all = append(all, BPFObject{"program", uint32(id), name})
		}
	}
	return all, endOfList(err)
}

func programName(id ebpf.ProgramID) (string, bool) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "", false
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", false
	}
	return info.Name, true
}

func maps() (all []BPFObject, _ error) {
	id, err := ebpf.MapGetNextID(0)
	for ; err == nil; id, err = ebpf.MapGetNextID(id) {
		m, openErr := ebpf.NewMapFromID(id)
		if openErr != nil {
			continue
		}
		if info, infoErr := m.Info(); infoErr == nil {
			all = append(all, BPFObject{"map", uint32(id), info.Name})
		}
		_ = m.Close()
	}
	return all, endOfList(err)
}

func links() (all []BPFObject, _ error) {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		info, infoErr := it.Link.Info()
		if infoErr != nil {
			continue
		}
		name, _ := programName(info.Program)
		all = append(all, BPFObject{"link", uint32(it.ID), name})
	}
	return all, it.Err()
}

func endOfList(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

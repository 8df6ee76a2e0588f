package consul

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Ports is a range of TCP ports, both ends included.
type Ports struct{ First, Last uint16 }

func (p Ports) contains(port uint16) bool { return p.First != 0 && port >= p.First && port <= p.Last }

// ports are the mesh ports that instances without a sidecar have. They are kept in a file, so that an instance has the same
// port after a restart. The file is safe to delete: what is registered counts as well. It is not for concurrent use.
type ports struct {
	file  string
	pool  Ports
	given map[string]assignment // by instance ID
}

type assignment struct {
	Port uint16    `json:"port"`
	Used time.Time `json:"used"` // when the instance was last there, to the day
}

type portsFile struct {
	Ports map[string]assignment `json:"ports"`
}

// openPorts reads the file. Without one, or where it cannot be read, none are given yet.
func openPorts(file string, pool Ports) (*ports, error) {
	p := &ports{file: file, pool: pool, given: make(map[string]assignment)}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	var read portsFile
	if err == nil {
		err = json.Unmarshal(text, &read)
	}
	if err != nil {
		return nil, fmt.Errorf("read port assignments in %s: %w: correct the file, or delete it", file, err)
	}
	for id, a := range read.Ports {
		if pool.contains(a.Port) {
			p.given[id] = a
		}
	}
	return p, nil
}

// assign gives each of ids a port: the one it has, the one it is registered with, or a free one. taken are ports that
// others on this node have. One that gets none because all are in use is not in the result.
func (p *ports) assign(ids []string, registered map[string]uint16, taken map[uint16]bool, now time.Time) (map[string]uint16, error) {
	result := make(map[string]uint16, len(ids))
	owner := make(map[uint16]string)
	for id, a := range p.given {
		owner[a.Port] = id
	}
	day := now.UTC().Truncate(24 * time.Hour)
	changed := false
	for _, id := range ids {
		a, have := p.given[id]
		if !have || taken[a.Port] {
			port := registered[id]
			if !p.pool.contains(port) || taken[port] || owner[port] != "" && owner[port] != id {
				port = p.free(ids, owner, taken)
			}
			if port == 0 {
				continue
			}
			delete(p.given, owner[port])
			a.Port, owner[port] = port, id
		}
		result[id] = a.Port
		if now := (assignment{a.Port, day}); p.given[id] != now {
			p.given[id], changed = now, true
		}
	}
	if !changed {
		return result, nil
	}
	return result, p.save()
}

// free finds a port that nobody has, or else the one that was not in use for longest.
func (p *ports) free(ids []string, owner map[uint16]string, taken map[uint16]bool) uint16 {
	var best uint16
	for port := int(p.pool.First); port <= int(p.pool.Last); port++ {
		port := uint16(port)
		id := owner[port]
		switch {
		case taken[port]:
		case id == "":
			return port
		case slices.Contains(ids, id):
		case best == 0 || p.given[id].Used.Before(p.given[owner[best]].Used):
			best = port
		}
	}
	return best
}

// save replaces the file whole.
func (p *ports) save() error {
	text, err := json.MarshalIndent(portsFile{maps.Clone(p.given)}, "", "  ")
	if err == nil {
		err = replace(p.file, append(text, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write port assignments: %w", err)
	}
	return nil
}

func replace(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

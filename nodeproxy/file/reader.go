package file

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/hclfile"
)

const (
	nodesDir  = "nodes"
	configDir = "config"

	// maxFiles and maxBytes bound what a mesh directory may hold.
	maxFiles = 10_000
	maxBytes = 64 << 20
)

// mesh is what the files of a mesh directory say, checked.
type mesh struct {
	instances []*instance
	entries   entries
	problems  []catalog.Problem
}

// reader reads a mesh directory. It collects all errors, so that the operator sees them at once.
type reader struct {
	dir        string
	datacenter string
	mesh       *mesh
	byID       map[[2]string]*instance   // by node and ID
	byKind     map[[2]string]hclfile.Pos // by kind and name
	origins    []hclfile.Pos             // of the intentions
	count      int                       // of files
	bytes      int64
	errs       []error
	known      parts // of the last reading
	parts      parts // of this one
}

func newReader(dir, datacenter string) *reader {
	return &reader{
		dir: dir, datacenter: datacenter, mesh: &mesh{entries: newEntries()},
		byID: make(map[[2]string]*instance), byKind: make(map[[2]string]hclfile.Pos), parts: make(parts),
	}
}

// readMesh reads nodes/ and config/ of the mesh directory dir, but what looks as it did when known was read. Either both are good, or there is an error that
// names file and line of all that is wrong.
func readMesh(dir, datacenter string, known parts) (*mesh, parts, error) {
	if info, err := os.Stat(dir); err != nil {
		return nil, known, fmt.Errorf("read mesh directory: %w: create it, or correct source \"file\" { path }", err)
	} else if !info.IsDir() {
		return nil, known, fmt.Errorf("read mesh directory: %s is not a directory", dir)
	}
	r := newReader(dir, datacenter)
	r.known = known
	for _, entry := range r.list(dir) {
		if entry.Name() != stateJSON && !entry.IsDir() {
			r.misplaced(filepath.Join(dir, entry.Name()), entry)
		}
	}
	r.readNodes()
	r.readConfig()
	r.strangers()
	if err := hclfile.Join(r.errs...); err != nil {
		return nil, r.parts, err
	}
	slices.SortFunc(r.mesh.problems, func(a, b catalog.Problem) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Text, b.Text))
	})
	return r.mesh, r.parts, nil
}

func (r *reader) fail(err error) { r.errs = append(r.errs, err) }

// list is the content of a directory, sorted, without what editors and mounts hide. A directory that is not there is empty.
func (r *reader) list(dir string) []fs.DirEntry {
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.fail(err)
	}
	return slices.DeleteFunc(all, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") })
}

func isDefinition(name string) bool {
	ext := filepath.Ext(name)
	return ext == ".hcl" || ext == ".json"
}

// files reads every .hcl and .json file of a directory; others are no concern of ours, as with Consul.
func (r *reader) files(dir string, read func(*reader, *hclfile.File)) {
	for _, entry := range r.list(dir) {
		if !isDefinition(entry.Name()) {
			continue
		}
		path := filepath.Join(dir, entry.Name())
		info, err := os.Stat(path)
		if err != nil {
			r.fail(err)
			continue
		}
		r.count++
		r.bytes += info.Size()
		if r.count > maxFiles || r.bytes > maxBytes && info.Size() <= hclfile.MaxSize {
			r.fail(hclfile.Pos{File: path}.Errorf("with this file the directory holds more than %d files or %d MiB", maxFiles, maxBytes>>20))
			return
		}
		r.parts[path] = r.part(path, info, read)
		r.merge(r.parts[path])
	}
}

func hasPort(address string) bool {
	host, port, err := net.SplitHostPort(address)
	n, perr := strconv.ParseUint(port, 10, 16)
	return err == nil && perr == nil && host != "" && n > 0
}

// fingerprint changes whenever a file below dir that is read here does. It is never "". It is for changes that no event
// told of.
func fingerprint(dir string) string {
	sum := sha256.New()
	sum.Write([]byte(dir))
	for _, d := range directories(dir) {
		addStamps(sum, d)
	}
	return string(sum.Sum(nil))
}

// addStamps adds the stamps of d's files. Memory is taken for names alone: they are many, and looked at every few seconds.
func addStamps(sum hash.Hash, d string) {
	var names []string
	f, err := os.Open(d)
	if err == nil {
		defer f.Close()
		names, _ = f.Readdirnames(-1)
	}
	slices.Sort(names)
	line := binary.NativeEndian.AppendUint64(append([]byte(d), 0), uint64(len(names)))
	sum.Write(line)
	var at unix.Stat_t
	for _, name := range names {
		if strings.HasPrefix(name, ".") || unix.Fstatat(int(f.Fd()), name, &at, 0) != nil || at.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		line = append(append(line[:0], name...), 0)
		for _, n := range [...]uint64{uint64(at.Size), uint64(at.Mtim.Nano()), uint64(at.Mode), at.Ino} {
			line = binary.NativeEndian.AppendUint64(line, n)
		}
		sum.Write(line)
	}
}

// directories lists the directories below dir that hold what is read here.
func directories(dir string) []string {
	dirs := []string{dir, filepath.Join(dir, caDir), filepath.Join(dir, configDir), filepath.Join(dir, nodesDir)}
	nodes, _ := os.ReadDir(filepath.Join(dir, nodesDir))
	for _, n := range nodes {
		dirs = append(dirs, filepath.Join(dir, nodesDir, n.Name()))
	}
	return slices.DeleteFunc(dirs, func(d string) bool {
		info, err := os.Stat(d)
		return err != nil || !info.IsDir()
	})
}

package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"nodeproxy.io/nodeproxy/hclfile"
)

// Load reads path, a file or a directory whose .hcl and .json files are merged in order of name. All that is wrong is
// in the error, in order of file and line.
func Load(path string) (*Config, error) {
	files, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	raw := defaults()
	keys := &positions{whole: hclfile.Pos{File: path}, found: make(map[string]hclfile.Pos)}
	var errs []error
	cgroups, namespaces := make(map[string]rawCgroup), make(map[string]rawNamespace)
	for _, f := range files {
		raw.Workloads.Cgroup, raw.Workloads.Kubernetes.Namespace = nil, nil // a file replaces the maps; all of them are wanted
		if err := f.Decode(&raw); err != nil {
			errs = append(errs, err)
			continue
		}
		maps.Copy(cgroups, raw.Workloads.Cgroup)
		maps.Copy(namespaces, raw.Workloads.Kubernetes.Namespace)
		errs = append(errs, keys.add(f))
	}
	raw.Workloads.Cgroup, raw.Workloads.Kubernetes.Namespace = cgroups, namespaces
	if err := hclfile.Join(errs...); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	c := checker{raw: &raw, keys: keys}
	cfg := c.config()
	if err := hclfile.Join(c.errs...); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	return cfg, nil
}

func read(path string) ([]*hclfile.File, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: name a file or a directory with --config", err)
	}
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		f, err := hclfile.Read(path)
		return []*hclfile.File{f}, err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []*hclfile.File
	var errs []error
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".hcl" && ext != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		f, err := hclfile.Read(filepath.Join(path, e.Name()))
		files, errs = append(files, f), append(errs, err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no .hcl or .json file", path)
	}
	return files, hclfile.Join(errs...)
}

// positions knows where every key is set, and that none is set in two files.
type positions struct {
	whole hclfile.Pos
	found map[string]hclfile.Pos
}

const separator = "\x00" // never in a key

func (p *positions) add(f *hclfile.File) error {
	m, err := f.Map()
	if err != nil {
		return err
	}
	w := keyWalk{file: f, into: p, inFile: make(map[string]bool)}
	w.block(m, nil, nil)
	return hclfile.Join(w.errs...)
}

// at is where the key of that path is set, or the nearest block around it.
func (p *positions) at(path ...string) hclfile.Pos {
	for ; len(path) > 0; path = path[:len(path)-1] {
		if pos, ok := p.found[strings.Join(path, separator)]; ok {
			return pos
		}
	}
	return p.whole
}

// has says whether the key or block of that path is there.
func (p *positions) has(path ...string) bool {
	_, ok := p.found[strings.Join(path, separator)]
	return ok
}

// keyWalk records the keys of one file.
type keyWalk struct {
	file   *hclfile.File
	into   *positions
	inFile map[string]bool
	errs   []error
}

// block records the keys of m. path is its name, steps the way to it in the file, which has the indexes of repeated
// blocks besides.
func (w *keyWalk) block(m map[string]any, path []string, steps []any) {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		w.value(m[name], append(slices.Clip(path), name), append(slices.Clip(steps), name))
	}
}

func (w *keyWalk) value(v any, path []string, steps []any) {
	switch v := v.(type) {
	case map[string]any:
		w.record(path, steps, false)
		w.block(v, path, steps)
		return
	case []any:
		if blocks, ok := allBlocks(v); ok {
			w.record(path, steps, false)
			for i, b := range blocks {
				w.block(b, path, append(slices.Clip(steps), i))
			}
			return
		}
	}
	w.record(path, steps, true)
}

func (w *keyWalk) record(path []string, steps []any, leaf bool) {
	key, pos := strings.Join(path, separator), w.file.Pos(steps...)
	first, again := w.into.found[key]
	if !again {
		w.into.found[key] = pos
		w.inFile[key] = true
		return
	}
	if leaf && !w.inFile[key] {
		w.errs = append(w.errs, pos.Errorf("%q is set already at %s: remove one of them", strings.Join(path, "."), first))
	}
}

func allBlocks(list []any) ([]map[string]any, bool) {
	blocks := make([]map[string]any, 0, len(list))
	for _, v := range list {
		b, ok := v.(map[string]any)
		if !ok {
			return nil, false
		}
		blocks = append(blocks, b)
	}
	return blocks, len(blocks) > 0
}

// Package hclfile reads configuration in HCL version 1, Consul's dialect, and in JSON, strictly: a key that nothing
// reads, a key set twice and a value of the wrong type are errors that name file and line. No input panics, and the
// size and the nesting of what is read are bounded.
//
// A file is read whole into a File, then decoded into structs. Its only I/O is Read.
package hclfile

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const (
	// MaxSize is the size in bytes above which a file is refused.
	MaxSize = 4 << 20
	// maxDepth is how deeply blocks and lists may nest.
	maxDepth = 64
)

// Pos is a place in a file.
type Pos struct {
	File string
	Line int // from 1; 0 means the whole file
}

func (p Pos) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d", p.File, p.Line)
}

// Errorf makes an *Error at p. The format is fmt.Errorf's.
func (p Pos) Errorf(format string, args ...any) error {
	return &Error{Pos: p, Err: fmt.Errorf(format, args...)}
}

// Error is what is wrong at one place: "mesh.hcl:3: …".
type Error struct {
	Pos Pos
	Err error
}

func (e *Error) Error() string { return e.Pos.String() + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Join is errors.Join with the errors in order of file and line, those without a place first.
func Join(errs ...error) error {
	var flat []error
	for _, err := range errs {
		if list, ok := err.(interface{ Unwrap() []error }); ok {
			flat = append(flat, list.Unwrap()...)
		} else if err != nil {
			flat = append(flat, err)
		}
	}
	slices.SortStableFunc(flat, func(a, b error) int {
		p, q := posOf(a), posOf(b)
		return cmp.Or(cmp.Compare(p.File, q.File), cmp.Compare(p.Line, q.Line))
	})
	return errors.Join(flat...)
}

func posOf(err error) Pos {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Pos
	}
	return Pos{}
}

// File is one file that was read. It is immutable.
type File struct {
	path string
	root *node
}

// Read reads the regular file at path: HCL when its name ends in .hcl, JSON when it ends in .json.
func Read(path string) (*File, error) {
	// O_NONBLOCK: the open of a pipe that somebody left there must not hang.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, Pos{File: path}.Errorf("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse reads data, which is in the format that path's extension names. path is also what errors show.
func Parse(path string, data []byte) (*File, error) {
	whole := Pos{File: path}
	if len(data) > MaxSize {
		return nil, whole.Errorf("larger than %d MiB: split it into several files", MaxSize>>20)
	}
	parse := parseHCL
	switch filepath.Ext(path) {
	case ".hcl":
	case ".json":
		parse = parseJSON
	default:
		return nil, whole.Errorf("neither .hcl nor .json: rename it to say which format it is in")
	}
	root, err := parse(path, data)
	if err != nil {
		return nil, err
	}
	return &File{path: path, root: root}, nil
}

// Path is the path that the file was read from.
func (f *File) Path() string { return f.path }

// Pos finds the place of a value: keys are strings, matched as Consul does, the index among repeated blocks or list elements is an int.
// Where a step does not exist, the place of the last one that does is returned.
//
//	f.Pos("Sources", 2, "Action")
func (f *File) Pos(steps ...any) Pos {
	at := []*node{f.root}
	line := 0
	for _, step := range steps {
		next, l := descend(at, step)
		if len(next) == 0 {
			break
		}
		at, line = next, l
	}
	return Pos{File: f.path, Line: line}
}

// descend finds what step leads to from the repetitions at of one key, and its line.
func descend(at []*node, step any) (found []*node, line int) {
	if i, ok := step.(int); ok {
		elements := flatten(at)
		if i < 0 || i >= len(elements) {
			return nil, 0
		}
		return elements[i : i+1], elements[i].line
	}
	for _, n := range at {
		for _, it := range n.items {
			if fold(it.key) == fold(step.(string)) {
				if found == nil {
					line = it.line
				}
				found = append(found, it.value)
			}
		}
	}
	return found, line
}

// flatten lists the elements of the repetitions of one key: of lists their elements, of all else itself.
func flatten(repetitions []*node) []*node {
	var all []*node
	for _, n := range repetitions {
		if n.kind == list {
			all = append(all, n.list...)
		} else {
			all = append(all, n)
		}
	}
	return all
}

// String is the string that a key at the top of the file holds, matched as Consul does, or "".
func (f *File) String(key string) string {
	found, _ := descend([]*node{f.root}, key)
	if len(found) == 0 {
		return ""
	}
	s, _ := found[0].value.(string)
	return s
}

// Map is the file as generic values: map[string]any, []any, string, int64, float64, bool. A key that is set twice is an
// error, unless each is a block: then it is a list of them.
func (f *File) Map() (map[string]any, error) {
	d := decoder{path: f.path}
	m := d.generic(f.root)
	return m, Join(d.errs...)
}

// fold makes names comparable as Consul compares them: MaxInboundConnections and max_inbound_connections are the same.
func fold(name string) string { return strings.ToLower(strings.ReplaceAll(name, "_", "")) }

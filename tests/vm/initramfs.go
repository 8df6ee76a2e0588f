package vm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// archive writes the "newc" cpio format that the kernel unpacks into its first root file system
// (Documentation/driver-api/early-userspace/buffer-format.rst). The first error sticks and is returned by close.
type archive struct {
	w     *bufio.Writer
	err   error
	inode int
	dirs  map[string]bool
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriter(w), dirs: map[string]bool{"/": true}}
}

const (
	modeDir        = 0o040755
	modeExecutable = 0o100755
)

// addFile adds the file that is at outside, as inside.
func (a *archive) addFile(inside, outside string) {
	content, err := os.ReadFile(outside)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.add(inside, content)
}

// add adds an executable file and the directories above it.
func (a *archive) add(inside string, content []byte) {
	a.dir(path.Dir(inside))
	a.entry(inside, modeExecutable, content)
}

func (a *archive) dir(name string) {
	if a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.entry(name, modeDir, nil)
}

func (a *archive) entry(name string, mode int, content []byte) {
	a.inode++
	name = strings.TrimPrefix(name, "/")
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize with its NUL, check
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.padded([]byte(header + name + "\x00"))
	a.padded(content)
}

// padded writes b and fills up to a multiple of four, which the headers keep since all is written through here.
func (a *archive) padded(b []byte) {
	if a.err != nil {
		return
	}
	if _, a.err = a.w.Write(b); a.err == nil {
		_, a.err = a.w.Write(make([]byte, -len(b)&3))
	}
}

func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}

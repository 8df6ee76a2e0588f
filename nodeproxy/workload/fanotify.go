package workload

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cgroupWatch reports directories of cgroup2 whose attributes changed or that were removed: one fanotify mark on the whole
// filesystem (fanotify(7)). New directories are not reported: a cgroup is born without extended attributes.
type cgroupWatch struct {
	events *os.File
	mount  *os.File // handles are opened relative to it
	buf    []byte
}

// watchCgroups begins to watch. What happens after it returns is reported.
func watchCgroups(mount string) (_ *cgroupWatch, err error) {
	// In non-blocking mode the file is polled, so that close ends a read.
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_REPORT_DFID_NAME, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open fanotify: %w", err)
	}
	w := &cgroupWatch{events: os.NewFile(uintptr(fd), "fanotify"), buf: make([]byte, 16<<10)}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.mount, err = os.Open(mount); err != nil {
		return nil, err
	}
	err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_ATTRIB|unix.FAN_DELETE|unix.FAN_ONDIR, unix.AT_FDCWD, mount)
	if err != nil {
		return nil, fmt.Errorf("watch %s with fanotify: %w", mount, err)
	}
	own, _, err := unix.NameToHandleAt(unix.AT_FDCWD, mount, 0)
	if err != nil {
		return nil, fmt.Errorf("take a file handle of %s: %w", mount, err)
	}
	if _, err := w.path(own); err != nil {
		return nil, fmt.Errorf("open a file handle of %s: %w", mount, err)
	}
	return w, nil
}

// stop ends next, now and later.
func (w *cgroupWatch) stop() { _ = w.events.SetReadDeadline(time.Now()) }

func (w *cgroupWatch) close() {
	w.events.Close()
	if w.mount != nil {
		w.mount.Close()
	}
}

// next waits for changes and returns the directories, each once. lost: there were more than the kernel kept.
func (w *cgroupWatch) next() (dirs map[string]bool, lost bool, err error) {
	n, err := w.events.Read(w.buf)
	if err != nil {
		return nil, false, err
	}
	dirs = make(map[string]bool)
	for rest := w.buf[:n]; len(rest) > 0; {
		var e unix.FanotifyEventMetadata
		if _, err := binary.Decode(rest, binary.NativeEndian, &e); err != nil || int(e.Event_len) < int(unsafe.Sizeof(e)) || int(e.Event_len) > len(rest) {
			return nil, false, fmt.Errorf("read fanotify: an event of %d bytes in %d", e.Event_len, len(rest))
		}
		switch {
		case e.Mask&unix.FAN_Q_OVERFLOW != 0:
			lost = true
		case e.Mask&unix.FAN_ONDIR != 0: // else a file in a cgroup
			if dir := w.dir(rest[e.Metadata_len:e.Event_len]); dir != "" {
				dirs[dir] = true
			}
		}
		rest = rest[e.Event_len:]
	}
	return dirs, lost, nil
}

// dir finds the directory that an event's information record names: struct fanotify_event_info_fid, a struct file_handle
// and a name ("." where the handle is the directory's own). "" is one that is gone together with its parent, whose own
// removal is reported too.
func (w *cgroupWatch) dir(record []byte) string {
	const header, fsid, handleHeader = 4, 8, 8
	if len(record) < header+fsid+handleHeader || record[0] != unix.FAN_EVENT_INFO_TYPE_DFID_NAME {
		return ""
	}
	size := int(binary.NativeEndian.Uint32(record[header+fsid:]))
	kind := int32(binary.NativeEndian.Uint32(record[header+fsid+4:]))
	rest := record[header+fsid+handleHeader:]
	if size > len(rest) {
		return ""
	}
	parent, err := w.path(unix.NewFileHandle(kind, rest[:size]))
	if err != nil {
		return ""
	}
	name, _, _ := bytes.Cut(rest[size:], []byte{0})
	return filepath.Join(parent, string(name))
}

func (w *cgroupWatch) path(handle unix.FileHandle) (string, error) {
	fd, err := unix.OpenByHandleAt(int(w.mount.Fd()), handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}

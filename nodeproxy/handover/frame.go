package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A frame is a header, four bytes of kind and four of length in network order, and a body. What comes with it in the way of
// files is attached to the header.
type kind uint32

const (
	hello    kind = iota + 1 // Self, in JSON; the first of either side
	refused                  // why, in words; the last
	state                    // Estate.State
	snapshot                 // Estate.Snapshot
	files                    // the names of the attached files, in JSON; as many frames as it takes
	whole                    // the Estate is whole
	serving                  // of the newer daemon: it serves
	released                 // of the older one: it has let go
)

// The bounds of bodies, and of files.
var bounds = map[kind]int{hello: 4 << 10, refused: 4 << 10, state: 64 << 20, snapshot: 64 << 20, files: 64 << 10}

const (
	headerSize   = 8
	filesAFrame  = 64      // SCM_MAX_FD is 253
	maxFiles     = 1 << 18 // four listeners in each of 16,384 namespaces, and as many again for DNS
	maxChunkRead = 1 << 20
)

// wire is one end of a hand-over. One goroutine at a time may send, and one receive.
type wire struct{ *net.UnixConn }

// send sends a frame within a time.
func (w wire) send(within time.Duration, k kind, body []byte, attached ...syscall.Conn) error {
	if len(body) > bounds[k] {
		return fmt.Errorf("hand over: %d bytes of frame %d are more than %d", len(body), k, bounds[k])
	}
	if err := w.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(k)), uint32(len(body)))
	err := withFDs(attached, nil, func(fds []int) error {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		n, _, err := w.WriteMsgUnix(head, oob, nil)
		if err == nil && n < len(head) { // the files have gone with the first byte
			_, err = w.Write(head[n:])
		}
		return err
	})
	if err != nil {
		return err
	}
	_, err = w.Write(body)
	return err
}

// withFDs calls f while the descriptors of files cannot be closed. It does not change how they block, as File.Fd would for
// every process that shares them.
func withFDs(conns []syscall.Conn, fds []int, f func(fds []int) error) error {
	if len(conns) == 0 {
		return f(fds)
	}
	raw, err := conns[0].SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = withFDs(conns[1:], append(fds, int(fd)), f) })
	return errors.Join(err, inner)
}

// receive waits for a frame of one of the kinds, for so long, 0 for ever. A frame of the kind refused is an error, *Refused.
func (w wire) receive(within time.Duration, kinds ...kind) (k kind, body []byte, attached []*os.File, err error) {
	deadline := time.Time{}
	if within > 0 {
		deadline = time.Now().Add(within)
	}
	if err := w.SetReadDeadline(deadline); err != nil {
		return 0, nil, nil, err
	}
	head, attached, err := w.header()
	if err == nil {
		k = kind(binary.BigEndian.Uint32(head))
		body, err = w.body(k, int(binary.BigEndian.Uint32(head[4:])))
	}
	switch {
	case err != nil:
	case k == refused:
		err = &Refused{string(body)}
	case !slices.Contains(kinds, k):
		err = fmt.Errorf("hand over: frame %d is out of turn", k)
	case k != files && len(attached) > 0:
		err = fmt.Errorf("hand over: files come with frame %d", k)
	default:
		return k, body, attached, nil
	}
	closeAll(attached)
	return 0, nil, nil, err
}

func (w wire) header() (head []byte, attached []*os.File, err error) {
	head = make([]byte, 0, headerSize)
	oob := make([]byte, unix.CmsgSpace(4*filesAFrame))
	for len(head) < headerSize {
		n, oobn, flags, _, err := w.ReadMsgUnix(head[len(head):headerSize], oob)
		got, errFiles := open(oob[:oobn])
		attached = append(attached, got...)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if flags&unix.MSG_CTRUNC != 0 {
			err = errors.Join(err, errors.New("hand over: there is no room for the files: raise the limit of open files (LimitNOFILE)"))
		}
		if err = errors.Join(err, errFiles); err != nil {
			return nil, attached, err
		}
		head = head[:len(head)+n]
	}
	return head, attached, nil
}

func (w wire) body(k kind, size int) ([]byte, error) {
	if size > bounds[k] {
		return nil, fmt.Errorf("hand over: frame %d announces %d bytes, more than %d", k, size, bounds[k])
	}
	body := make([]byte, 0, min(size, maxChunkRead))
	for len(body) < size { // what is only announced takes no memory
		at := len(body)
		body = slices.Grow(body, min(size-at, maxChunkRead))[:at+min(size-at, maxChunkRead)]
		if _, err := io.ReadFull(w, body[at:]); err != nil {
			return nil, err
		}
	}
	return body, nil
}

// open makes files of the descriptors in a control message.
func open(oob []byte) (all []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("hand over: read files: %w", err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return all, fmt.Errorf("hand over: read files: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			all = append(all, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return all, nil
}

func closeAll(all []*os.File) {
	for _, f := range all {
		f.Close()
	}
}

// sendEstate sends all of e.
func (w wire) sendEstate(e *Estate) error {
	if err := w.send(greeting, state, e.State); err != nil {
		return err
	}
	if err := w.send(greeting, snapshot, e.Snapshot); err != nil {
		return err
	}
	for names := range slices.Chunk(slices.Sorted(maps.Keys(e.Files)), filesAFrame) {
		attached := make([]syscall.Conn, len(names))
		for i, name := range names {
			attached[i] = e.Files[name]
		}
		body, err := json.Marshal(names)
		if err != nil {
			return err
		}
		if err := w.send(greeting, files, body, attached...); err != nil {
			return err
		}
	}
	return w.send(greeting, whole, nil)
}

// receiveEstate receives all of it, or nothing.
func (w wire) receiveEstate() (_ *Estate, err error) {
	e := &Estate{Files: make(Files)}
	defer func() {
		if err != nil {
			e.Files.Close()
		}
	}()
	for {
		k, body, attached, err := w.receive(greeting, state, snapshot, files, whole)
		if err != nil {
			return nil, err
		}
		switch k {
		case state:
			e.State = body
		case snapshot:
			e.Snapshot = body
		case files:
			if err := e.Files.add(body, attached); err != nil {
				return nil, err
			}
		case whole:
			return e, nil
		}
	}
}

func (f Files) add(body []byte, attached []*os.File) error {
	var names []string
	if err := json.Unmarshal(body, &names); err != nil || len(names) != len(attached) || len(f)+len(names) > maxFiles {
		closeAll(attached)
		return fmt.Errorf("hand over: %d files come with %d names, and %d are there: %w", len(attached), len(names), len(f), errors.Join(err, unix.EBADMSG))
	}
	for i, name := range names {
		if f[name] != nil {
			closeAll(attached[i:])
			return fmt.Errorf("hand over: file %q comes twice", name)
		}
		f[name] = attached[i]
	}
	return nil
}

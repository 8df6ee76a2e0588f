package workload

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileUser is as whom a process accesses files.
type fileUser struct {
	uid, gid uint32
	groups   []uint32
}

func fileUserOf(pid string) (u fileUser, err error) {
	text, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return u, fmt.Errorf("see whose process %s is: %w", pid, err)
	}
	numbers := make(map[string][]uint32)
	for line := range strings.Lines(string(text)) {
		name, rest, _ := strings.Cut(line, ":")
		if name != "Uid" && name != "Gid" && name != "Groups" {
			continue
		}
		for field := range strings.FieldsSeq(rest) {
			n, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				return u, fmt.Errorf("see whose process %s is: %w", pid, err)
			}
			numbers[name] = append(numbers[name], uint32(n))
		}
	}
	const forFiles = 3 // after the real, effective and saved one
	if len(numbers["Uid"]) <= forFiles || len(numbers["Gid"]) <= forFiles {
		return u, fmt.Errorf("see whose process %s is: its status does not say", pid)
	}
	return fileUser{numbers["Uid"][forFiles], numbers["Gid"][forFiles], numbers["Groups"]}, nil
}

// do calls f, which must not start goroutines, with u's access to files and no more: without the capabilities that go past
// it, unless u is root.
func (u fileUser) do(f func() error) error {
	self, err := fileUserOf("thread-self")
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	err = u.become()
	if err == nil {
		err = f()
	}
	if back := self.become(); back != nil {
		return errors.Join(err, back) // the thread ends with the goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// become changes the calling thread alone, unlike the functions of Go.
func (u fileUser) become() error {
	groups := append(u.groups[:len(u.groups):len(u.groups)], 0) // never empty
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(u.groups)), uintptr(unsafe.Pointer(&groups[0])), 0); errno != 0 {
		return fmt.Errorf("access files with the groups of user %d: %w: does the daemon have CAP_SETGID?", u.uid, errno)
	}
	for _, c := range []struct {
		call uintptr
		id   uint32
		what string
	}{{unix.SYS_SETFSGID, u.gid, "GID"}, {unix.SYS_SETFSUID, u.uid, "UID"}} {
		const none = ^uintptr(0) // changes nothing: the call tells what is in force, and no error
		_, _, _ = unix.RawSyscall(c.call, uintptr(c.id), 0, 0)
		if now, _, _ := unix.RawSyscall(c.call, none, 0, 0); uint32(now) != c.id {
			return fmt.Errorf("access files as user %d: does the daemon have CAP_SET%s?", u.uid, c.what)
		}
	}
	return nil
}

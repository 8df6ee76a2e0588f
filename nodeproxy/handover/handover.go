// Package handover passes a node from the daemon that runs it to the next one, over a unix socket that only root may use.
//
// The one that comes calls Begin and gets the Estate of the one that is there: its open files, what it knows, and its snapshot
// with the keys, none of which is ever on a disk. From then on the older daemon changes nothing in the kernel, and goes on
// serving. Once the newer one serves too it calls Commit: the older one stops accepting, lets go, and drains; when that is over
// it closes the connection.
//
// Either may die at any moment. The newer one before Commit: the older one goes on as before. The older one, before its
// Estate was read whole: Begin says that nobody is there; after that: the newer one has all it needs, and Commit succeeds.
//
// Where a service manager keeps files for the unit (Store), a daemon that is dead hands over too: its listening sockets and what it
// knew, without a snapshot.
package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Protocol is the version of what is said over the socket. It is raised when an older daemon would misunderstand.
const Protocol = 1

const (
	// greeting is how long the other side has for each step that takes it no work.
	greeting = 10 * time.Second

	// ending is how long a hand-over that has failed may take to be undone.
	ending = 2 * time.Second

	// patience is how long the older daemon waits for the newer one to serve, and changes nothing in the kernel meanwhile.
	patience = 45 * time.Second
)

// Self is what a daemon says of itself.
type Self struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	MapABI   int    `json:"map_abi"`
	Node     string `json:"node"`
	Pins     string `json:"pins"` // state.pins
	PID      int    `json:"-"`    // as the kernel says; 0 where it is not seen from here
}

// Estate is what one daemon leaves to the next.
type Estate struct {
	State    []byte // what it knows, in JSON
	Snapshot []byte // with keys; empty: it has none
	Files    Files
}

// Files are open files by name: sockets, and what else a process holds. Those that Begin returns are *os.File.
type Files map[string]syscall.Conn

// Take removes a file that Begin returned and returns it, nil if there is none of that name. It is the caller's then.
func (f Files) Take(name string) *os.File {
	file, _ := f[name].(*os.File)
	delete(f, name)
	return file
}

// Close closes those that nobody has taken.
func (f Files) Close() {
	for name := range f {
		f.Take(name).Close()
	}
}

// Refused is why the daemon that runs does not hand over. It goes on as before.
type Refused struct{ Why string }

func (r *Refused) Error() string { return "the daemon that runs does not hand over: " + r.Why }

// mismatch says why two daemons cannot hand over to one another, or "".
func mismatch(older, newer Self) string {
	switch {
	case older.Protocol != newer.Protocol:
		return fmt.Sprintf("it is version %s and speaks hand-over %d, and version %s speaks %d: stop it, then start the other",
			older.Version, older.Protocol, newer.Version, newer.Protocol)
	case older.MapABI != newer.MapABI:
		return fmt.Sprintf("it is version %s with map ABI v%d, and version %s has v%d: run a version with map ABI v%d, or stop it and run `nodeproxy cleanup` first",
			older.Version, older.MapABI, newer.Version, newer.MapABI, older.MapABI)
	case older.Node != newer.Node || older.Pins != newer.Pins:
		return fmt.Sprintf("it is node %q with its pins in %s, and this is node %q with %s: set another directory for admin.socket",
			older.Node, older.Pins, newer.Node, newer.Pins)
	}
	return ""
}

// peer checks that the other end is root, and says which process it is.
func peer(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("read the peer's credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("read the peer's credentials: %w", err)
	}
	if cred.Uid != 0 {
		return 0, fmt.Errorf("process %d of uid %d is not root", cred.Pid, cred.Uid)
	}
	return int(cred.Pid), nil
}

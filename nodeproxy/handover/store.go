package handover

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

const (
	maxKept    = 20_000           // files: their names are one variable of the next process's environment, of 128 KiB at most
	notifyTime = 2 * time.Second  // that the service manager has to take a message
	pause      = 30 * time.Second // before it is asked again if it has not

	willFile   = "will" // among the Files of an Estate: the next daemon goes on with the same store
	willPrefix = "W"    // of a will's name in the store
)

// Store is where the service manager keeps files of the unit while it has no process: systemd's file descriptor store
// (sd_notify(3)). They are given to the unit's next process, whatever ended the last one, and closed when the unit stops for
// good. The daemon that has the node is its only writer, one goroutine at a time. A nil Store keeps nothing.
type Store struct {
	manager *net.UnixConn
	given   []*os.File // to this process; nil once Open has looked at them

	has    map[string]kept // by their names in the Estate
	will   *os.File        // nil: none is in the store
	number uint64          // of will, in its name
	state  []byte          // in will
	last   uint64          // the number that was given away last

	hangs error // why the service manager is asked for nothing before again
	again time.Time
}

// kept is a file in the store.
type kept struct {
	Name string `json:"name"` // there
	ID   string `json:"id"`   // which file that is

	conn syscall.Conn // whose it is, if that was looked at
}

// will is kept beside the files: by it a daemon that is dead hands over.
type will struct {
	Self  Self            `json:"self"`
	State json.RawMessage `json:"state"`
	Files map[string]kept `json:"files"`
	Last  uint64          `json:"last"`
}

// FindStore takes what the service manager has kept for this process. It returns nil where there is no service manager.
func FindStore() (*Store, error) {
	at := os.Getenv("NOTIFY_SOCKET")
	if at == "" {
		return nil, nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("reach the service manager's store: %w", err)
	}
	return &Store{manager: conn, given: activation.Files(true)}, nil
}

// Open returns what a daemon that is dead has left to self, nil if that is nothing. The error is why it is not used. What is in
// the store and in no Estate is removed.
func (s *Store) Open(self Self) (*Estate, error) {
	if s == nil || len(s.given) == 0 {
		return nil, nil
	}
	given := make(Files)
	for _, f := range s.given {
		if other := given.Take(f.Name()); other != nil { // names are given once
			other.Close()
		}
		given[f.Name()] = f
	}
	s.given = nil
	w, err := s.read(given)
	if err == nil {
		self.Protocol = Protocol
		if why := mismatch(w.Self, self); why != "" {
			err = errors.New("it is another's: " + why)
		}
	}
	if err != nil {
		err = fmt.Errorf("take over what the service manager has kept: %w", err)
		names := slices.Collect(maps.Keys(given))
		given.Close()
		return nil, errors.Join(err, s.remove(names))
	}
	e := &Estate{State: w.State, Files: make(Files)}
	for name, k := range s.has {
		if f := given.Take(k.Name); f != nil {
			e.Files[name] = f
		} else {
			delete(s.has, name)
		}
	}
	others := slices.Collect(maps.Keys(given))
	given.Close()
	return e, s.remove(others)
}

// read finds the last will, which is the Store's then.
func (s *Store) read(given Files) (w *will, err error) {
	for name := range given {
		n, errNumber := strconv.ParseUint(strings.TrimPrefix(name, willPrefix), 36, 64)
		if strings.HasPrefix(name, willPrefix) && errNumber == nil && n > s.last {
			s.last = n
		}
	}
	if s.last == 0 {
		return nil, errors.New("there is no will")
	}
	return s.goOnFrom(given.Take(willName(s.last)))
}

func willName(n uint64) string { return willPrefix + strconv.FormatUint(n, 36) }

// goOnFrom makes a will, of whose file it takes ownership, the Store's.
func (s *Store) goOnFrom(f *os.File) (*will, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read the will: %w", err), f.Close())
	}
	text := make([]byte, info.Size())
	if _, err := f.ReadAt(text, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("read the will: %w", err), f.Close())
	}
	var w will
	if err := json.Unmarshal(text, &w); err != nil {
		return nil, errors.Join(fmt.Errorf("read the will: %w", err), f.Close())
	}
	s.will, s.number, s.state, s.has, s.last = f, w.Last, w.State, w.Files, w.Last
	return &w, nil
}

// Succeed goes on with the store of the daemon that has handed e over, and has let go.
func (s *Store) Succeed(e *Estate) error {
	f := e.Files.Take(willFile)
	if s == nil || f == nil {
		return nil
	}
	_, err := s.goOnFrom(f)
	return err
}

// Bequeath adds to files what the next daemon goes on by.
func (s *Store) Bequeath(files Files) {
	if s != nil && s.will != nil {
		files[willFile] = s.will
	}
}

// Yield leaves the store to the daemon that has taken over: this Store does nothing any more.
func (s *Store) Yield() {
	if s == nil {
		return
	}
	if s.will != nil {
		s.will.Close()
	}
	s.has, s.will = nil, nil
}

// Keep makes the store hold these files, and the State of self, for the next daemon. What it holds already costs nothing. On error
// it holds less, and the next call tries again; a service manager that hangs holds up one call in 30 s, for 2 s.
func (s *Store) Keep(self Self, state []byte, files Files) error {
	if s == nil {
		return nil
	}
	if s.has == nil {
		s.has = make(map[string]kept)
	}
	var gone []string
	fresh := make(Files)
	for name, f := range files {
		k, has := s.has[name]
		if has && k.conn == f {
			continue
		}
		id, err := identify(f)
		if err != nil {
			return fmt.Errorf("keep %s: %w", name, err)
		}
		if has && k.ID != id {
			gone = append(gone, k.Name)
			delete(s.has, name)
		} else if has {
			k.conn = f
			s.has[name] = k
			continue
		}
		fresh[name] = f
	}
	for name, k := range s.has {
		if files[name] == nil {
			gone = append(gone, k.Name)
			delete(s.has, name)
		}
	}
	if s.will != nil && len(gone) == 0 && len(fresh) == 0 && bytes.Equal(state, s.state) {
		return nil
	}
	return errors.Join(s.add(fresh), s.write(self, state), s.remove(gone))
}

func (s *Store) add(fresh Files) error {
	for name, f := range fresh {
		if len(s.has) >= maxKept {
			return fmt.Errorf("keep more than %d files: connections to some workloads are refused while the unit restarts", maxKept)
		}
		id, err := identify(f)
		if err != nil {
			return fmt.Errorf("keep %s: %w", name, err)
		}
		s.last++
		k := kept{Name: strconv.FormatUint(s.last, 36), ID: id, conn: f}
		if err := s.push(k.Name, f); err != nil {
			return fmt.Errorf("keep %s: %w", name, err)
		}
		s.has[name] = k
	}
	return nil
}

// write puts the will into the store, and then removes the one before.
func (s *Store) write(self Self, state []byte) error {
	self.Protocol = Protocol
	s.last++
	text, err := json.Marshal(will{self, state, s.has, s.last})
	if err != nil {
		return err
	}
	f, err := sealed(text)
	if err != nil {
		return fmt.Errorf("keep what the daemon knows: %w", err)
	}
	if err := s.push(willName(s.last), f); err != nil {
		return errors.Join(fmt.Errorf("keep what the daemon knows: %w", err), f.Close())
	}
	older, number := s.will, s.number
	s.will, s.number, s.state = f, s.last, state
	if older == nil {
		return nil
	}
	return errors.Join(s.remove([]string{willName(number)}), older.Close())
}

// Drop empties the store: what waits at its sockets is reset.
func (s *Store) Drop() error {
	if s == nil {
		return nil
	}
	names := make([]string, 0, len(s.given)+len(s.has)+1)
	for _, f := range s.given {
		names = append(names, f.Name())
		f.Close()
	}
	for _, k := range s.has {
		names = append(names, k.Name)
	}
	if s.will != nil {
		names = append(names, willName(s.number))
		s.will.Close()
	}
	s.given, s.has, s.will = nil, nil, nil
	s.hangs = nil // there is no later
	return s.remove(names)
}

func (s *Store) push(name string, f syscall.Conn) error {
	return withFDs([]syscall.Conn{f}, nil, func(fds []int) error {
		// Nobody has to look for the end of what only this program closes.
		return s.tell("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, unix.UnixRights(fds...))
	})
}

func (s *Store) remove(names []string) error {
	for _, name := range names {
		if err := s.tell("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
			return fmt.Errorf("remove files that are closed: %w", err)
		}
	}
	return nil
}

func (s *Store) tell(text string, oob []byte) error {
	if s.hangs != nil && time.Now().Before(s.again) {
		return s.hangs
	}
	if err := s.manager.SetWriteDeadline(time.Now().Add(notifyTime)); err != nil {
		return err
	}
	raw, err := s.manager.SyscallConn() // WriteMsgUnix refuses a datagram socket that is connected
	if err != nil {
		return err
	}
	var errSend error
	err = raw.Write(func(fd uintptr) bool {
		errSend = unix.Sendmsg(int(fd), []byte(text), oob, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(errSend, unix.EAGAIN)
	})
	s.hangs = nil
	if err := cmp.Or(err, errSend); err != nil {
		err = fmt.Errorf("tell the service manager: %w", err)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.hangs, s.again = err, time.Now().Add(pause)
		}
		return err
	}
	return nil
}

// identify names an open file, of whatever process.
func identify(f syscall.Conn) (id string, err error) {
	err = withFDs([]syscall.Conn{f}, nil, func(fds []int) error {
		var st unix.Stat_t
		err := unix.Fstat(fds[0], &st)
		id = fmt.Sprintf("%x:%x", st.Dev, st.Ino)
		return err
	})
	return id, err
}

// sealed is a file in memory that nobody can change.
func sealed(text []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("nodeproxy", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "nodeproxy")
	_, err = f.Write(text)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

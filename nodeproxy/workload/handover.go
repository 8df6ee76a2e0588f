package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"path"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// Before is the daemon that hands over to this one.
type Before struct {
	Runs  bool                       // else it is dead: nobody serves until this one does
	PID   int                        // 0 where it is not seen from here
	State []byte                     // of its Freeze
	Take  func(name string) *os.File // one of the files of its Freeze, nil for one that it has not: the caller's then
}

// legacy is what a Manager leaves to that of the next daemon beside its files. What it does not have there, or does not know,
// is found anew.
type legacy struct {
	Groups    map[string]uint32   `json:"groups"`
	Workloads map[uint64]Workload `json:"workloads"` // enrolled, by cgroup id
	Routes    []legacyRoute       `json:"routes"`
	Sockets   []legacySocket      `json:"sockets"`
}

// legacyRoute is a way between two namespaces that a path test has shown.
type legacyRoute struct {
	From   uint64         `json:"from"`
	To     uint64         `json:"to"`
	At     netip.AddrPort `json:"at"`
	Source netip.Addr     `json:"source"`
}

// legacySocket is the socket of an upstream; its files are named by its place in the list.
type legacySocket struct {
	Cgroup string `json:"cgroup"`
	Mounts uint64 `json:"mounts"`
	Path   string `json:"path"`
	Mode   uint32 `json:"mode"`
}

// everybody is the weight of who writes into the kernel alone.
const everybody = math.MaxInt32

// pen is for whoever writes into the kernel: many at a time, or nobody while a hand-over is under way, or for good after it.
type pen struct{ *semaphore.Weighted }

func newPen() pen { return pen{semaphore.NewWeighted(everybody)} }

// write calls f, which writes, unless nobody may.
func (p pen) write(f func() error) error {
	if !p.TryAcquire(1) {
		return ErrHandingOver
	}
	defer p.Release(1)
	return f()
}

// ErrHandingOver is why nothing is changed for a moment.
var ErrHandingOver = errors.New("another daemon is just taking over: try again")

// Freeze ends all that this daemon does in the kernel but the heartbeat, and returns what the next one needs of it: its
// State and its files. Connections are served as before. Thaw or Yield follow.
func (m *Manager) Freeze(ctx context.Context) (state []byte, files map[string]syscall.Conn, err error) {
	select {
	case <-m.ready:
	default:
		return nil, nil, errors.New("it does not know its workloads itself yet: see `nodeproxy status`; stop it to start another")
	}
	if err := m.pen.Acquire(ctx, everybody); err != nil {
		return nil, nil, fmt.Errorf("wait until nothing is written into the kernel: %w", err)
	}
	if !m.freeze() {
		m.pen.Release(everybody)
		return nil, nil, errors.New("it is stopping")
	}
	files = m.redirect.Files()
	left := m.legacy(files)
	m.direct.mu.Lock()
	for key, r := range m.direct.routes {
		if r.source.IsValid() {
			left.Routes = append(left.Routes, legacyRoute{key.from, key.to, key.at, r.source})
		}
	}
	m.direct.mu.Unlock()
	if state, err = json.Marshal(left); err != nil {
		return nil, nil, errors.Join(err, m.Thaw())
	}
	return state, files, nil
}

// legacy is what the next daemon needs to know, but for the routes. It adds upstreams to the files.
func (m *Manager) legacy(files map[string]syscall.Conn) legacy {
	left := legacy{Groups: m.groups, Workloads: make(map[uint64]Workload)}
	for _, e := range m.workloads {
		if e.enrolled {
			left.Workloads[e.cgroup] = e.Workload
		}
	}
	for i, key := range slices.SortedFunc(maps.Keys(m.sockets.open), socketKey.compare) {
		listener, directory := socketFiles(i)
		files[listener], files[directory] = m.sockets.open[key].ln, m.sockets.open[key].dir
		left.Sockets = append(left.Sockets, legacySocket{key.cgroup, key.mounts, key.path, key.mode})
	}
	return left
}

// keep has what the next daemon needs kept, for when this one is dead. The node must be this one's.
func (m *Manager) keep() {
	if m.cfg.Keep == nil || m.inherited != nil || m.cfg.Before != nil && m.cfg.Before.Runs && !m.inOffice.Load() {
		return
	}
	files := m.redirect.Sockets()
	state, err := json.Marshal(m.legacy(files))
	if err == nil {
		err = m.cfg.Keep(state, files)
	}
	if text := fmt.Sprint(err); err != nil && text != m.unkept {
		m.log.Warn("connections to some workloads are refused while the service restarts", "error", err)
		m.unkept = text
	}
}

// freeze is false once Run is about to end.
func (m *Manager) freeze() bool {
	m.ending.Lock()
	defer m.ending.Unlock()
	if m.stopped {
		return false
	}
	m.redirect.Freeze()
	m.frozen = true
	return true
}

// Thaw undoes Freeze: what the daemon that was to follow has changed becomes as this one wants it again. Once Run is about to end
// all is left as it is.
func (m *Manager) Thaw() error {
	m.ending.Lock()
	defer m.ending.Unlock()
	if m.stopped {
		return nil
	}
	err := m.redirect.Thaw()
	for _, d := range m.redirect.Audit(true) {
		m.log.Info("what the other daemon had changed in the kernel is as it was", "what", d.What, "cgroup", d.Cgroup, "netns", d.Namespace)
		err = errors.Join(err, d.Err)
	}
	m.pruned = false // of what it has enrolled
	m.frozen = false
	m.pen.Release(everybody)
	m.wake()
	return err
}

// Yield ends Run like its context, but leaves the kernel to the daemon that has taken over. It returns once nothing is
// accepted here any more.
func (m *Manager) Yield() {
	close(m.yielding)
	<-m.yielded
}

// TakeOffice makes this daemon the node's: the one before has let go.
func (m *Manager) TakeOffice() { m.inOffice.Store(true) }

// leaves says whether the kernel is left to another daemon at the end of Run: to one that is taking over, or to the one before,
// which this one has not followed.
func (m *Manager) leaves() bool {
	m.ending.Lock()
	defer m.ending.Unlock()
	m.stopped = true
	if m.frozen {
		return true
	}
	if m.cfg.Before == nil || !m.cfg.Before.Runs || m.inOffice.Load() {
		return false
	}
	m.redirect.Freeze()
	m.frozen = true
	return true
}

// leaveToNext closes what this process alone holds of what it has handed over.
func (m *Manager) leaveToNext() error {
	m.leaveDNS(0, answersBeside)
	return errors.Join(m.redirect.Yield(), m.closeUpstreams(), m.closeListeners(outbound, inbound))
}

// setUp is how long connections have, at most, that were accepted before a restart and are not open yet.
const setUp = time.Second

// leaveToRestart closes what this process alone holds of what is kept for the next one: what arrives from now on waits for that. What
// applications have begun is carried to its destination first, which may be this node. calling has those who accept from applications.
func (m *Manager) leaveToRestart(h Handler, calling *sync.WaitGroup) error {
	err := errors.Join(m.closeUpstreams(), m.closeListeners(outbound))
	calling.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), setUp)
	defer cancel()
	h.Settle(ctx)
	// Until this beat lapses connections are let through to where they wait.
	err = errors.Join(err, m.closeListeners(inbound), m.redirect.Beat())
	m.leaveDNS(0, answersRestart)
	return errors.Join(err, m.redirect.Stop())
}

// closeUpstreams leaves the sockets' files to the next daemon.
func (m *Manager) closeUpstreams() (err error) {
	for _, s := range m.sockets.open {
		err = errors.Join(err, ignoreClosed(s.ln.Close()), s.dir.Close())
	}
	return err
}

func socketFiles(i int) (listener, directory string) {
	return fmt.Sprintf("upstream/%d/listener", i), fmt.Sprintf("upstream/%d/directory", i)
}

// inheritance is what a Manager has of the daemon before, until it has settled.
type inheritance struct {
	workloads map[uint64]Workload       // by cgroup id
	sockets   map[socketKey]*leftSocket // of upstreams
	serve     []func()                  // begin to accept, once it is known whose connections are
}

type leftSocket struct{ listener, directory *os.File }

func (s *leftSocket) close() {
	for _, f := range []*os.File{s.listener, s.directory} {
		if f != nil {
			f.Close()
		}
	}
}

// inherit takes over what the daemon before has left.
func (m *Manager) inherit(before *Before) error {
	var left legacy
	if err := json.Unmarshal(before.State, &left); err != nil {
		return fmt.Errorf("read what the daemon before knows: %w", err)
	}
	maps.Copy(m.groups, left.Groups)
	for _, r := range left.Routes {
		m.direct.routes[routeKey{r.From, r.To, r.At}] = &route{source: r.Source}
	}
	m.inherited = &inheritance{workloads: left.Workloads, sockets: make(map[socketKey]*leftSocket)}
	for i, s := range left.Sockets {
		listener, directory := socketFiles(i)
		m.inherited.sockets[socketKey{s.Cgroup, s.Mounts, s.Path, s.Mode}] = &leftSocket{before.Take(listener), before.Take(directory)}
	}
	return nil
}

// sameWorkload is the kernel's number of the workload that the daemon before has enrolled e's cgroup as, 0 if it is another
// one now: connections on their way bear it.
func (m *Manager) sameWorkload(e *entry, enrolled uint32) uint32 {
	if m.inherited == nil {
		return 0
	}
	w := m.inherited.workloads[e.cgroup]
	if w.ID != enrolled || w.Cgroup != e.Cgroup || !slices.Equal(w.Services(), e.Services()) || w.Mesh != e.Mesh || w.Proxied != e.Proxied {
		return 0
	}
	return w.ID
}

// begin calls serve, or has settle call it.
func (m *Manager) begin(serve func()) {
	if m.inherited == nil {
		serve()
		return
	}
	m.inherited.serve = append(m.inherited.serve, serve)
}

// settle begins to accept what arrives at the listeners of the daemon before, now that the workloads are known. What nobody
// needs any more is closed.
func (m *Manager) settle() {
	if m.inherited == nil {
		return
	}
	if m.cfg.Settled != nil {
		defer m.cfg.Settled()
	}
	for _, serve := range m.inherited.serve {
		serve()
	}
	for _, s := range m.inherited.sockets {
		s.close()
	}
	m.inherited = nil
}

// inheritSocket is the socket of an upstream that the daemon before has made, nil if there is none of its that is still there.
func (m *Manager) inheritSocket(key socketKey, user fileUser) *upstreamSocket {
	if m.inherited == nil || m.inherited.sockets[key] == nil {
		return nil
	}
	left := m.inherited.sockets[key]
	delete(m.inherited.sockets, key)
	s := &upstreamSocket{key: key, base: path.Base(key.path), user: user, dir: left.directory}
	if left.listener == nil || left.directory == nil || unix.Fstatat(int(s.dir.Fd()), s.base, &s.node, unix.AT_SYMLINK_NOFOLLOW) != nil || s.node.Mode&unix.S_IFMT != unix.S_IFSOCK {
		left.close()
		return nil
	}
	ln, err := net.FileListener(left.listener)
	left.listener.Close()
	if err != nil {
		left.directory.Close()
		return nil
	}
	s.ln = ln.(*net.UnixListener)
	return s
}

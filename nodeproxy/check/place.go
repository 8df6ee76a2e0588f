package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// place is where a workload's processes run: a cgroup at or below the workload's, and one of its network namespaces.
type place struct {
	cgroup string
	inode  uint64   // of the network namespace
	netns  *os.File // the same; the owner of the place closes it
}

// places finds one place for each network namespace of the workload in cgroup. The cgroups in inner, and what is below
// them, are other workloads'. The caller closes the places.
func places(cgroup string, inner []string) ([]place, error) {
	found := make(map[uint64]place)
	err := filepath.WalkDir(cgroup, func(dir string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // it is gone meanwhile
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		case slices.Contains(inner, dir):
			return fs.SkipDir
		}
		pids, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // none in a threaded cgroup or one that is gone
		for pid := range strings.FieldsSeq(string(pids)) {
			addPlace(found, dir, pid)
		}
		return nil
	})
	all := make([]place, 0, len(found))
	for _, p := range found {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b place) int { return strings.Compare(a.cgroup, b.cgroup) })
	return all, err
}

func addPlace(found map[uint64]place, dir, pid string) {
	netns, err := os.Open("/proc/" + pid + "/ns/net")
	if err != nil {
		return // the process has ended
	}
	var st unix.Stat_t
	if unix.Fstat(int(netns.Fd()), &st) != nil || found[st.Ino].netns != nil {
		_ = netns.Close()
		return
	}
	found[st.Ino] = place{dir, st.Ino, netns}
}

// processTimeout bounds a canary process, with all its errands.
const processTimeout = 20 * time.Second

// run runs the errands in a process of its own, which has left when run returns, or when this process ends.
//
// The process is born in the network namespace: in the cgroup and another namespace it would look like the workload's, which
// then would be protected there too. It is moved to the cgroup once it runs, and not born there: nothing could end the
// birth of a process in a cgroup that is frozen.
func (p place) run(ctx context.Context, errands []errand) (pid int, outcomes []outcome, err error) {
	ctx, cancel := context.WithTimeout(ctx, processTimeout)
	defer cancel()
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", CanaryCommand)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // Ctrl-C is for us to pass on
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, nil, fmt.Errorf("start a process: %w", err)
	}
	runtime.LockOSThread() // Pdeathsig comes when the thread that has forked ends
	defer runtime.UnlockOSThread()
	if err := p.start(cmd); err != nil {
		return 0, nil, fmt.Errorf("start a process: %w", err)
	}
	err = p.brief(cmd.Process.Pid, in, errands)
	if err != nil {
		cancel()
	}
	switch ended := errors.Join(in.Close(), cmd.Wait(), text(complaint.String())); {
	case err != nil:
		return 0, nil, err
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return 0, nil, fmt.Errorf("run a process in cgroup %s: it did not end within %s: is the cgroup frozen, or short of CPU?", p.cgroup, processTimeout)
	case ended != nil:
		return 0, nil, fmt.Errorf("run a process in cgroup %s: %w", p.cgroup, ended)
	}
	if err := json.Unmarshal(out.Bytes(), &outcomes); err != nil {
		return 0, nil, fmt.Errorf("read what the process in cgroup %s says: %w", p.cgroup, err)
	}
	return cmd.Process.Pid, outcomes, nil
}

// start starts cmd in the network namespace. The caller has locked its thread, which stays so if it cannot come back.
func (p place) start(cmd *exec.Cmd) error {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	if err := unix.Setns(int(p.netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	err = cmd.Start()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		runtime.LockOSThread() // once more than it is unlocked
		return errors.Join(err, fmt.Errorf("leave the network namespace: %w", back))
	}
	return err
}

// brief moves a canary process to the place and tells it what to do.
func (p place) brief(pid int, in io.WriteCloser, errands []errand) error {
	if err := os.WriteFile(filepath.Join(p.cgroup, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		return fmt.Errorf("move a process to cgroup %s: %w: is this root, and does its pids.max leave room?", p.cgroup, err)
	}
	if err := json.NewEncoder(in).Encode(errands); err != nil {
		return fmt.Errorf("tell a process in cgroup %s what to do: %w", p.cgroup, err)
	}
	return nil
}

// text is s as an error, nil for none.
func text(s string) error {
	if s = strings.TrimSpace(s); s == "" {
		return nil
	}
	return errors.New(s)
}

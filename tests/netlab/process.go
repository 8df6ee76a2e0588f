package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pipeDelay bounds how long output is read on after a process has ended while a child of its holds the pipe.
const pipeDelay = 2 * time.Second

// Command is a process to start.
type Command struct {
	Path string // found through PATH if it has no slash
	Args []string
	Env  []string // added to the caller's environment
	Dir  string

	Namespace *Namespace // nil: the one in which the Lab was made
	Cgroup    *Cgroup    // nil: the caller's

	Stdin  io.Reader
	Stdout io.Writer // nil: into Output
	Files  []*os.File
	UID    uint32 // 0 stays root; the group is the same number
}

// Process is a running command. It is killed when the Lab is closed or the Lab's process ends.
type Process struct {
	cmd    *exec.Cmd
	output *output
	done   chan struct{}
	err    error // valid once done is closed
}

// Start starts c in its cgroup and network namespace: the cgroup is joined by the clone itself, so no instruction of the
// program runs outside it.
func (l *Lab) Start(c Command) (*Process, error) {
	p := &Process{cmd: exec.Command(c.Path, c.Args...), output: newOutput(), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Dir, p.cmd.Stdin, p.cmd.ExtraFiles = c.Dir, c.Stdin, c.Files
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	if c.Stdout != nil {
		p.cmd.Stdout = c.Stdout
	}
	p.cmd.WaitDelay = pipeDelay
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if c.UID != 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.UID, Gid: c.UID}
	}
	if c.Cgroup != nil {
		dir, err := os.Open(c.Cgroup.path)
		if err != nil {
			return nil, fmt.Errorf("start %s: open its cgroup: %w", c.Path, err)
		}
		defer dir.Close()
		p.cmd.SysProcAttr.UseCgroupFD, p.cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("start %s: the lab is closed", c.Path)
	}
	if err := l.starter.start(p.cmd, c.Namespace); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	go p.reap()
	l.process = append(l.process, p)
	return p, nil
}

// Run starts c, waits for it, and returns its output. On failure the error quotes the output.
func (l *Lab) Run(ctx context.Context, c Command) (string, error) {
	p, err := l.Start(c)
	if err != nil {
		return "", err
	}
	err = p.Wait(ctx)
	if err != nil {
		p.Kill()
	}
	return p.Output(), err
}

func (p *Process) reap() {
	p.err = p.cmd.Wait()
	p.output.end()
	close(p.done)
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Output is what the process has written so far to stderr and, unless it went elsewhere, stdout.
func (p *Process) Output() string { return p.output.String() }

// Signal sends sig to the process.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill kills the process and its process group with SIGKILL and waits until it is reaped.
func (p *Process) Kill() {
	select {
	case <-p.done: // its id may belong to another by now
		return
	default:
		_ = unix.Kill(-p.PID(), unix.SIGKILL) // ESRCH: it ended by itself
	}
	<-p.done
}

// Wait waits for the process to end. The error says how it ended and quotes the output, or that ctx ended first.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w; its output:\n%s", p.cmd.Path, context.Cause(ctx), p.Output())
	}
	if p.err != nil && !errors.Is(p.err, exec.ErrWaitDelay) {
		return fmt.Errorf("run %s: %w; its output:\n%s", strings.Join(p.cmd.Args, " "), p.err, p.Output())
	}
	return nil
}

// ExitCode is the exit status of a process that has ended, -1 if a signal ended it or it still runs.
func (p *Process) ExitCode() int {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	default:
		return -1
	}
}

// Await repeats check until it returns nil. If ctx ends first, or the process does, the error has the end of its output.
func (p *Process) Await(ctx context.Context, what string, check func() error) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.Done():
			return fmt.Errorf("wait until %s: process %d has ended; its output:\n%s", what, p.PID(), p.Tail())
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w: %w; the output of process %d:\n%s", what, context.Cause(ctx), err, p.PID(), p.Tail())
		}
	}
}

// pollInterval is how often Await checks.
const pollInterval = 50 * time.Millisecond

// Tail is the end of Output.
func (p *Process) Tail() string {
	text := p.Output()
	return text[max(0, len(text)-3000):]
}

// WaitOutput waits until text appears in Output. It fails when the process ends without it.
func (p *Process) WaitOutput(ctx context.Context, text string) error {
	for {
		seen, grown := p.output.snapshot()
		if strings.Contains(seen, text) {
			return nil
		}
		if grown == nil {
			return fmt.Errorf("wait for %q: %s ended; its output:\n%s", text, p.cmd.Path, seen)
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return fmt.Errorf("wait for %q from %s: %w; its output:\n%s", text, p.cmd.Path, context.Cause(ctx), seen)
		}
	}
}

// output collects what a process writes and announces every growth.
type output struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{} // closed and replaced by every write; nil after the end
}

func newOutput() *output { return &output{grown: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.grown != nil {
		close(o.grown)
		o.grown = make(chan struct{})
	}
	return o.buf.Write(b)
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.grown)
	o.grown = nil
}

func (o *output) String() string {
	s, _ := o.snapshot()
	return s
}

func (o *output) snapshot() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String(), o.grown
}

// starter is the one thread that forks the lab's processes. It does nothing else and ends last: the kernel sends the
// parent-death signal when the *thread* that forked ends, and a thread of the Go scheduler may end at any time.
type starter struct {
	jobs chan func()
	done chan struct{}
	home *os.File
}

func newStarter() *starter {
	s := &starter{jobs: make(chan func()), done: make(chan struct{})}
	ready := make(chan struct{})
	go func() {
		defer close(s.done)
		runtime.LockOSThread() // the thread's namespace is whatever the last start needed
		s.home, _ = os.Open("/proc/thread-self/ns/net")
		close(ready)
		for job := range s.jobs {
			job()
		}
		// The process's first thread cannot end with its goroutine, and would hold the last namespace for ever.
		if s.enter(nil) == nil {
			runtime.UnlockOSThread()
		}
	}()
	<-ready
	return s
}

func (s *starter) start(cmd *exec.Cmd, ns *Namespace) error {
	result := make(chan error, 1)
	s.jobs <- func() {
		err := s.enter(ns)
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}
	return <-result
}

func (s *starter) enter(ns *Namespace) error {
	if ns != nil {
		return ns.enter()
	}
	if err := unix.Setns(int(s.home.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("return to the first network namespace: %w", err)
	}
	return nil
}

func (s *starter) stop() error {
	close(s.jobs)
	<-s.done
	return s.home.Close()
}

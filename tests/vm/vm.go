// Package vm runs programs under other kernels than this machine's: it boots a stock Debian kernel in QEMU, with an
// initramfs that holds nothing but the programs, and reports what they printed and how they ended.
//
// The processor is emulated (TCG), which needs neither root nor KVM and is the same everywhere; programs run several times
// slower than outside. Nothing of a machine remains after Run but the kernel, which is kept in the user's cache.
package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const (
	emulator = "qemu-system-x86_64"
	// killDelay bounds how long the console is read on after the emulator was killed.
	killDelay = 5 * time.Second
)

// prerequisites are the commands that this package runs, and the Debian packages that have them.
var prerequisites = [...]struct{ command, pkg string }{
	{emulator, "qemu-system-x86"}, {"xz", "xz-utils"}, {"dpkg-deb", "dpkg"}, {"apt-get", "apt"}, {"apt-cache", "apt"},
}

// Missing names the Debian packages that this package needs and that are not installed. It is nil when all is there.
func Missing() []string {
	var missing []string
	for _, p := range prerequisites {
		if _, err := exec.LookPath(p.command); err != nil {
			missing = append(missing, fmt.Sprintf("%s (apt-get install --no-install-recommends %s)", p.command, p.pkg))
		}
	}
	return missing
}

// Machine is what to run, and on what.
type Machine struct {
	Kernel   *Kernel
	Modules  []string          // loaded before the programs, with what they depend on
	Init     string            // path of the built program tests/vm/guest
	Files    map[string]string // path inside → path of a file outside; all are executable
	Programs []Program         // run in this order, all of them even if one fails
}

// Run boots the machine in dir, which it fills, and copies its console to out, line by line. It returns nil if every
// program exited with status 0, ctx's cause if that ended first, and else an error that says what went wrong inside. The
// emulator does not outlive this process.
func (m Machine) Run(ctx context.Context, dir string, out io.Writer) error {
	initramfs := filepath.Join(dir, "initramfs")
	if err := m.writeInitramfs(initramfs); err != nil {
		return err
	}
	// panic=-1 and -no-reboot: a kernel that panics, oopses or warns ends the emulator at once.
	cmd := exec.CommandContext(ctx, emulator, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", m.Kernel.image(), "-initrd", initramfs,
		"-append", "console=ttyS0 quiet oops=panic panic_on_warn=1 panic=-1")
	cmd.WaitDelay = killDelay
	cmd.Stderr = out
	// The signal comes when the thread that started the emulator ends, which this keeps until Run returns.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	console, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("boot %s: %w", m.Kernel.Package, err)
	}
	var verdict error
	if err = cmd.Start(); err == nil {
		verdict = readConsole(console, out)
		err = cmd.Wait()
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err != nil:
		err = fmt.Errorf("%s: %w", emulator, err)
	default:
		err = verdict
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", m.Kernel.Package, err)
	}
	return nil
}

// readConsole copies the console until its end and returns what the guest's last line says. The kernel may add lines.
func readConsole(console io.Reader, out io.Writer) error {
	verdict := errors.New("the machine ended without the guest's last line; its console says why")
	lines := bufio.NewScanner(console)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(out, line)
		if said, ok := strings.CutPrefix(line, lastLine); ok {
			verdict = errors.New(said)
			if said == success {
				verdict = nil
			}
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read the console: %w", err)
	}
	return verdict
}

// writeInitramfs writes what the machine boots from.
func (m Machine) writeInitramfs(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	defer f.Close()
	archive := newArchive(f)
	plan := Plan{Release: m.Kernel.Release, Programs: m.Programs}
	modules, err := m.Kernel.modules(m.Modules)
	if err != nil {
		return err
	}
	for _, module := range modules {
		inside := "/modules/" + module.name + ".ko"
		archive.add(inside, module.content)
		plan.Modules = append(plan.Modules, inside)
	}
	text, err := json.Marshal(plan)
	if err != nil {
		return fmt.Errorf("write plan: %w", err)
	}
	archive.add(planPath, text)
	archive.addFile("/init", m.Init)
	for inside, outside := range m.Files {
		archive.addFile(inside, outside)
	}
	if err := archive.close(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return f.Close()
}

// Command guest is the first and only process of a machine of package vm: it makes the system that the programs expect,
// runs them, says how they ended, and switches the machine off.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nodeproxy.io/tests/vm"
)

// pipeDelay bounds how long output is read on after a program has ended while a child of its holds the pipe.
const pipeDelay = 5 * time.Second

func main() {
	fmt.Println(vm.LastLine(run()))
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1) // tcdrain(3): the last line must get out
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Println("power off:", err) // and the kernel panics, because its first process ends
}

func run() error {
	plan, err := vm.ReadPlan()
	if err != nil {
		return err
	}
	if err := mountAll(); err != nil {
		return err
	}
	if err := kernelIs(plan.Release); err != nil {
		return err
	}
	for _, module := range plan.Modules {
		if err := load(module); err != nil {
			return err
		}
	}
	if err := loopback(); err != nil {
		return err
	}
	var errs []error
	for _, program := range plan.Programs {
		errs = append(errs, start(program))
	}
	return errors.Join(errs...)
}

func mountAll() error {
	for _, m := range []struct{ fstype, target, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/tmp", "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"bpf", "/sys/fs/bpf", "mode=0700"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, 0, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	return nil
}

func kernelIs(release string) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("ask for the kernel's release: %w", err)
	}
	running := unix.ByteSliceToString(name.Release[:])
	fmt.Printf("=== Linux %s, %s\n", running, unix.ByteSliceToString(name.Version[:]))
	if running != release {
		return fmt.Errorf("this kernel is %s, not %s", running, release)
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		return fmt.Errorf("load module %s: %w", module, err)
	}
	return nil
}

func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// start runs the program to its end. It sees a pipe and no terminal.
func start(program vm.Program) error {
	fmt.Println("=== run", program)
	began := time.Now()
	console := struct{ io.Writer }{os.Stdout}
	cmd := exec.Command(program.Args[0], program.Args[1:]...)
	cmd.Env = append([]string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp"}, program.Env...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = "/tmp", console, console, pipeDelay
	err := cmd.Run()
	fmt.Printf("=== done %s, after %s, with %s\n", program, time.Since(began).Round(time.Second/10), cmd.ProcessState)
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	return nil
}

package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"nodeproxy.io/tests/netlab"
)

// proxies are the processes that carry a connection, by the cgroups in which they run alone.
type proxies []string

// proxiesOf finds the cgroups of processes.
func proxiesOf(processes ...*netlab.Process) (proxies, error) {
	root, err := netlab.Cgroup2()
	if err != nil {
		return nil, err
	}
	var all proxies
	for _, p := range processes {
		name := fmt.Sprintf("/proc/%d/cgroup", p.PID())
		below, err := field(name, "0::")
		if err != nil {
			return nil, err
		}
		all = append(all, filepath.Join(root, below))
	}
	return all, nil
}

// cpu is the processor time that all of them have used: the kernel counts it per cgroup to the microsecond
// (cgroup-v2.rst, cpu.stat). Interrupts are in nobody's.
func (all proxies) cpu() (time.Duration, error) {
	var total time.Duration
	for _, dir := range all {
		n, err := number(filepath.Join(dir, "cpu.stat"), "usage_usec")
		if err != nil {
			return 0, err
		}
		total += time.Duration(n) * time.Microsecond
	}
	return total, nil
}

// resident is the memory of each, in bytes (proc_pid_status(5), VmRSS).
func (all proxies) resident() ([]uint64, error) {
	var each []uint64
	for _, dir := range all {
		pids, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return nil, fmt.Errorf("list the processes of a proxy: %w", err)
		}
		var sum uint64
		for pid := range strings.FieldsSeq(string(pids)) {
			kib, err := number("/proc/"+pid+"/status", "VmRSS:")
			if err != nil {
				return nil, err
			}
			sum += kib << 10
		}
		each = append(each, sum)
	}
	return each, nil
}

// number is the first number after prefix.
func number(file, prefix string) (uint64, error) {
	text, err := field(file, prefix)
	if err != nil {
		return 0, err
	}
	text, _, _ = strings.Cut(strings.TrimSpace(text), " ")
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s of %s: %w", prefix, file, err)
	}
	return n, nil
}

// field is the rest of the first line that begins with prefix.
func field(file, prefix string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, found := strings.CutPrefix(lines.Text(), prefix); found {
			return rest, nil
		}
	}
	return "", fmt.Errorf("read %s: it has no %q", file, prefix)
}

// ticks is how finely /proc/stat counts, on every architecture (proc_stat(5), USER_HZ).
const ticks = 100

// elsewhere is the processor time of the whole machine outside the labs so far: of other processes (interrupts left out)
// and of other machines on the same host ("steal").
func elsewhere(labs []*lab) (time.Duration, error) {
	line, err := field("/proc/stat", "cpu ")
	if err != nil {
		return 0, err
	}
	var user, nice, system, idle, iowait, irq, softirq, steal uint64
	if _, err := fmt.Sscan(line, &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		return 0, fmt.Errorf("read /proc/stat: %w", err)
	}
	var ours proxies
	for _, l := range labs {
		ours = append(ours, l.Cgroup().Path())
	}
	used, err := ours.cpu()
	return time.Duration(user+nice+system+steal)*time.Second/ticks - used, err
}

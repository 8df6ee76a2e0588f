package main

import (
	"context"
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is where and of what the numbers are.
type machine struct {
	Processor string `json:"processor"`
	Cores     int    `json:"cores"`
	MemoryMiB uint64 `json:"memory_mib"`
	Kernel    string `json:"kernel"`
	Go        string `json:"go"`
	Nodeproxy string `json:"nodeproxy"`

	// Others is the share of the processors that others used meanwhile: what it is worth to compare absolute values.
	Others float64 `json:"others_share"`
}

func (b *bench) machine(ctx context.Context) (machine, error) {
	m, err := thisMachine()
	if err != nil {
		return m, err
	}
	status, err := b.labs[0].Daemons[0].Admin().Status(ctx)
	if err != nil {
		return m, err
	}
	m.Nodeproxy = status.Version
	return m, nil
}

// thisMachine is all of it but nodeproxy.
func thisMachine() (machine, error) {
	m := machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Processor: "unknown (" + runtime.GOARCH + ")"}
	if name, err := field("/proc/cpuinfo", "model name"); err == nil { // not every architecture names it
		m.Processor = strings.TrimLeft(name, "\t: ")
	}
	kib, err := number("/proc/meminfo", "MemTotal:")
	if err != nil {
		return m, err
	}
	m.MemoryMiB = kib >> 10
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, fmt.Errorf("ask for the kernel's version: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(name.Release[:])
	return m, nil
}

func (m *machine) markdown() string {
	return m.header() + fmt.Sprintf("- other work on the machine meanwhile: %.0f %% of its processors\n", 100*m.Others)
}

func (m *machine) header() string {
	return fmt.Sprintf("- machine: %s, %d cores, %d MiB\n- kernel: %s\n- nodeproxy %s, built with %s\n",
		m.Processor, m.Cores, m.MemoryMiB, m.Kernel, m.Nodeproxy, m.Go)
}

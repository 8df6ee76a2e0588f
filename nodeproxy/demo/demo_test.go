package demo_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/demo"
	"nodeproxy.io/tests/netlab"
)

const patience = 2 * time.Minute

// binary builds nodeproxy for a test.
func binary(t *testing.T) string {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: builds nodeproxy and shows a mesh")
	}
	path := filepath.Join(t.TempDir(), "nodeproxy")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, "nodeproxy.io/cmd/nodeproxy").CombinedOutput(); err != nil {
		t.Fatalf("build nodeproxy: %v\n%s", err, out)
	}
	return path
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestEveryClaimOfTheDemonstrationHolds(t *testing.T) {
	cmd := exec.CommandContext(testContext(t), binary(t), "demo")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nodeproxy demo: %v\n%s", err, out)
	}
	if n := strings.Count(string(out), "✓"); n != 13 || strings.Contains(string(out), "✗") {
		t.Errorf("%d claims hold, not 13:\n%s", n, out)
	}
	assertNothingLeft(t, cmd.Process.Pid)
}

func TestAnInterruptedDemonstrationLeavesNothingBehind(t *testing.T) {
	cmd := exec.CommandContext(testContext(t), binary(t), "demo")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var interrupted time.Time
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.Contains(lines.Text(), "2. Reach a service") {
			interrupted = time.Now()
			_ = cmd.Process.Signal(os.Interrupt)
		}
		if strings.Contains(lines.Text(), "✗") {
			t.Errorf("a claim is said not to hold: %s", lines.Text())
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted demonstration reports success")
	}
	if took := time.Since(interrupted); took > 10*time.Second {
		t.Errorf("it took %v to end", took)
	}
	assertNothingLeft(t, cmd.Process.Pid)
}

// assertNothingLeft looks for mounts, files, cgroups and processes of the demonstration that ran as pid.
func assertNothingLeft(t *testing.T, pid int) {
	t.Helper()
	name := fmt.Sprintf("np-%d-", pid)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), name) {
		t.Errorf("there remains a mount:\n%s", mounts)
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		if text, _ := os.ReadFile(path); strings.Contains(string(text), name) {
			t.Errorf("there remains a process: %q", text)
		}
	}
	root, err := netlab.Cgroup2()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{os.TempDir(), root} {
		if left, _ := filepath.Glob(filepath.Join(dir, name+"*")); len(left) > 0 {
			t.Errorf("there remain %v", left)
		}
	}
}

// TestAClaimThatDoesNotHoldIsAnError replaces the client by one that lies about its address.
func TestAClaimThatDoesNotHoldIsAnError(t *testing.T) {
	real := binary(t)
	liar := filepath.Join(t.TempDir(), "liar")
	script := fmt.Sprintf("#!/bin/sh\nif [ \"$2\" = get ]; then %s \"$@\" | sed s/caller=.*/caller=203.0.113.1/; else exec %s \"$@\"; fi\n", real, real)
	if err := os.WriteFile(liar, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	err := demo.Run(testContext(t), demo.Config{Out: io.Discard, Binary: liar})
	if !errors.Is(err, demo.ErrClaims) {
		t.Errorf("the error is %v", err)
	}
}

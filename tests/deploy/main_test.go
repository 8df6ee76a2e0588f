// Package deploy installs what "make dist" makes as an operator would, below a real systemd, and looks at what it is made of.
package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// The releases under test, made once: the directories of two versions, and the program that workloads run.
var built struct{ first, second, app string }

const (
	firstVersion  = "1.0.0"
	secondVersion = "1.1.0"
)

func TestMain(m *testing.M) { os.Exit(build(m)) }

func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "nodeproxy-deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	built.first, built.second, built.app = filepath.Join(dir, "first"), filepath.Join(dir, "second"), filepath.Join(dir, "app")
	if os.Geteuid() != 0 { // every test will say so itself
		return m.Run()
	}
	for _, args := range [][]string{
		{"build", "-o", built.app, "nodeproxy.io/tests/e2e/app"},
		dist(built.first, firstVersion), dist(built.second, secondVersion),
	} {
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "go %v: %v\n%s", args, err, out)
			return 1
		}
	}
	return m.Run()
}

// dist is how "make dist" makes a release, for this machine's architecture alone.
func dist(to, version string) []string {
	return []string{"-C", "../../deploy/dist", "run", ".", "-out", to, "-version", version, "-commit", "0123456789ab", "-time", "1700000000", "-arch", runtime.GOARCH}
}

// Package e2e runs nodeproxy as an operator would, on two nodes made of network namespaces, with unmodified programs as
// workloads, and asserts what they, a stranger and the wire get to see.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"nodeproxy.io/tests/netlab"
)

// programs are built once for all tests of the package.
var programs struct{ nodeproxy, app string }

func TestMain(m *testing.M) {
	os.Exit(build(m))
}

func build(m *testing.M) int {
	if len(netlab.Missing()) > 0 { // every test will say so itself
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "nodeproxy-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // some applications do not run as root
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	programs.nodeproxy, programs.app = filepath.Join(dir, "nodeproxy"), filepath.Join(dir, "app")
	for path, args := range map[string][]string{
		programs.nodeproxy: append(raceFlags(), "nodeproxy.io/cmd/nodeproxy"),
		programs.app:       {"nodeproxy.io/tests/e2e/app"},
	} {
		cmd := exec.Command("go", append([]string{"build", "-o", path}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", path, err, out)
			return 1
		}
	}
	return m.Run()
}

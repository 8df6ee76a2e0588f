package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/vm"
)

// patience is for one machine: emulated, on a busy host.
const patience = 20 * time.Minute

// stock names the packages that give Debian 12 a kernel.
var stock = []string{"linux-image-amd64", "linux-image-6.12-amd64"}

// modules are what package netlab needs of a kernel that loads none by itself: the links it makes, and sock_diag(7).
var modules = []string{"veth", "bridge", "dummy", "inet_diag", "tcp_diag"}

// binaries are paths of static programs.
type binaries struct{ guest, nodeproxy, redirectTest string }

func compile(t *testing.T) binaries {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: boots virtual machines")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the machines are amd64, and so must this one be to build for them")
	}
	netlab.Lacks(t, vm.Missing()...)
	dir := t.TempDir()
	b := binaries{filepath.Join(dir, "guest"), filepath.Join(dir, "nodeproxy"), filepath.Join(dir, "redirect.test")}
	for _, args := range [][]string{
		{"build", "-o", b.guest, "nodeproxy.io/tests/vm/guest"},
		{"build", "-o", b.nodeproxy, "nodeproxy.io/cmd/nodeproxy"},
		{"test", "-c", "-o", b.redirectTest, "nodeproxy.io/redirect"},
	} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return b
}

// boot runs the programs under the kernel of a package. The console is the test's output.
func (b binaries) boot(ctx context.Context, t *testing.T, meta string, programs ...vm.Program) error {
	t.Helper()
	kernel, err := vm.FetchKernel(t.Context(), meta, t.Output())
	switch {
	case errors.Is(err, vm.ErrNotOffered) && meta == stock[0]:
		netlab.Lacks(t, err.Error())
	case errors.Is(err, vm.ErrNotOffered):
		t.Skip(err)
	case err != nil:
		t.Fatal(err)
	}
	fmt.Fprintf(t.Output(), "=== boot %s\n", kernel.Package)
	return vm.Machine{
		Kernel:   kernel,
		Modules:  modules,
		Init:     b.guest,
		Files:    map[string]string{"/bin/nodeproxy": b.nodeproxy, "/bin/redirect.test": b.redirectTest},
		Programs: programs,
	}.Run(ctx, t.TempDir(), t.Output())
}

func within(t *testing.T, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("not done within %s", limit))
	t.Cleanup(cancel)
	return ctx
}

// elsewhere are the tests of package redirect that a guest cannot run.
var elsewhere = []string{
	"TestArchitecture",                           // it reads the repository
	"TestAContainerSeesCgroupsAsItsNodeDoes",     // a guest has no shell
	"TestTheCgroupInWhichADaemonIsFirstIsItsOwn", // the same
	"TestAsManyRulesAsAWorkloadLikesCostTheLook", // it reads 5,000 rules within 100 ms, and processors are emulated
}

func TestTheMeshWorksUnderStockKernels(t *testing.T) {
	b := compile(t)
	for _, meta := range stock {
		t.Run(meta, func(t *testing.T) {
			t.Parallel() // one waits for its emulated processors, not for the other
			err := b.boot(within(t, patience), t, meta,
				vm.Program{Args: []string{"/bin/nodeproxy", "check"}},
				vm.Program{Args: []string{"/bin/redirect.test", "-test.v", "-test.timeout=15m", "-test.skip=" + strings.Join(elsewhere, "|")}, Env: []string{"REQUIRE_PRIVILEGED=1"}},
				vm.Program{Args: []string{"/bin/nodeproxy", "demo"}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("a program that fails inside is an error outside", func(t *testing.T) {
		err := b.boot(within(t, patience), t, stock[0],
			vm.Program{Args: []string{"/bin/nodeproxy", "check", "--config", "/absent"}},
			vm.Program{Args: []string{"/bin/nodeproxy", "version"}})
		if err == nil || !strings.Contains(err.Error(), "/bin/nodeproxy check --config /absent: exit status 1") {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("a machine that takes too long is ended", func(t *testing.T) {
		ctx := within(t, time.Second)
		if err := b.boot(ctx, t, stock[0]); err == nil || !errors.Is(err, context.Cause(ctx)) {
			t.Errorf("the error is %v", err)
		}
	})
}

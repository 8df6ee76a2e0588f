// Package kubernetes installs deploy/kubernetes, as an operator would, on real nodes beside a real Consul.
package kubernetes

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"nodeproxy.io/tests/kubelab"
)

// built is what every cluster is given, made once: images of the release and of the application, and their programs.
var built struct{ nodeproxy, app, image, program string }

const version = "1.0.0"

func TestMain(m *testing.M) { os.Exit(build(m)) }

func build(m *testing.M) int {
	if len(kubelab.Missing()) > 0 { // every test will say so itself
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "nodeproxy-kubernetes-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	built.program = filepath.Join(dir, "app")
	for _, args := range [][]string{
		{"build", "-o", built.program, "nodeproxy.io/tests/e2e/app"},
		// As "make image" does.
		{"-C", "../../deploy/dist", "run", ".", "-image", "-out", filepath.Join(dir, "release"), "-version", version, "-commit", "0123456789ab", "-time", "1700000000", "-arch", runtime.GOARCH},
	} {
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "go %v: %v\n%s", args, err, out)
			return 1
		}
	}
	built.nodeproxy = filepath.Join(dir, "release", "nodeproxy_"+version+"_linux_"+runtime.GOARCH)
	built.image = filepath.Join(dir, "release", "nodeproxy_"+version+"_oci.tar")
	if built.app, err = kubelab.Image(dir, "app:lab", built.program); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

package deploy

import (
	"archive/tar"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"nodeproxy.io/tests/netlab"
)

func output(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// released are what a package has to have, besides its scripts.
var released = []string{
	"/usr/bin/nodeproxy", "/etc/nodeproxy/nodeproxy.hcl", "/etc/nodeproxy/mesh.d", "/usr/lib/systemd/system/nodeproxy.service",
	"/usr/lib/systemd/system/nodeproxy-boot.service", "/usr/share/man/man1/nodeproxy.1", "/usr/share/man/man1/nodeproxy-run.1",
	"/usr/share/bash-completion/completions/nodeproxy", "/usr/share/doc/nodeproxy/copyright",
}

func TestTheSameCommitGivesTheSameBytes(t *testing.T) {
	netlab.Require(t)
	again := filepath.Join(t.TempDir(), "again")
	output(t, ".", append([]string{"go"}, dist(again, firstVersion)...)...)
	for _, dir := range []string{built.first, again} {
		output(t, dir, "sha256sum", "--strict", "--check", "SHA256SUMS")
	}
	first, err := os.ReadFile(filepath.Join(built.first, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(filepath.Join(again, "SHA256SUMS"))
	if err != nil || string(first) != string(second) {
		t.Errorf("first\n%s\nthen\n%s (%v)", first, second, err)
	}
}

func TestTheRPMHasWhatTheDebHas(t *testing.T) {
	netlab.Require(t)
	found, err := filepath.Glob(filepath.Join(built.first, "*.rpm"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	if _, err := exec.LookPath("rpm"); err != nil {
		netlab.Lacks(t, "rpm")
	}
	files := output(t, ".", "rpm", "--query", "--package", "--list", found[0])
	for _, path := range released {
		if !strings.Contains(files, path+"\n") {
			t.Errorf("no %s in\n%s", path, files)
		}
	}
	if got := output(t, ".", "rpm", "--query", "--package", "--configfiles", found[0]); strings.TrimSpace(got) != "/etc/nodeproxy/nodeproxy.hcl" {
		t.Errorf("configuration files: %s", got)
	}
	scripts := output(t, ".", "rpm", "--query", "--package", "--scripts", found[0])
	for _, part := range []string{"preinstall", "map ABI", "try-reload-or-restart", "nodeproxy cleanup", "postuninstall"} {
		if !strings.Contains(scripts, part) {
			t.Errorf("no %q in the scripts\n%s", part, scripts)
		}
	}
	output(t, ".", "rpm", "--checksig", "--nosignature", found[0])
	contents := output(t, ".", "dpkg-deb", "--contents", deb(built.first, firstVersion))
	for _, path := range released {
		if !strings.Contains(contents, "."+path) {
			t.Errorf("no %s in the deb\n%s", path, contents)
		}
	}
}

// file is one of a tar.
func file(t *testing.T, archive, name string) []byte {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for files := tar.NewReader(f); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			t.Fatalf("no %s in %s", name, archive)
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Name == name {
			content, err := io.ReadAll(files)
			if err != nil {
				t.Fatal(err)
			}
			return content
		}
	}
}

func TestTheImageHoldsTheStaticBinaryOfEachArchitecture(t *testing.T) {
	netlab.Require(t)
	image := filepath.Join(built.first, "nodeproxy_"+firstVersion+"_oci.tar")
	type descriptor struct {
		Digest   string
		Platform struct{ OS, Architecture string }
	}
	blob := func(digest string, into any) {
		t.Helper()
		if err := json.Unmarshal(file(t, image, "blobs/"+strings.Replace(digest, ":", "/", 1)), into); err != nil {
			t.Fatal(err)
		}
	}
	var outer, index struct{ Manifests []descriptor }
	if err := json.Unmarshal(file(t, image, "index.json"), &outer); err != nil || len(outer.Manifests) != 1 {
		t.Fatalf("%+v, %v", outer, err)
	}
	blob(outer.Manifests[0].Digest, &index)
	if len(index.Manifests) != 1 || index.Manifests[0].Platform.OS != "linux" || index.Manifests[0].Platform.Architecture != runtime.GOARCH {
		t.Fatalf("manifests: %+v", index.Manifests)
	}
	var manifest struct{ Config descriptor }
	blob(index.Manifests[0].Digest, &manifest)
	var config struct{ Config struct{ Entrypoint []string } }
	blob(manifest.Config.Digest, &config)
	if got := strings.Join(config.Config.Entrypoint, " "); got != "/usr/bin/nodeproxy" {
		t.Errorf("entrypoint %q", got)
	}
	binary, err := elf.Open(filepath.Join(built.first, "nodeproxy_"+firstVersion+"_linux_"+runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	if libraries, err := binary.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("it needs %v (%v)", libraries, err)
	}
	text, err := os.ReadFile(filepath.Join(built.first, "nodeproxy_"+firstVersion+"_linux_"+runtime.GOARCH+".cdx.json"))
	if err != nil || !json.Valid(text) || !strings.Contains(string(text), "github.com/cilium/ebpf") {
		t.Errorf("bill of materials: %v", err)
	}
}

package vm

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// ErrNotOffered is returned by FetchKernel when apt knows no such package.
var ErrNotOffered = errors.New("apt offers no such package")

// Kernel is a kernel of Debian's, with its network modules, in the user's cache. The cache keeps it: 20 to 40 MB.
type Kernel struct {
	Package string // name and version
	Release string // what uname -r prints
	dir     string
}

// FetchKernel returns the kernel on which the package meta (linux-image-amd64) depends, in the version that apt would
// install, and downloads it unless it is in the cache already. Nothing is installed. As root it updates apt's lists when
// what they name cannot be had. It reports to progress.
func FetchKernel(ctx context.Context, meta string, progress io.Writer) (*Kernel, error) {
	k, err := fetch(ctx, meta, progress)
	if err == nil || ctx.Err() != nil || os.Geteuid() != 0 {
		return k, err
	}
	fmt.Fprintf(progress, "%v: updating apt's lists\n", err)
	if err := run(ctx, progress, "apt-get", "update", "-q"); err != nil {
		return nil, err
	}
	return fetch(ctx, meta, progress)
}

func fetch(ctx context.Context, meta string, progress io.Writer) (*Kernel, error) {
	name, version, err := candidate(ctx, meta)
	if err != nil {
		return nil, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("find a cache for kernels: %w", err)
	}
	k := &Kernel{
		Package: name + " " + version,
		Release: strings.TrimPrefix(name, "linux-image-"),
		dir:     filepath.Join(cache, "nodeproxy-tools", "kernels", name+"_"+version),
	}
	if _, err := os.Stat(k.image()); err == nil {
		return k, nil
	}
	if err := k.download(ctx, name+"="+version, progress); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", k.Package, err)
	}
	return k, nil
}

// candidate resolves a meta package to the kernel's package and version.
func candidate(ctx context.Context, meta string) (name, version string, err error) {
	text, err := exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", meta).Output()
	if err != nil || len(text) == 0 {
		return "", "", fmt.Errorf("look for %s: %w", meta, ErrNotOffered)
	}
	for line := range strings.Lines(string(text)) {
		// Depends: linux-image-6.1.0-50-amd64 (= 6.1.176-1)
		if depends, ok := strings.CutPrefix(line, "Depends: linux-image-"); ok {
			name, rest, _ := strings.Cut(depends, " (= ")
			version, _, ok := strings.Cut(rest, ")")
			if ok {
				return "linux-image-" + name, version, nil
			}
		}
	}
	return "", "", fmt.Errorf("look for %s: it depends on no kernel", meta)
}

// download puts the kernel into its directory: complete, or not at all.
func (k *Kernel) download(ctx context.Context, pkg string, progress io.Writer) error {
	if err := os.MkdirAll(filepath.Dir(k.dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(k.dir), "incoming-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	get := exec.CommandContext(ctx, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=", pkg)
	get.Dir, get.Stdout, get.Stderr = tmp, progress, progress
	if err := get.Run(); err != nil {
		return fmt.Errorf("apt-get download: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages", len(debs))
	}
	unpacked := filepath.Join(tmp, "kernel")
	if err := unpack(ctx, debs[0], unpacked); err != nil {
		return err
	}
	if err := os.Rename(unpacked, k.dir); err != nil && !errors.Is(err, fs.ErrExist) { // exists: another run was faster
		return err
	}
	return nil
}

// unpack writes what wanted takes of a package's files into dir.
func unpack(ctx context.Context, deb, dir string) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = untar(stdout, dir)
	if err == nil {
		_, err = io.Copy(io.Discard, stdout) // what follows the archive's end
	} else {
		_ = cmd.Process.Kill()
	}
	if waitErr := cmd.Wait(); err == nil && waitErr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", waitErr, &stderr)
	}
	return err
}

func untar(r io.Reader, dir string) error {
	for files := tar.NewReader(r); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := wanted(header.Name)
		if name == "" || header.Typeflag != tar.TypeReg {
			continue
		}
		content, err := io.ReadAll(files)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
}

// wanted is the name under which a file of the package is kept: the kernel and the modules about networks; of drivers only
// those without hardware. It is empty for all others.
func wanted(file string) string {
	dir, base := path.Split(path.Clean("/" + file))
	_, module, _ := strings.Cut(dir, "/kernel/")
	switch {
	case dir == "/boot/" && strings.HasPrefix(base, "vmlinuz-"):
		return "vmlinuz"
	case strings.HasPrefix(module, "net/"), module == "drivers/net/":
		return strings.ReplaceAll(base, "-", "_") // as modules call each other
	}
	return ""
}

func (k *Kernel) image() string { return filepath.Join(k.dir, "vmlinuz") }

type module struct {
	name    string
	content []byte
}

// modules returns the named modules and those they depend on, each after what it depends on.
func (k *Kernel) modules(names []string) ([]module, error) {
	var ordered []module
	seen := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		content, err := k.readModule(name)
		if err != nil {
			return fmt.Errorf("read module %s of %s: %w", name, k.Package, err)
		}
		depends, err := dependencies(content)
		if err != nil {
			return fmt.Errorf("read module %s of %s: %w", name, k.Package, err)
		}
		for _, other := range depends {
			if err := visit(other); err != nil {
				return err
			}
		}
		ordered = append(ordered, module{name, content})
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return ordered, nil
}

func (k *Kernel) readModule(name string) ([]byte, error) {
	file := filepath.Join(k.dir, name+".ko")
	content, err := os.ReadFile(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return content, err
	}
	if content, err = exec.Command("xz", "--decompress", "--stdout", file+".xz").Output(); err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	return content, nil
}

// dependencies reads the names of the modules that this one needs from its section .modinfo, which holds NUL-terminated
// assignments.
func dependencies(content []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if names, ok := strings.CutPrefix(entry, "depends="); ok && names != "" {
			return strings.Split(names, ","), nil
		}
	}
	return nil, nil
}

func run(ctx context.Context, out io.Writer, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run %s: %w", cmd, err)
	}
	return nil
}

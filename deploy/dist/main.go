// Command dist makes what is released: static binaries, Debian and RPM packages, one OCI image for all architectures, a bill
// of materials for each binary, and their sums. The same commit and version give the same bytes.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// release is what is made.
type release struct {
	repo, out       string
	version, commit string
	time            time.Time // of everything in it
	archs           []string
	abi             int
	stage           string // a directory for what goes into packages
	alone           bool   // nothing but the image
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := release{}
	flag.StringVar(&r.repo, "repo", "../..", "`DIR` of the repository")
	flag.StringVar(&r.out, "out", "", "`DIR` that is filled; what is in it is removed")
	flag.StringVar(&r.version, "version", "", "semantic `VERSION`, without v")
	flag.StringVar(&r.commit, "commit", "unknown", "`HASH` that the binaries show")
	seconds := flag.Int64("time", 0, "`SECONDS` since 1970 that everything is dated with")
	flag.BoolVar(&r.alone, "image", false, "the image alone, with the binaries in it")
	archs := flag.String("arch", "amd64,arm64", "`LIST` of architectures")
	flag.Parse()
	r.time, r.archs = time.Unix(*seconds, 0).UTC(), strings.Split(*archs, ",")
	if err := r.make(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "dist:", err)
		os.Exit(1)
	}
}

func (r *release) make(ctx context.Context) (err error) {
	if r.out == "" || r.version == "" {
		return errors.New("it needs -out and -version")
	}
	for _, dir := range []*string{&r.repo, &r.out} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(r.out); err != nil {
		return err
	}
	if r.stage, err = os.MkdirTemp("", "nodeproxy-dist-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(r.stage) }()
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return err
	}
	for _, arch := range r.archs {
		if err := r.compile(ctx, arch, r.binary(arch)); err != nil {
			return err
		}
	}
	if err := r.image(); err != nil {
		return fmt.Errorf("make the image: %w", err)
	}
	if r.alone {
		return nil
	}
	if err := r.describe(ctx); err != nil {
		return err
	}
	for _, arch := range r.archs {
		if err := r.materials(ctx, arch); err != nil {
			return err
		}
		if err := r.packages(arch); err != nil {
			return err
		}
	}
	return r.sums()
}

func (r *release) binary(arch string) string {
	return filepath.Join(r.out, fmt.Sprintf("nodeproxy_%s_linux_%s", r.version, arch))
}

func (r *release) compile(ctx context.Context, arch, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", fmt.Sprintf("-s -w -buildid= -X main.version=%s -X main.commit=%s", r.version, r.commit), "-o", to, "./cmd/nodeproxy")
	cmd.Dir = r.repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	_, err := run(cmd)
	return err
}

// materials writes the bill of materials of a binary, in CycloneDX's form.
func (r *release) materials(ctx context.Context, arch string) error {
	_, err := run(exec.CommandContext(ctx, "go", "tool", "cyclonedx-gomod", "bin", "-json", "-std", "-noserial", "-notimestamp", "-version", r.version,
		"-output", r.binary(arch)+".cdx.json", r.binary(arch)))
	return err
}

// describe asks the program for its map ABI, man pages and completions.
func (r *release) describe(ctx context.Context) error {
	program := r.binary(runtime.GOARCH)
	if !slices.Contains(r.archs, runtime.GOARCH) {
		program = filepath.Join(r.stage, "nodeproxy")
		if err := r.compile(ctx, runtime.GOARCH, program); err != nil {
			return err
		}
	}
	out, err := run(exec.CommandContext(ctx, program, "version", "--json"))
	if err != nil {
		return err
	}
	var version struct {
		MapABI int `json:"map_abi"`
	}
	if err := json.Unmarshal(out, &version); err != nil {
		return fmt.Errorf("read the version: %w", err)
	}
	r.abi = version.MapABI
	man := exec.CommandContext(ctx, program, "man", filepath.Join(r.stage, "man"))
	man.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(r.time.Unix(), 10))
	if _, err := run(man); err != nil {
		return err
	}
	for _, shell := range shells {
		text, err := run(exec.CommandContext(ctx, program, "completion", shell))
		if err == nil {
			err = os.WriteFile(filepath.Join(r.stage, shell), text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var shells = []string{"bash", "zsh", "fish"}

func (r *release) sums() error {
	entries, err := os.ReadDir(r.out)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(r.out, e.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, "%x  %s\n", sha256.Sum256(content), e.Name())
	}
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), text.Bytes(), 0o644)
}

func run(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run %s: %w\n%s", strings.Join(cmd.Args, " "), err, &stderr)
	}
	return out, nil
}

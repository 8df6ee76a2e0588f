// Command runc runs the real one, and has it make containers without limits: a cgroup2 that was mounted beside hierarchies of
// version 1 has no controllers.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if i := slices.Index(args, "--bundle"); slices.Contains(args, "create") && i >= 0 && i+1 < len(args) {
		if err := unlimit(filepath.Join(args[i+1], "config.json")); err != nil {
			return err
		}
	}
	path, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	return syscall.Exec(path, args, os.Environ())
}

// unlimit leaves of a container's resources its devices.
func unlimit(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var spec map[string]any
	if err := json.Unmarshal(text, &spec); err != nil {
		return err
	}
	if linux, ok := spec["linux"].(map[string]any); ok {
		resources, _ := linux["resources"].(map[string]any)
		linux["resources"] = map[string]any{"devices": resources["devices"]}
	}
	if text, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

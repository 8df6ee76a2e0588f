package file

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A change of one file must be seen whatever its times and size say, and the other files not be read again for it.
func TestOnlyWhatChangedIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	service := func(name, address string) string {
		return "service {\n  name = \"" + name + "\"\n  address = \"" + address + "\"\n  port = 8080\n}\n"
	}
	web := write("nodes/n/web.hcl", service("web", "10.0.0.1"))
	api := write("nodes/n/api.hcl", service("api", "10.0.0.2"))
	intentions := write("config/api.hcl", "Kind = \"service-intentions\"\nName = \"api\"\nSources = [{ Name = \"web\"  Action = \"allow\" }]\n")
	var known parts
	read := func() *mesh {
		t.Helper()
		m, next, err := readMesh(dir, "dc1", known)
		if err != nil {
			t.Fatal(err)
		}
		known = next
		return m
	}
	settled := func() { // until the file system's clock has moved on
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			all := true
			for _, path := range []string{web, api, intentions} {
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				all = all && stampOf(info, time.Now()) != (stamp{})
			}
			if all {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the files are always new")
			}
		}
	}
	settled()
	first := read()
	before, err := os.Stat(web)
	if err != nil {
		t.Fatal(err)
	}
	for i, address := range []string{"10.0.0.3", "10.0.0.4"} { // of the same size, at the same time, the second one right after it was read
		write("nodes/n/web.hcl", service("web", address))
		if err := os.Chtimes(web, before.ModTime(), before.ModTime()); err != nil {
			t.Fatal(err)
		}
		next := read()
		if got := next.instances[1].address.String(); got != address {
			t.Errorf("change %d: web is at %s, want %s", i, got, address)
		}
		if next.instances[0] != first.instances[0] {
			t.Errorf("change %d: api was read again, and had not changed", i)
		}
		if len(next.entries.intentions) != 1 {
			t.Errorf("change %d: %d intentions, want the one there was", i, len(next.entries.intentions))
		}
	}
	settled()
	read()
	write("nodes/n/more.hcl", strings.Replace(service("other", "10.0.0.5"), "port", "id = \"api\"\n  port", 1))
	if _, _, err := readMesh(dir, "dc1", known); err == nil || !strings.Contains(err.Error(), "already used") {
		t.Errorf("two services of one id, of which one was known: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "nodes/n/more.hcl")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(intentions); err != nil {
		t.Fatal(err)
	}
	if n := len(read().entries.intentions); n != 0 {
		t.Errorf("%d intentions are left of a file that is gone", n)
	}
}

package workload

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nodeproxy.io/tests/netlab"
)

// unitFiles writes files of a unit, in order, and returns their paths.
func unitFiles(t *testing.T, texts ...string) []string {
	t.Helper()
	dir := t.TempDir()
	var paths []string
	for i, text := range texts {
		paths = append(paths, filepath.Join(dir, string(rune('a'+i))+".conf"))
		if err := os.WriteFile(paths[i], []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return paths
}

func TestUnitFilesAndDropInsBecomeLabels(t *testing.T) {
	netlab.Require(t) // the files must be root's
	const unit = `# a comment
[Unit]
Description=the shop
[Service]
Service=not-ours
ExecStart=/bin/sh -c \
  "sleep infinity"
; another
[X-NodeProxy]
Service = web
Mode=permissive
ExcludeOutboundCIDRs=10.0.0.0/8, \
  fd00::/64
SameNode=mtls
DNS=disabled
`
	for _, c := range []struct {
		name  string
		files []string
		want  Labels
	}{
		{"no section", []string{"[Service]\nExecStart=/bin/true\n"}, nil},
		{"an empty section", []string{"[X-NodeProxy]\n"}, nil},
		{"another's section", []string{"[X-Other]\nService=web\n"}, nil},
		{"the unit's own", []string{unit}, Labels{"service": "web", "mode": "permissive", "exclude-outbound-cidrs": "10.0.0.0/8,    fd00::/64", "same-node": "mtls", "dns": "disabled"}},
		{"a drop-in alone", []string{"[Service]\n", "[X-NodeProxy]\nService=db\n"}, Labels{"service": "db"}},
		{"the last drop-in holds", []string{"[X-NodeProxy]\nService=a\nMesh=observe\n", "[X-NodeProxy]\nService=b\n", "[X-NodeProxy]\nMesh=enabled\n"}, Labels{"service": "b", "mesh": "enabled"}},
		{"a drop-in takes all back", []string{"[X-NodeProxy]\nService=a\n", "[X-NodeProxy]\nService=\n"}, nil},
	} {
		got, err := unitLabels(unitFiles(t, c.files...))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		claim := got.Claim("systemd", "/c")
		if !maps.Equal(got, c.want) || (got == nil) != (c.want == nil) || claim.Invalid != "" && got != nil {
			t.Errorf("%s: got %v, want %v (%s)", c.name, got, c.want, claim.Invalid)
		}
	}
	if _, err := unitLabels(unitFiles(t, "[X-NodeProxy]\nservice=b\n")); err == nil || !strings.Contains(err.Error(), "unknown key service") {
		t.Errorf("an unknown key: %v", err)
	}
}

func TestUnitFilesThatOthersCanWriteAreRefused(t *testing.T) {
	netlab.Require(t)
	const labelled, plain = "[X-NodeProxy]\nService=bank\n", "[Service]\n"
	for name, spoil := range map[string]func(path string) error{
		"another user's":        func(p string) error { return os.Chown(p, 65534, 0) },
		"writable by its group": func(p string) error { return os.Chmod(p, 0o664) },
		"writable by everybody": func(p string) error { return os.Chmod(p, 0o646) },
	} {
		files := unitFiles(t, plain, labelled)
		if err := spoil(files[1]); err != nil {
			t.Fatal(err)
		}
		if _, err := unitLabels(files); err == nil || !strings.Contains(err.Error(), files[1]) || !strings.Contains(err.Error(), "root's") {
			t.Errorf("%s: %v", name, err)
		}
		if err := spoil(files[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := unitLabels(files[:1]); err != nil {
			t.Errorf("%s, and without our section: %v", name, err)
		}
	}
	masked := filepath.Join(t.TempDir(), "masked.service")
	if err := os.Symlink("/dev/null", masked); err != nil {
		t.Fatal(err)
	}
	if labels, err := unitLabels([]string{masked}); labels != nil || err != nil {
		t.Errorf("a masked unit: %v, %v", labels, err)
	}
}

func TestSlicesAreDirectories(t *testing.T) {
	for slice, want := range map[string]string{
		"system.slice": "/system.slice", "-.slice": "/", "": "/",
		"system-postgresql.slice": "/system.slice/system-postgresql.slice", "a-b-c.slice": "/a.slice/a-b.slice/a-b-c.slice",
	} {
		if got := SlicePath(slice); got != want {
			t.Errorf("%q: %s, want %s", slice, got, want)
		}
	}
}

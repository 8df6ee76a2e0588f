package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/redirect"
)

// example is docs/nodeproxy.hcl, with cgroups where this machine has them.
func example(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/nodeproxy.hcl")
	if err != nil {
		t.Fatal(err)
	}
	mount, err := redirect.CgroupMount()
	if err != nil {
		t.Skip(err)
	}
	return strings.ReplaceAll(string(text), "/sys/fs/cgroup/", mount+"/")
}

func loadText(t *testing.T, text string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nodeproxy.hcl")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

func TestTheExampleLoadsAndShowsTheDefaults(t *testing.T) {
	text := example(t)
	cfg, err := loadText(t, text)
	if err != nil {
		t.Fatal(err)
	}
	least, err := loadText(t, `
node { name = "node-1"  address = "10.0.0.5" }
source "file" { path = "/etc/nodeproxy/mesh.d" }
`)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Cgroups) != 1 || cfg.Cgroups[0].Service != "web" {
		t.Errorf("cgroups = %+v, want web's", cfg.Cgroups)
	}
	cfg.Cgroups = nil
	if !reflect.DeepEqual(cfg, least) {
		t.Errorf("the example is\n%+v and the defaults are\n%+v", cfg, least)
	}
}

// TestTheExampleHasEveryKey finds the keys by the tags of raw.
func TestTheExampleHasEveryKey(t *testing.T) {
	text := example(t)
	var visit func(typ reflect.Type)
	visit = func(typ reflect.Type) {
		switch {
		case typ == reflect.TypeFor[time.Duration]():
		case typ.Kind() == reflect.Pointer, typ.Kind() == reflect.Slice, typ.Kind() == reflect.Map:
			visit(typ.Elem())
		case typ.Kind() == reflect.Struct:
			for i := range typ.NumField() {
				key := typ.Field(i).Tag.Get("hcl")
				if !regexp.MustCompile(`(?m)^(#\s+)?\s*(# )?(not yet: )?(source ")?` + key + `\b`).MatchString(text) {
					t.Errorf("docs/nodeproxy.hcl has no %q", key)
				}
				visit(typ.Field(i).Type)
			}
		}
	}
	visit(reflect.TypeFor[raw]())
}

// withConsul is the example with the source that it shows in a comment in the place of the other.
func withConsul(t *testing.T) string {
	t.Helper()
	file := regexp.MustCompile(`(?ms)^source "file" \{.*?^\}\n`)
	consul := regexp.MustCompile(`(?ms)^# source "consul" \{.*?^# \}\n`)
	text := example(t)
	if !file.MatchString(text) || !consul.MatchString(text) {
		t.Fatal("docs/nodeproxy.hcl lacks a source")
	}
	return consul.ReplaceAllStringFunc(file.ReplaceAllString(text, ""), func(block string) string {
		block = regexp.MustCompile(`(?m)^#   not yet: `).ReplaceAllString(block, "  # not yet: ")
		return regexp.MustCompile(`(?m)^# `).ReplaceAllString(block, "")
	})
}

func TestTheExamplesOtherSourceLoads(t *testing.T) {
	cfg, err := loadText(t, withConsul(t))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Consul == nil || cfg.Consul.Address != "127.0.0.1:8500" || cfg.Consul.TokenFile != "/etc/nodeproxy/token" {
		t.Errorf("consul = %+v", cfg.Consul)
	}
}

func TestWhatTheExampleCallsNotYetIsRefused(t *testing.T) {
	lines := strings.Split(withConsul(t), "\n")
	found := 0
	for i, line := range lines {
		_, set, marked := strings.Cut(line, "# not yet: ")
		if !marked {
			continue
		}
		found++
		key, _, _ := strings.Cut(set, " ")
		with := slices.Clone(lines)
		with[i] = set
		for j := i - 1; j >= 0 && !strings.HasSuffix(lines[j], "{"); j-- { // the value that stands for "off", in the same block
			if strings.HasPrefix(strings.TrimSpace(lines[j]), key+" ") {
				with[j] = ""
				break
			}
		}
		if _, err := loadText(t, strings.Join(with, "\n")); err == nil || !strings.Contains(err.Error(), key) || !strings.Contains(err.Error(), "not supported by this version yet") {
			t.Errorf("%q: %v; if it has landed, correct docs/nodeproxy.hcl", set, err)
		}
	}
	if found == 0 {
		t.Error("nothing is marked")
	}
}

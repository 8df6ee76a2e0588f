package cni

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const patience = 30 * time.Second

// odd is a list that nobody would write out again as it is.
const odd = "{ \"name\":\"pods\",\n\t\"cniVersion\": \"1.0.0\", \"plugins\":[{\"type\":\"bridge\",\"mtu\":1500.0}]  }"

type node struct {
	t *testing.T
	*Installer
}

func newNode(t *testing.T, files map[string]string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t, &Installer{
		ConfDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), StateFile: filepath.Join(dir, "state", "cni.json"),
		Entry: Entry{Socket: "/run/a.sock", Mesh: []string{"shop"}, Access: json.RawMessage(`{}`)}, Log: slog.New(slog.DiscardHandler),
	}}
	for _, dir := range []string{n.ConfDir, n.BinDir} {
		n.must(os.Mkdir(dir, 0o755))
	}
	for name, text := range files {
		n.write(name, text)
	}
	return n
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) write(name, text string) {
	n.t.Helper()
	n.must(os.WriteFile(filepath.Join(n.ConfDir, name), []byte(text), 0o640))
}

func (n *node) read(name string) string {
	n.t.Helper()
	text, err := os.ReadFile(filepath.Join(n.ConfDir, name))
	n.must(err)
	return string(text)
}

// has asserts which plugins a list has.
func (n *node) has(name string, want ...string) {
	n.t.Helper()
	l, err := parse([]byte(n.read(name)))
	n.must(err)
	var all []string
	for _, p := range l.plugins {
		var of struct{ Type string }
		n.must(json.Unmarshal(p, &of))
		all = append(all, of.Type)
	}
	if !slices.Equal(all, want) {
		n.t.Errorf("%s has the plugins %v, want %v", name, all, want)
	}
}

func (n *node) install() {
	n.t.Helper()
	n.must(n.Installer.install())
}

func (n *node) remove() {
	n.t.Helper()
	_, err := Remove(n.StateFile)
	n.must(err)
	if left, _ := os.ReadDir(n.BinDir); len(left) > 0 {
		n.t.Errorf("programs are left: %v", left)
	}
	if _, err := os.Stat(n.StateFile); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("the state file is left: %v", err)
	}
}

func TestTheListThatRuntimesUseGetsTheEntryAndIsRestoredToTheByte(t *testing.T) {
	n := newNode(t, map[string]string{"20-later.conflist": odd, "10-first.conflist": odd, "05-broken.conflist": "{", "00-notes.txt": "{}"})
	n.install()
	n.install()
	n.has("10-first.conflist", "bridge", "nodeproxy")
	n.has("20-later.conflist", "bridge")
	if text := n.read("10-first.conflist"); !strings.Contains(text, "1500.0") {
		t.Errorf("somebody's number is written another way: %s", text)
	}
	if info, err := os.Stat(filepath.Join(n.ConfDir, "10-first.conflist")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("its mode is %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Join(n.BinDir, pluginName)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the program is %v, %v", info, err)
	}
	n.Entry.Mesh = []string{"shop", "billing"}
	n.install()
	if !strings.Contains(n.read("10-first.conflist"), "billing") {
		t.Error("an entry that changes is not written")
	}
	n.remove()
	if text := n.read("10-first.conflist"); text != odd {
		t.Errorf("the list is %q, want %q", text, odd)
	}
}

func TestWhatOthersChangeMeanwhileStays(t *testing.T) {
	n := newNode(t, map[string]string{"10-first.conflist": odd})
	n.install()
	n.write("10-first.conflist", strings.Replace(n.read("10-first.conflist"), `"plugins": [`, `"plugins": [{"type": "tuning"},`, 1))
	n.Entry.FailOpen = true
	n.install()
	n.has("10-first.conflist", "tuning", "bridge", "nodeproxy")
	n.remove()
	n.has("10-first.conflist", "tuning", "bridge")
}

func TestTheEntryFollowsTheListThatRuntimesUse(t *testing.T) {
	n := newNode(t, map[string]string{"10-first.conflist": odd})
	n.install()
	n.write("05-new.conflist", odd)
	n.install()
	n.has("05-new.conflist", "bridge", "nodeproxy")
	if text := n.read("10-first.conflist"); text != odd {
		t.Errorf("the list that is used no more is %q, want %q", text, odd)
	}
	n.remove()
	if text := n.read("05-new.conflist"); text != odd {
		t.Errorf("the list is %q, want %q", text, odd)
	}
}

func TestWhatIsTakenOutIsPutBack(t *testing.T) {
	n := newNode(t, map[string]string{"10-first.conflist": odd})
	ctx, cancel := context.WithCancel(t.Context())
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		n.Keep(ctx)
	}()
	in := func() bool {
		_, err := os.Stat(filepath.Join(n.BinDir, pluginName))
		return err == nil && strings.Contains(n.read("10-first.conflist"), pluginName)
	}
	n.within("it is installed", in)
	n.write("10-first.conflist", odd)
	n.within("it is in the list again", in)
	n.must(os.Remove(filepath.Join(n.BinDir, pluginName)))
	n.within("its program is there again", in)
	cancel()
	<-kept
	if !in() {
		t.Error("it is gone with who installed it")
	}
	n.remove()
}

func (n *node) within(what string, holds func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("not within %s: %s: %v", patience, what, n.Problem())
		}
	}
}

func TestAConfigurationOfOnePluginIsRefusedByName(t *testing.T) {
	n := newNode(t, map[string]string{"10-single.conf": `{"type": "bridge", "name": "pods"}`, "20-list.conflist": odd})
	if err := n.Installer.install(); err == nil || !strings.Contains(err.Error(), "10-single.conf") {
		t.Errorf("it says %v", err)
	}
	if text := n.read("20-list.conflist"); text != odd {
		t.Errorf("a list that nobody uses is changed: %s", text)
	}
}

package cni

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const lookEvery = time.Second

// Installer keeps the plugin in the node's network configuration: its program in BinDir, and its entry at the end of the list that the
// runtime uses, the first of ConfDir by name.
type Installer struct {
	ConfDir, BinDir string
	StateFile       string // what there was before
	Entry           Entry
	Log             *slog.Logger

	program os.FileInfo // that was installed
	mu      sync.Mutex
	problem error
}

// record is what Remove needs.
type record struct {
	ConfDir string             `json:"conf_dir"`
	Program string             `json:"program"`
	Lists   map[string]*before `json:"lists"` // by path
}

// before is a list as it was, for as long as nobody else has changed it.
type before struct {
	Original []byte `json:"original"`
	Written  []byte `json:"written"`
}

// Problem says why the plugin is not in place, and what to do.
func (i *Installer) Problem() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.problem
}

// Keep installs the plugin, and again whenever somebody else has taken it out, until ctx ends. It stays then.
func (i *Installer) Keep(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		err := i.install()
		i.mu.Lock()
		changed := fmt.Sprint(err) != fmt.Sprint(i.problem)
		i.problem = err
		i.mu.Unlock()
		if changed && err != nil {
			i.Log.Error("pods of the mesh may start before they are protected", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (i *Installer) install() error {
	if err := i.installProgram(); err != nil { // first: without it no pod starts
		return fmt.Errorf("install the CNI plugin in %s: %w", i.BinDir, err)
	}
	lists, err := lists(i.ConfDir)
	if err == nil && len(lists) == 0 {
		err = errors.New("there is no network configuration yet")
	}
	if err != nil {
		return fmt.Errorf("add the CNI plugin to the network configuration in %s: %w", i.ConfDir, err)
	}
	was, err := readRecord(i.StateFile)
	if err != nil {
		return err
	}
	was.ConfDir, was.Program = i.ConfDir, i.programPath()
	entry, err := i.entry()
	if err != nil {
		return err
	}
	for n, path := range lists {
		if n == 0 {
			err = was.insert(i.StateFile, path, entry)
		} else {
			_, err = was.takeOut(i.StateFile, path) // runtimes used it before
		}
		if err != nil {
			return fmt.Errorf("add the CNI plugin to the network configuration %s: %w", path, err)
		}
	}
	return nil
}

func (i *Installer) entry() (json.RawMessage, error) {
	return json.Marshal(struct {
		Type string `json:"type"`
		Entry
	}{pluginName, i.Entry})
}

func (i *Installer) programPath() string { return filepath.Join(i.BinDir, pluginName) }

// installProgram copies this program.
func (i *Installer) installProgram() error {
	there, err := os.Stat(i.programPath())
	if err == nil && i.program != nil && os.SameFile(there, i.program) && there.Size() == i.program.Size() && there.ModTime().Equal(i.program.ModTime()) {
		return nil
	}
	own, err := sum("/proc/self/exe")
	if err != nil {
		return err
	}
	if is, err := sum(i.programPath()); err != nil || is != own {
		if err := copyProgram("/proc/self/exe", i.programPath()); err != nil {
			return err
		}
	}
	i.program, err = os.Stat(i.programPath())
	return err
}

func sum(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	digest := sha256.New()
	_, err = io.Copy(digest, f)
	return [sha256.Size]byte(digest.Sum(nil)), err
}

func copyProgram(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(aside(to), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Sync(), out.Close()); err == nil {
		err = os.Rename(out.Name(), to)
	}
	return err
}

// aside is where a file is written before it is renamed: runtimes do not take it for a configuration, or a plugin.
func aside(path string) string { return filepath.Join(filepath.Dir(path), "."+pluginName+".new") }

// lists are the network configurations of a directory, the one that runtimes use first.
func lists(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // by name
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var all []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !isConfiguration(path) {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it is gone
		}
		l, err := parse(text)
		if err != nil {
			continue // runtimes pass over it too
		}
		if l.single {
			if len(all) == 0 {
				return nil, fmt.Errorf("%s, which runtimes use first, is of a single plugin: make it a list (.conflist), or remove it", path)
			}
			continue
		}
		all = append(all, path)
	}
	return all, err
}

// isConfiguration says whether runtimes read a file of that name.
func isConfiguration(path string) bool {
	return slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(path))
}

// list is a network configuration, of which only the entries are read.
type list struct {
	fields  map[string]json.RawMessage
	plugins []json.RawMessage
	single  bool
}

func parse(text []byte) (l list, err error) {
	if err = json.Unmarshal(text, &l.fields); err != nil {
		return l, err
	}
	if _, ok := l.fields["plugins"]; !ok {
		l.single = true
		if l.fields["type"] == nil {
			err = errors.New("it has no plugins")
		}
		return l, err
	}
	err = json.Unmarshal(l.fields["plugins"], &l.plugins)
	if err == nil && len(l.plugins) == 0 {
		err = errors.New("it has no plugins")
	}
	return l, err
}

// ours is the index of our entry, -1 for none.
func (l list) ours() int {
	return slices.IndexFunc(l.plugins, func(plugin json.RawMessage) bool {
		var of struct{ Type string }
		return json.Unmarshal(plugin, &of) == nil && of.Type == pluginName
	})
}

func (l list) text() ([]byte, error) {
	plugins, err := json.Marshal(l.plugins)
	if err != nil {
		return nil, err
	}
	l.fields["plugins"] = plugins
	text, err := json.MarshalIndent(l.fields, "", "  ")
	return append(text, '\n'), err
}

func same(x, y json.RawMessage) bool {
	var a, b bytes.Buffer
	return json.Compact(&a, x) == nil && json.Compact(&b, y) == nil && bytes.Equal(a.Bytes(), b.Bytes())
}

// insert has the list at path end with our entry.
func (r *record) insert(stateFile, path string, entry json.RawMessage) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	l, err := parse(text)
	if err != nil {
		return err
	}
	at, was := l.ours(), r.Lists[path]
	switch {
	case at >= 0 && same(l.plugins[at], entry):
		return nil
	case at < 0:
		l.plugins = append(l.plugins, entry)
		was = &before{Original: text}
	case was != nil && bytes.Equal(was.Written, text):
		l.plugins[at] = entry
	default: // somebody else has changed it since
		l.plugins[at] = entry
		was = nil
	}
	next, err := l.text()
	if err != nil {
		return err
	}
	if delete(r.Lists, path); was != nil {
		r.Lists[path] = &before{Original: was.Original, Written: next}
	}
	if err := r.write(stateFile); err != nil { // first: what was there must not be lost
		return err
	}
	return replace(path, next)
}

// takeOut makes the list at path what it was, or takes our entry from it where somebody else has changed it since.
func (r *record) takeOut(stateFile, path string) (bool, error) {
	if !isConfiguration(path) {
		return false, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	l, err := parse(text)
	if err != nil || l.ours() < 0 {
		return false, nil // it is nothing of ours
	}
	var next []byte
	if was := r.Lists[path]; was != nil && bytes.Equal(was.Written, text) {
		next = was.Original
	} else {
		l.plugins = slices.Delete(l.plugins, l.ours(), l.ours()+1)
		if next, err = l.text(); err != nil {
			return false, err
		}
	}
	if err := replace(path, next); err != nil {
		return false, err
	}
	delete(r.Lists, path)
	return true, r.write(stateFile)
}

// replace writes a file whole, by a rename within its directory, which is what containerd looks for.
func replace(path string, text []byte) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return writeWhole(path, aside(path), text, info.Mode().Perm())
}

// writeWhole writes a file under another name and renames it once it is on the disk: after a power cut it is the one or the other.
func writeWhole(path, new string, text []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(new, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(new, path)
}

func readRecord(path string) (*record, error) {
	r := &record{Lists: make(map[string]*before)}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, r)
	}
	if err != nil {
		return nil, fmt.Errorf("read what the network configuration was: %s: %w: correct or remove the file", path, err)
	}
	return r, nil
}

func (r *record) write(path string) error {
	text, err := json.Marshal(r)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = writeWhole(path, path+".new", text, 0o600)
	}
	return err
}

// Remove undoes what an Installer with that state file has done, and says what. A list is what it was, to the byte, unless somebody
// else has changed it since: then our entry alone is taken out.
func Remove(stateFile string) (removed []string, err error) {
	if _, err := os.Stat(stateFile); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	was, err := readRecord(stateFile)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(was.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the CNI plugin from the network configuration: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(was.ConfDir, e.Name())
		out, err := was.takeOut(stateFile, path)
		if err != nil {
			return removed, fmt.Errorf("remove the CNI plugin from the network configuration %s: %w", path, err)
		}
		if out {
			removed = append(removed, "entry in "+path)
		}
	}
	if err := os.Remove(was.Program); err == nil { // last: without it no pod starts
		removed = append(removed, was.Program)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return removed, fmt.Errorf("remove the CNI plugin: %w", err)
	}
	return removed, os.Remove(stateFile)
}

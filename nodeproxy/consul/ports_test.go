package consul

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestMeshPortsAreStable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state", "state.json")
	pool := Ports{21500, 21502}
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	open := func() *ports {
		t.Helper()
		p, err := openPorts(file, pool)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	assign := func(p *ports, ids []string, registered map[string]uint16, taken ...uint16) map[string]uint16 {
		t.Helper()
		used := make(map[uint16]bool)
		for _, port := range taken {
			used[port] = true
		}
		got, err := p.assign(ids, registered, used, now)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	want := func(what string, got map[string]uint16, want map[string]uint16) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	p := open()
	want("at first", assign(p, []string{"a", "b"}, nil, 21500), map[string]uint16{"a": 21501, "b": 21502})
	p = open()
	want("after a restart", assign(p, []string{"b", "c"}, nil), map[string]uint16{"b": 21502, "c": 21500})
	want("back again", assign(p, []string{"a"}, nil), map[string]uint16{"a": 21501})
	want("taken by somebody else", assign(p, []string{"b"}, nil, 21502, 21501), map[string]uint16{"b": 21500})
	now = now.Add(48 * time.Hour)
	want("one more than there are", assign(p, []string{"a", "b", "d", "e"}, nil), map[string]uint16{"a": 21501, "b": 21500, "d": 21502})

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	want("without the file what is registered counts", assign(open(), []string{"a", "b"}, map[string]uint16{"b": 21501, "a": 9}), map[string]uint16{"a": 21500, "b": 21501})
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", st, err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openPorts(file, pool); err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("a broken file: %v", err)
	}
}

func TestServedPortsFitIntoMeta(t *testing.T) {
	var all []uint16
	for port := uint16(21500); port < 21999; port += 2 {
		all = append(all, port)
	}
	all = append(all, 30000, 30001, 30002, 30001)
	meta := make(map[string]string)
	for i, text := range portTexts(all) {
		if len(text) > maxMeta {
			t.Errorf("a value of %d bytes", len(text))
		}
		meta[portsKey(i)] = text
	}
	read := servedPorts(meta)
	has := func(port uint16) bool {
		for _, p := range read {
			if p.contains(port) {
				return true
			}
		}
		return false
	}
	for port := uint16(21400); port < 30100; port++ {
		want := port >= 21500 && port < 21999 && port%2 == 0 || port >= 30000 && port <= 30002
		if has(port) != want {
			t.Errorf("port %d: %v", port, !want)
		}
	}
	if got := servedPorts(map[string]string{portsMeta: "x,0-5,70000,7-"}); len(got) != 0 {
		t.Errorf("from nonsense: %v", got)
	}
}

package redirect

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

func TestArchitectureListsEveryMapOnceWithItsSize(t *testing.T) {
	text, err := os.ReadFile("../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `.*\\|$").FindAllString(string(text), -1)
	for _, load := range []func() (*ebpf.CollectionSpec, error){loadOutbound, loadInbound, loadDns} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for name, m := range spec.Maps {
			if strings.HasPrefix(name, ".") {
				continue // a section of the object
			}
			var found []string
			for _, row := range rows {
				if strings.Contains(strings.SplitN(row, "|", 3)[1], "`"+name+"`") {
					found = append(found, row)
				}
			}
			if len(found) != 1 {
				t.Errorf("map %s is in %d rows: %q", name, len(found), found)
				continue
			}
			size := thousands(m.MaxEntries)
			switch m.Type {
			case ebpf.RingBuf:
				size = fmt.Sprintf("%d MiB", m.MaxEntries>>20)
			case ebpf.SkStorage:
				size = "per socket"
			case ebpf.CGroupStorage:
				size = "per cgroup"
			}
			if !regexp.MustCompile(`\| [^|]*\b` + size + `\b[^|]*\|`).MatchString(found[0]) {
				t.Errorf("map %s has size %s, and its row is %s", name, size, found[0])
			}
		}
	}
}

func thousands(n uint32) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}

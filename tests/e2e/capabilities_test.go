package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// unitCapabilities are those that deploy/nodeproxy.service leaves to the daemon, which the DaemonSet's are too.
func unitCapabilities(t *testing.T) (all []string) {
	t.Helper()
	unit, err := os.ReadFile("../../deploy/nodeproxy.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindAllStringSubmatch(string(unit), -1) {
		all = append(all, strings.Fields(line[1])...)
	}
	return all
}

// confined is the daemon's program, for which there are no other capabilities.
func (m *mesh) confined(capabilities []string) string {
	m.t.Helper()
	path := filepath.Join(m.Dir(), "confined")
	bounds := "-all,+" + strings.ReplaceAll(strings.ToLower(strings.Join(capabilities, ",+")), "cap_", "")
	m.must(os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\nexec setpriv --bounding-set=%s -- %s \"$@\"\n", bounds, programs.nodeproxy), 0o700))
	return path
}

// The daemon of the unit needs what the unit leaves to it: without one of them it says which, and has either begun nothing, or does
// all but what it names.
func TestADaemonWithoutOneOfItsCapabilitiesSaysWhichAndHalfProtectsNobody(t *testing.T) {
	m := newMeshAlone(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	d, all := m.Daemons[0], unitCapabilities(t)
	d.Labels = "  xattr {\n    enabled = true\n  }\n"
	without := func(name string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == name })
	}
	optional := map[string]string{
		"CAP_DAC_READ_SEARCH": "they are looked for every second", "CAP_DAC_OVERRIDE": "those that root may not use otherwise get no connections",
		"CAP_SETUID": "those of other users than root are not made", "CAP_SETGID": "those of other users than root are not made",
	}
	for _, name := range all {
		if optional[name] != "" {
			continue
		}
		d.Binary = m.confined(without(name))
		m.must(d.Launch())
		err := d.Process.Wait(m.ctx())
		if out := d.Process.Output(); err == nil || !strings.Contains(out, "start the daemon: capability "+name+": missing; needed for ") || !strings.Contains(out, "grant it") {
			t.Errorf("without %s the daemon ends with %v:\n%s", name, err, out)
		}
		if pinned, err := m.Pinned(); len(pinned) > 0 || err != nil {
			t.Errorf("without %s there is pinned %v, %v", name, pinned, err)
		}
	}
	d.Binary = m.confined(all)
	m.start()
	m.reaches(web, m.vip("api"))
	if out := d.Process.Output(); strings.Contains(out, "capability") || strings.Contains(out, "permitted") {
		t.Errorf("with all of them it lacks something:\n%s", out)
	}
	for name, costs := range optional {
		if !slices.Contains(all, name) {
			t.Errorf("the unit does without %s", name)
		}
		d.Binary = m.confined(without(name))
		m.must(m.replace(0, nil).Wait(m.ctx()))
		if out := d.Process.Output(); !strings.Contains(out, "capability "+name+": missing; needed for ") || !strings.Contains(out, costs) {
			t.Errorf("without %s the daemon says:\n%s", name, out)
		}
		late, err := m.Nodes[0].Workload(strings.ToLower(name))
		m.must(err)
		m.label(late.Cgroup, "service", "web")
		m.awaitWorkload(late.Cgroup, "web", "empty")
		m.settle(0)
		m.reaches(web, m.vip("api"))
	}
}

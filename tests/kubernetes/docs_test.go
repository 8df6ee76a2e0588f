package kubernetes

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestTheDashboardAndTheTableOfEnvoysNamesHaveMetricsThatThereAre(t *testing.T) {
	documented := read(t, "../../docs/metrics.md")
	for _, path := range []string{"../../deploy/kubernetes/monitoring/dashboard.json", "../../docs/kubernetes.md"} {
		names := regexp.MustCompile(`nodeproxy_[a-z_]+`).FindAllString(read(t, path), -1)
		if len(names) < 10 {
			t.Errorf("%s has the metrics %v alone", path, names)
		}
		for _, name := range names {
			base := regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(name, "")
			if !strings.Contains(documented, "`"+base+"`") {
				t.Errorf("%s has %s, which docs/metrics.md does not know", path, name)
			}
		}
	}
}

func TestEachCapabilityOfTheDaemonSetSaysWhichCallNeedsIt(t *testing.T) {
	_, list, _ := strings.Cut(read(t, "../../deploy/kubernetes/daemonset.yaml"), "add:\n")
	list, _, _ = strings.Cut(list, "readinessProbe:")
	unit := read(t, "../../deploy/nodeproxy.service")
	n := 0
	for line := range strings.Lines(strings.TrimSpace(list)) {
		found := regexp.MustCompile(`^\s*- ([A-Z_]+) +# \w+\(2\): `).FindStringSubmatch(line)
		if found == nil {
			t.Errorf("no capability with its call: %q", line)
			continue
		}
		if n++; !strings.Contains(unit, "CAP_"+found[1]) {
			t.Errorf("the systemd unit does without %s", found[1])
		}
	}
	if want := strings.Count(unit, " CAP_") + strings.Count(unit, "=CAP_"); n != want {
		t.Errorf("%d capabilities; the systemd unit has %d", n, want)
	}
}

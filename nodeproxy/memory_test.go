package nodeproxy

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// residentOfFiles is how much of mapped files is in memory, in KiB (proc_pid_status(5)).
func residentOfFiles(t *testing.T) (size int) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "RssFile:") {
			if _, err := fmt.Sscanf(line, "RssFile: %d kB", &size); err != nil {
				t.Fatal(err)
			}
		}
	}
	return size
}

func TestPagesOfTheExecutableThatAreNotUsedAreGivenBack(t *testing.T) {
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(executable); err != nil { // so that all that is touched is near
		t.Fatal(err)
	}
	before := residentOfFiles(t)
	if err := GiveBack(); err != nil {
		t.Fatal(err)
	}
	if after := residentOfFiles(t); after > before*3/4 {
		t.Errorf("%d KiB of files are resident, %d KiB before: want at most three quarters of that", after, before)
	}
}

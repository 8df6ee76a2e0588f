package nodeproxy

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// GiveBack returns what is free of the heap, and the pages of the executable, of which the start and each burst touch many more than
// what comes after. Those that are needed come back from the page cache by themselves.
func GiveBack() error {
	debug.FreeOSMemory()
	executable, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	mappings, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(mappings)) {
		var first, end uintptr
		var rights string
		if !strings.HasSuffix(line, " "+executable+"\n") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x %s", &first, &end, &rights); err != nil {
			return fmt.Errorf("read /proc/self/maps: %w", err)
		}
		if strings.Contains(rights, "w") {
			continue // its pages are no longer the file's
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, first, end-first, unix.MADV_DONTNEED); errno != 0 {
			errs = append(errs, fmt.Errorf("give back %#x-%#x: %w", first, end, errno))
		}
	}
	return errors.Join(errs...)
}

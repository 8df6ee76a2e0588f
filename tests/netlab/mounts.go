package netlab

import (
	"bufio"
	"errors"
	"os"
	"strings"
)

type mount struct{ point, fstype string }

// mounts lists what is mounted, as this process sees it.
func mounts() []mount {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	var list []mount
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// proc_pid_mountinfo(5): the mount point is field 5, the type follows the separator after the optional fields.
		left, right, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Fields(left), strings.Fields(right)
		if ok && len(fields) >= 5 && len(rest) > 0 {
			list = append(list, mount{point: unescape.Replace(fields[4]), fstype: rest[0]})
		}
	}
	return list
}

// Cgroup2 is where the unified hierarchy is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid system.
func Cgroup2() (string, error) {
	for _, m := range mounts() {
		if m.fstype == "cgroup2" {
			return m.point, nil
		}
	}
	return "", errors.New("find cgroup2: it is not mounted (mount -t cgroup2 none /sys/fs/cgroup)")
}

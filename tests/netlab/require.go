package netlab

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// TB is the part of testing.TB that Lacks needs, so that the package does not link the testing package.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// ForTest makes a Lab that is closed when the test ends, which then fails if anything is left behind. It ends the test as Lacks does unless a
// Lab can be made here.
func ForTest(tb interface {
	TB
	Cleanup(func())
	Errorf(format string, args ...any)
}) *Lab {
	tb.Helper()
	Require(tb)
	l, err := New()
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Errorf("close the lab: %v", err)
		}
		if leaks := l.Leaks(); len(leaks) > 0 {
			tb.Errorf("left behind: %v", leaks)
		}
	})
	return l
}

// Require ends the test as Lacks does unless a Lab can be made here.
func Require(tb TB) {
	tb.Helper()
	Lacks(tb, Missing()...)
}

// Lacks ends the test unless nothing is missing: it skips and names what is, or fails if the environment says
// REQUIRE_PRIVILEGED=1.
func Lacks(tb TB, missing ...string) {
	tb.Helper()
	switch {
	case len(missing) == 0:
	case os.Getenv("REQUIRE_PRIVILEGED") == "1":
		tb.Fatalf("REQUIRE_PRIVILEGED=1, and missing: %s", strings.Join(missing, "; "))
	default:
		tb.Skipf("missing: %s", strings.Join(missing, "; "))
	}
}

// Missing names what a Lab needs and this process does not have. It is nil when all is there.
func Missing() []string {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "root")
	}
	for _, c := range []struct {
		bit  int
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"}} {
		if !capable(c.bit) {
			missing = append(missing, c.name)
		}
	}
	if root, err := Cgroup2(); err != nil {
		missing = append(missing, "cgroup2 (mount -t cgroup2 none /sys/fs/cgroup)")
	} else if unix.Access(root, unix.W_OK) != nil {
		missing = append(missing, "a writable "+root)
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		missing = append(missing, "IPv6 in the kernel")
	}
	return missing
}

// capable says whether the capability is in this thread's effective set.
func capable(bit int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return data[bit/32].Effective&(1<<(bit%32)) != 0
}

package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

const patience = 30 * time.Second

// labelled is a running provider of labels and a cgroup subtree to label. It ends with the test.
type labelled struct {
	t      *testing.T
	top    string
	claims chan []Claim
	last   []Claim
	first  func() // while the provider tells its first claims, and does not read changes
}

func runXattr(t *testing.T, prepare func(l *labelled), options ...func(*Xattr)) *labelled {
	t.Helper()
	lab := netlab.ForTest(t)
	mount, err := redirect.CgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	l := &labelled{t: t, top: lab.Cgroup().Path(), claims: make(chan []Claim, 1<<12)}
	prepare(l)
	x := NewXattr(mount, slog.New(slog.DiscardHandler))
	for _, o := range options {
		o(x)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- x.Run(ctx, func(c []Claim) {
			if l.first != nil {
				l.first()
				l.first = nil
			}
			l.claims <- c
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l
}

// await waits until the claims below top are exactly these, as "name=service", sorted.
func (l *labelled) await(want ...string) {
	l.t.Helper()
	text := strings.Join(want, " ")
	for deadline := time.After(patience); ; {
		select {
		case l.last = <-l.claims:
		case <-deadline:
			l.t.Fatalf("claimed %q, want %q", l.below(), text)
		}
		if l.below() == text {
			return
		}
	}
}

// below lists the last claims below top: others may be on the node.
func (l *labelled) below() string {
	var all []string
	for _, c := range l.last {
		if name, ok := strings.CutPrefix(c.Cgroup, l.top+"/"); ok {
			what := c.Service
			if c.Invalid != "" {
				what = "!" + c.Invalid
			}
			if c.Ending {
				what += ",ending"
			}
			all = append(all, name+"="+what)
		}
	}
	return strings.Join(all, " ")
}

func (l *labelled) mkdir(name string) string { return mkdir(l.t, filepath.Join(l.top, name)) }

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func rmdir(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func label(t *testing.T, dir, key, value string) {
	t.Helper()
	if err := unix.Lsetxattr(dir, key, []byte(value), 0); err != nil {
		t.Fatalf("set %s of %s: %v", key, dir, err)
	}
}

func unlabel(t *testing.T, dir, key string) {
	t.Helper()
	if err := unix.Lremovexattr(dir, key); err != nil {
		t.Fatalf("remove %s of %s: %v", key, dir, err)
	}
}

func TestLabelledCgroupsAreClaimed(t *testing.T) {
	refused := func(string) (*cgroupWatch, error) { return nil, unix.EPERM }
	for name, option := range map[string]func(*Xattr){
		"watching": func(*Xattr) {},
		"looking":  func(x *Xattr) { x.watch = refused },
	} {
		t.Run(name, func(t *testing.T) {
			l := runXattr(t, func(l *labelled) {
				label(t, mkdir(t, filepath.Join(l.top, "before")), xattrPrefix+"service", "before")
			}, option)
			l.await("before=before")
			web := l.mkdir("web")
			label(t, web, xattrPrefix+"service", "web")
			l.await("before=before", "web=web")
			label(t, web, xattrPrefix+"service", "shop\x00")
			l.await("before=before", "web=shop")
			label(t, web, xattrPrefix+"mode", "open")
			l.await("before=before", `web=!label mode is "open": it must be strict or permissive`)
			unlabel(t, web, xattrPrefix+"mode")
			l.await("before=before", "web=shop")
			inner := l.mkdir("web/inner")
			label(t, inner, xattrPrefix+"service", "inner")
			l.await("before=before", "web=shop", "web/inner=inner")
			unlabel(t, web, xattrPrefix+"service")
			l.await("before=before", "web/inner=inner")
			rmdir(t, inner)
			rmdir(t, web)
			l.await("before=before")
			label(t, l.mkdir("web"), xattrPrefix+"service", "again")
			l.await("before=before", "web=again")
			rmdir(t, filepath.Join(l.top, "before"))
			l.await("web=again")
		})
	}
}

func TestTheOwnerOfADelegatedCgroupClaimsNothing(t *testing.T) {
	l := runXattr(t, func(*labelled) {})
	stolen := l.mkdir("delegated")
	if err := os.Chown(stolen, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	asNobody(t, func() {
		for _, key := range []string{"user.nodeproxy.service", "user.trusted.nodeproxy.service"} {
			if err := unix.Lsetxattr(stolen, key, []byte("bank"), 0); err != nil {
				t.Errorf("the owner cannot set %s, so this shows nothing: %v", key, err)
			}
		}
		if err := unix.Lsetxattr(stolen, xattrPrefix+"service", []byte("bank"), 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("the owner sets a trusted label: %v", err)
		}
	})
	label(t, l.mkdir("marker"), xattrPrefix+"service", "marker") // whatever is claimed of the other is told before
	l.await("marker=marker")
}

// asNobody runs f on a thread of an unprivileged user, which ends with it.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534)
		if errno == 0 {
			f()
			done <- nil
			return
		}
		done <- errno
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestLostChangesAreFoundByLooking(t *testing.T) {
	l := runXattr(t, func(l *labelled) {
		web := mkdir(t, filepath.Join(l.top, "web"))
		l.first = func() {
			overflow(t, filepath.Join(l.top, "overflow"))
			label(t, web, xattrPrefix+"service", "web") // for which there is no room
		}
	})
	l.await()
	l.await("web=web")
}

// overflow makes more changes than a queue takes, below dir, which is gone when it returns.
func overflow(t *testing.T, dir string) {
	text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events")
	if err != nil {
		t.Fatal(err)
	}
	var limit int
	fmt.Sscan(string(text), &limit)
	mkdir(t, dir)
	defer rmdir(t, dir)
	for i := range limit + 1 {
		sub := filepath.Join(dir, fmt.Sprint(i)) // the kernel merges what happens to one name
		mkdir(t, sub)
		rmdir(t, sub)
	}
}

func TestChurnOfCgroupsIsFollowedToTheEnd(t *testing.T) {
	l := runXattr(t, func(*labelled) {})
	const rounds, width = 20, 50
	for round := range rounds {
		var dirs []string
		for i := range width {
			dir := l.mkdir(fmt.Sprintf("r%d-%d", round, i))
			label(t, dir, xattrPrefix+"service", "web")
			dirs = append(dirs, dir)
		}
		for _, dir := range dirs {
			rmdir(t, dir)
		}
	}
	label(t, l.mkdir("last"), xattrPrefix+"service", "last")
	l.await("last=last")
}

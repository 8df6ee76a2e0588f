package redirect_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/redirect"
)

// next opens the node beside the daemon that has it, as one to which that hands over does.
func (n *node) next() *redirect.Redirect {
	n.t.Helper()
	files := n.r.Files()
	cfg := n.cfg
	cfg.Inherited = func(name string) (f *os.File) {
		if files[name] == nil {
			return nil
		}
		raw, err := files[name].SyscallConn()
		if err != nil {
			n.t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			if dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
				f = os.NewFile(uintptr(dup), name)
			}
		})
		if err != nil {
			n.t.Fatal(err)
		}
		delete(files, name)
		return f
	}
	n.r.Freeze()
	r, err := redirect.Open(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func TestWhatADaemonThatDoesNotFollowHasChangedIsTakenBack(t *testing.T) {
	n := newNode(t)
	p, q := n.pod(), n.pod()
	p.serve()
	n.destinations("240.0.0.1")
	rules := []redirect.Rule{{Namespace: p.ns.Cookie, Action: redirect.Strict, Workload: p.id}}
	if err := n.r.SetRules(rules); err != nil {
		t.Fatal(err)
	}
	waitFor(t, p.app(p.cgroup, "NP_APP=listen", "NP_ADDR=:7001"), "listening")
	works := func() {
		t.Helper()
		if out := p.dial("tcp4", "240.0.0.1:80"); !strings.Contains(out, fmt.Sprintf("240.0.0.1:80 for workload %d", p.id)) {
			t.Errorf("the redirect: %s", out)
		}
		if out := p.dialFrom(nil, "tcp4", at(p.v4, 7001)); !strings.Contains(out, "error") {
			t.Errorf("the guard: %s", out)
		}
	}
	works()
	if err := n.r.Unenroll(cgroupID(t, q.cgroup.Path())); err != nil {
		t.Fatal(err)
	}

	other := n.next()
	works() // by its programs
	f, err := os.Open(p.netns.Path())
	if err != nil {
		t.Fatal(err)
	}
	ns, err := other.OpenNamespace(f)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := ns.Outbound[0].Addr().String(), p.ns.Outbound[0].Addr().String(); got != want {
		t.Errorf("the next daemon listens at %s, and the one before at %s", got, want)
	}
	works()
	for _, w := range []*pod{p, q} { // as other workloads
		id, err := other.NewWorkload(7)
		if err == nil {
			err = other.Enroll(w.cgroup.Path(), id, redirect.Nesting{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(other.SetDestinations(nil, nil), other.SetRules(nil), other.Close()); err != nil {
		t.Fatal(err)
	}
	if out := p.dialFrom(nil, "tcp4", at(p.v4, 7001)); !strings.Contains(out, "hello") {
		t.Errorf("the other daemon's rules are not in force: %s", out)
	}

	if err := n.r.Thaw(); err != nil {
		t.Fatal(err)
	}
	for _, d := range n.r.Audit(true) {
		if d.Err != nil {
			t.Error(d.What, d.Err)
		}
	}
	works()
	n.expectAudit()
	if err := n.r.Prune(func(cgroup uint64) bool { return cgroup == cgroupID(t, p.cgroup.Path()) }); err != nil {
		t.Error(err)
	}
	if list := n.r.Enrolled(); len(list) != 1 || list[0].Workload != p.id {
		t.Errorf("enrolled are %+v", list)
	}
	works()
}

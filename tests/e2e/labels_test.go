package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// labelled is a mesh whose node 1 heeds extended attributes: web there has none yet, api on node 2 is enrolled in permissive
// mode, so that it can be reached with and without the mesh. A second daemon that heeds them would take node 1's for its own.
func labelled(t *testing.T) (m *mesh, web, api *netlab.Workload) {
	t.Helper()
	m = newMeshAlone(t)
	m.Daemons[0].Labels = "  xattr {\n    enabled = true\n  }\n"
	web, err := m.Nodes[0].Workload("web")
	m.must(err)
	m.define(0, "web", port, web.IPv4)
	m.serve(web, ":8080", ":9999")
	api, err = m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].EnrollCgroup(meshlab.Enrolment{Cgroup: api.Cgroup, Service: "api", Mode: "permissive"})
	m.define(1, "api", port, api.IPv4)
	m.serve(api, ":8080")
	m.allow("api", "web")
	m.start()
	return m, web, api
}

// label sets labels of a cgroup: keys and values in turn.
func (m *mesh) label(cgroup *netlab.Cgroup, labels ...string) {
	m.t.Helper()
	for pair := range slices.Chunk(labels, 2) {
		m.must(unix.Lsetxattr(cgroup.Path(), "trusted.nodeproxy."+pair[0], []byte(pair[1]), 0))
	}
}

func (m *mesh) unlabel(cgroup *netlab.Cgroup, key string) {
	m.t.Helper()
	m.must(unix.Lremovexattr(cgroup.Path(), "trusted.nodeproxy."+key))
}

// awaitWorkload waits until node 1's daemon has a cgroup in a state ("": not at all).
func (m *mesh) awaitWorkload(cgroup *netlab.Cgroup, service, state string) admin.Workload {
	m.t.Helper()
	var found admin.Workload
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		i := slices.IndexFunc(s.Workloads, func(w admin.Workload) bool { return w.Cgroup == cgroup.Path() })
		if i < 0 && state == "" {
			return nil
		}
		if i < 0 || s.Workloads[i].State != state || s.Workloads[i].Service != service {
			return fmt.Errorf("%s is not %s as %q: %+v", cgroup.Path(), state, service, s.Workloads)
		}
		found = s.Workloads[i]
		return nil
	})
	m.must(err)
	return found
}

// awaitProblem waits until node 1's daemon has a problem of a kind with a service.
func (m *mesh) awaitProblem(service, kind string) {
	m.t.Helper()
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if !slices.ContainsFunc(s.Problems, func(p admin.Problem) bool { return p.Service == service && p.Kind == kind && p.Text != "" }) {
			return fmt.Errorf("%s has no problem %s: %+v", service, kind, s.Problems)
		}
		return nil
	})
	m.must(err)
}

// awaitRefused waits until node 1's daemon refuses a claim of a cgroup with text.
func (m *mesh) awaitRefused(cgroup *netlab.Cgroup, text string) {
	m.t.Helper()
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		for _, r := range s.Refused {
			if r.Cgroup == cgroup.Path() && strings.Contains(r.Why, text) {
				return nil
			}
		}
		return fmt.Errorf("refused are %+v, want %q", s.Refused, text)
	})
	m.must(err)
}

func TestAWorkloadIsEnrolledByALabelWhileItRuns(t *testing.T) {
	m, web, api := labelled(t)
	m.baselines[0] = nil // more is enrolled at the end
	m.getsNothing(web, "-timeout", "2s", m.vip("api"))

	m.label(web.Cgroup, "service", "web")
	if w := m.awaitWorkload(web.Cgroup, "web", "protected"); w.Provider != "xattr" || w.Mode != "strict" {
		t.Errorf("enrolled as %+v", w)
	}
	m.reaches(web, m.vip("api"))
	m.reaches(web, at(api.IPv4, port))
	stranger := m.stranger(0)
	m.getsNothing(stranger, "-timeout", "2s", at(web.IPv4, port))

	m.label(web.Cgroup, "mode", "permissive")
	m.comesToReach(stranger, at(web.IPv4, port))
	m.label(web.Cgroup, "mode", "lax")
	m.awaitRefused(web.Cgroup, `label mode is "lax": it must be strict or permissive`)
	m.awaitWorkload(web.Cgroup, "web", "protected")
	m.reaches(web, m.vip("api")) // a label that means nothing takes nobody out of the mesh
}

func TestALabelNamesTheIdentityAndItsRemovalTakesItAway(t *testing.T) {
	m, web, _ := labelled(t)
	m.baselines[0] = nil
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	m.comesToReach(web, m.vip("api"))
	m.label(web.Cgroup, "service", "shop") // whom api does not allow
	m.awaitWorkload(web.Cgroup, "shop", "protected")
	m.awaitProblem("shop", "unknown-service")
	m.getsNothing(web, "-timeout", "5s", m.vip("api"))
	m.label(web.Cgroup, "mesh", "disabled")
	m.awaitWorkload(web.Cgroup, "", "")
	m.comesToReach(m.stranger(0), at(web.IPv4, port))
	m.label(web.Cgroup, "mesh", "enabled", "service", "web")
	m.comesToReach(web, m.vip("api"))
	m.unlabel(web.Cgroup, "mesh")
	m.unlabel(web.Cgroup, "service")
	m.awaitWorkload(web.Cgroup, "", "")
	m.getsNothing(web, "-timeout", "2s", m.vip("api"))
}

func TestALabelThatTheOwnerOfADelegatedCgroupSetsFetchesNoCertificate(t *testing.T) {
	m, web, _ := labelled(t)
	m.baselines[0] = nil
	m.must(os.Chown(web.Cgroup.Path(), 65534, 65534))
	m.must(asNobody(func() error {
		if err := unix.Lsetxattr(web.Cgroup.Path(), "trusted.nodeproxy.service", []byte("bank"), 0); !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("the owner sets a trusted label: %w", err)
		}
		return unix.Lsetxattr(web.Cgroup.Path(), "user.nodeproxy.service", []byte("bank"), 0)
	}))
	marker, err := m.Nodes[0].Workload("marker")
	m.must(err)
	m.serve(marker, ":8080")
	m.label(marker.Cgroup, "service", "marker")
	m.awaitWorkload(marker.Cgroup, "marker", "protected") // by then the other was read
	status, err := m.Daemons[0].Admin().Status(m.ctx())
	m.must(err)
	for _, c := range status.Certificates {
		if c.Service == "bank" {
			t.Errorf("a certificate: %+v", c)
		}
	}
	for _, w := range status.Workloads {
		if w.Service == "bank" || w.Cgroup == web.Cgroup.Path() {
			t.Errorf("a workload: %+v", w)
		}
	}
}

func TestExclusionsOfALabel(t *testing.T) {
	m, web, api := labelled(t)
	m.baselines[0] = nil
	traced := m.traced(1)
	inbound := func(want admin.Path) {
		t.Helper()
		m.reaches(web, at(api.IPv4, port))
		c := traced.await("connection", func(c admin.Connection) bool { return c.Event == admin.EventOpen && c.Direction == admin.Inbound })
		if c.Path != want {
			t.Errorf("it came by %s, want %s", c.Path, want)
		}
	}
	m.label(web.Cgroup, "service", "web")
	id := m.awaitWorkload(web.Cgroup, "web", "protected").ID
	relabel := func(key, value string) {
		t.Helper()
		m.label(web.Cgroup, key, value)
		m.eventually("the label holds", func() error {
			if now := m.awaitWorkload(web.Cgroup, "web", "protected").ID; now == id {
				return errNotYet
			}
			return nil
		})
		id = m.awaitWorkload(web.Cgroup, "web", "protected").ID
	}
	inbound(admin.PathTunnel)
	relabel("exclude-outbound-ports", "5432,8080")
	inbound(admin.PathPlaintext)
	relabel("exclude-outbound-ports", "5432")
	inbound(admin.PathTunnel)
	relabel("exclude-outbound-cidrs", "192.0.2.0/24,"+api.IPv4.String()+"/32")
	inbound(admin.PathPlaintext)
	m.reaches(web, m.vip("api")) // another address of the same service

	stranger := m.stranger(0)
	m.getsNothing(stranger, "-timeout", "2s", at(web.IPv4, 9999))
	relabel("exclude-inbound-ports", "9999")
	m.comesToReach(stranger, at(web.IPv4, 9999))
	m.getsNothing(stranger, "-timeout", "2s", at(web.IPv4, port))
}

func TestACgroupIsTakenOutOfItsWorkloadByALabel(t *testing.T) {
	m, web, api := labelled(t)
	m.baselines[0] = nil
	inner, err := web.Cgroup.Child("out")
	m.must(err)
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	copied := *web
	inside := &copied
	inside.Cgroup = inner
	m.comesToReach(inside, m.vip("api"))
	m.label(inner, "mesh", "disabled")
	m.awaitWorkload(inner, "", "disabled")
	m.getsNothing(inside, "-timeout", "2s", m.vip("api"))
	m.reaches(inside, at(api.IPv4, port)) // in plaintext
	m.reaches(web, m.vip("api"))
	m.unlabel(inner, "mesh")
	m.awaitWorkload(inner, "", "")
	m.comesToReach(inside, m.vip("api"))
}

func TestProvidersInConflictAreShownAndDecidedByOrder(t *testing.T) {
	m, web, _ := labelled(t)
	m.baselines[0] = nil
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	if err := m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: web.Cgroup.Path(), Service: "shop"}); err == nil || !strings.Contains(err.Error(), "xattr") {
		t.Errorf("enrolled by hand as another service: %v", err)
	}
	api, err := m.Nodes[0].Workload("second")
	m.must(err)
	m.serve(api, ":8080")
	m.must(m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: api.Cgroup.Path(), Service: "second"}))
	m.awaitWorkload(api.Cgroup, "second", "protected")
	m.label(api.Cgroup, "service", "thief")
	m.awaitRefused(api.Cgroup, `enroll claims this cgroup for service "second"`)
	m.awaitWorkload(api.Cgroup, "second", "protected")
	m.must(m.Daemons[0].Admin().Unenroll(m.ctx(), admin.EnrollRequest{Cgroup: api.Cgroup.Path()}))
	m.awaitWorkload(api.Cgroup, "thief", "protected") // then it is the next provider's
}

func TestOnePortOfTheNodeForTwoServicesIsShown(t *testing.T) {
	m, _, _ := labelled(t)
	m.baselines[0] = nil
	for _, name := range []string{"first", "second"} {
		w, err := m.Nodes[0].HostWorkload(name)
		m.must(err)
		m.serve(w, map[string]string{"first": ":7001", "second": ":7002"}[name])
		m.label(w.Cgroup, "service", name, "ports", "7000")
	}
	_, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		details := make(map[string]string)
		for _, w := range s.Workloads {
			details[w.Service] = w.State + " " + w.Detail
		}
		if details["first"] != "protected " || !strings.HasPrefix(details["second"], `protected port 7000 of the node is guarded for service "first"`) {
			return fmt.Errorf("shown are %q", details)
		}
		return nil
	})
	m.must(err)
}

// asNobody runs f on a thread of an unprivileged user, which ends with it.
func asNobody(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

func TestWhatASilentProviderMayHaveEnrolledStaysGuarded(t *testing.T) {
	m, web, api := labelled(t)
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	stranger := m.stranger(0)
	m.stop(0)
	d := m.Daemons[0]
	d.Labels = "  systemd {\n    enabled = true\n  }\n"
	d.Env = append(d.Env, "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+filepath.Join(m.Dir(), "absent"))
	other, err := m.Nodes[0].Workload("other")
	m.must(err)
	d.Enroll(other, "other")
	m.serve(other, ":8080")
	m.must(d.Start(m.ctx()))
	status, err := d.AwaitProtected(m.ctx()) // the other provider's workload does not wait for systemd
	m.must(err)
	if !slices.ContainsFunc(status.Problems, func(p admin.Problem) bool {
		return p.Kind == "systemd" && strings.Contains(p.Text, "systemctl status dbus.socket")
	}) {
		t.Errorf("the problems are %+v", status.Problems)
	}
	m.getsNothing(stranger, "-timeout", "2s", at(web.IPv4, port))
	m.getsNothing(web, "-timeout", "2s", at(api.IPv4, port)) // api would take it in plaintext
	m.stop(0)
	d.Labels = ""
	m.must(d.Start(m.ctx()))
	m.comesToReach(stranger, at(web.IPv4, port)) // now nobody claims it
	m.reaches(web, at(api.IPv4, port))
	m.settle(0)
}

func TestAWorkloadUnenrolledJustBeforeTheDaemonStopsIsLetGo(t *testing.T) {
	m, web, api := labelled(t)
	for range 4 {
		m.label(web.Cgroup, "service", "web")
		m.awaitWorkload(web.Cgroup, "web", "protected")
		m.unlabel(web.Cgroup, "service")
		m.awaitWorkload(web.Cgroup, "", "")
		m.stop(0)
		if out := m.dial(web, at(api.IPv4, port), "peer"); !strings.Contains(out, "accept="+hostPrefix(web.IPv4)) {
			t.Errorf("without nodeproxy web does not reach api directly: %s", out)
		}
		m.restart(0)
	}
}

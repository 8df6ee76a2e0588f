package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/systemdlab"
)

// managed is a provider that follows a real systemd.
type managed struct {
	*labelled
	*systemdlab.Systemd
	provider *Systemd
	holding  atomic.Bool
}

func bootSystemd(t *testing.T) *managed {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: boots systemd")
	}
	netlab.Lacks(t, systemdlab.Missing()...)
	lab := netlab.ForTest(t)
	m := &managed{labelled: &labelled{t: t, claims: make(chan []Claim, 1<<12)}}
	var err error
	if m.Systemd, err = systemdlab.Boot(within30(t), lab); err != nil {
		t.Fatal(err)
	}
	m.top = m.Root
	return m
}

func within30(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, errors.New("not within 30 s"))
	t.Cleanup(cancel)
	return ctx
}

// follow runs the provider until the test ends.
func (m *managed) follow() {
	m.provider = NewSystemd(m.Root, slog.New(slog.DiscardHandler))
	m.provider.dial = func(ctx context.Context) (*dbus.Conn, error) {
		if m.holding.Load() {
			return nil, syscall.ECONNREFUSED
		}
		return m.Dial(ctx)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.provider.Run(ctx, func(c []Claim) { m.claims <- c }) }()
	m.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Error(err)
		}
	})
}

func (m *managed) unit(name string, lines ...string) string {
	m.t.Helper()
	path, err := m.Unit(name, lines...)
	m.must(err)
	return path
}

func (m *managed) do(verb, unit string) {
	m.t.Helper()
	m.must(m.Do(within30(m.t), verb, unit))
}

func (m *managed) reload() {
	m.t.Helper()
	m.must(m.Reload(within30(m.t)))
}

func (m *managed) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

const sleeper = "[Service]\nExecStart=sleep infinity"

func TestUnitsOfARealSystemdAreClaimed(t *testing.T) {
	m := bootSystemd(t)
	m.unit("early.service", sleeper, "[X-NodeProxy]", "Service=early")
	m.unit("plain.service", sleeper)
	m.unit("web.service", sleeper, "[X-NodeProxy]", "Service=web")
	m.do("start", "early.service")
	m.do("start", "plain.service")
	m.follow()
	const early = "system.slice/early.service=early"
	m.await(early)

	m.do("start", "web.service")
	m.await(early, "system.slice/web.service=web")
	for _, c := range m.last {
		if pids, err := os.ReadFile(filepath.Join(c.Cgroup, "cgroup.procs")); err != nil || len(pids) == 0 {
			t.Errorf("nothing runs in %s: %q, %v", c.Cgroup, pids, err)
		}
	}

	m.unit("web.service.d/10.conf", "[X-NodeProxy]", "Service=shop", "Mesh=observe")
	m.do("restart", "web.service") // systemd does not take the drop-in before it is told to, and nor do we
	m.do("start", "dbus.service")
	m.unit("marker.service", sleeper, "[X-NodeProxy]", "Service=marker")
	m.do("start", "marker.service")
	m.await(early, "system.slice/marker.service=marker", "system.slice/web.service=web")
	m.reload()
	m.await(early, "system.slice/marker.service=marker", "system.slice/web.service=shop")
	m.do("stop", "marker.service")
	m.await(early, "system.slice/web.service=shop")

	m.must(os.RemoveAll(filepath.Join(m.Units, "web.service.d")))
	m.reload()
	m.await(early, "system.slice/web.service=web")
	m.unit("web.service", sleeper)
	m.reload()
	m.await(early)
	m.do("stop", "early.service")
	m.await()
}

func TestInstancesOfTemplatesAndSlicesAreClaimedWhereTheyRun(t *testing.T) {
	m := bootSystemd(t)
	m.unit("app-batch.slice", "[Unit]", "DefaultDependencies=no")
	m.unit("job@.service", sleeper, "Slice=app-batch.slice", "[X-NodeProxy]", "Service=job")
	m.unit("job@2.service.d/2.conf", "[X-NodeProxy]", "Service=second")
	m.follow()
	m.await()
	m.do("start", "job@1.service")
	m.await("app.slice/app-batch.slice/job@1.service=job")
	m.do("start", "job@2.service")
	m.await("app.slice/app-batch.slice/job@1.service=job", "app.slice/app-batch.slice/job@2.service=second")
}

func TestTheSocketsOfALabelledServiceAreItsOwn(t *testing.T) {
	m := bootSystemd(t)
	m.unit("app.slice", "[Unit]", "DefaultDependencies=no")
	const noDefaults = "[Unit]\nDefaultDependencies=no\n"
	m.unit("web.service", noDefaults+sleeper, "[X-NodeProxy]", "Service=web")
	m.unit("web.socket", noDefaults+"[Socket]", "ListenStream=127.0.0.1:7000")
	m.unit("second.socket", noDefaults+"[Socket]", "ListenStream=127.0.0.1:7001", "Service=web.service", "Slice=app.slice")
	m.unit("plain.service", noDefaults+sleeper)
	m.unit("plain.socket", noDefaults+"[Socket]", "ListenStream=127.0.0.1:7002")
	m.follow()
	m.await()
	m.do("start", "plain.socket")
	m.do("start", "web.socket")
	m.await("system.slice/web.service=web", "system.slice/web.socket=web")
	m.do("start", "second.socket")
	m.await("app.slice/second.socket=web", "system.slice/web.service=web", "system.slice/web.socket=web")
	for _, c := range m.last {
		if sockets := strings.HasSuffix(c.Cgroup, ".socket"); c.Sockets != sockets {
			t.Errorf("claimed %+v", c)
		}
		if _, err := os.Stat(c.Cgroup); c.Sockets && err != nil {
			t.Errorf("systemd does not listen there: %v", err)
		}
	}
}

func TestAUnitFileThatIsNotRootsAloneIsRefused(t *testing.T) {
	m := bootSystemd(t)
	m.unit("bank.service", sleeper)
	m.must(os.Chown(m.unit("bank.service.d/1.conf", "[X-NodeProxy]", "Service=bank"), 65534, 65534))
	m.follow()
	m.do("start", "bank.service")
	for deadline := time.After(patience); len(m.last) == 0; {
		select {
		case m.last = <-m.claims:
		case <-deadline:
			t.Fatal("nothing is said of it")
		}
	}
	if c := m.last[0]; c.Service != "" || !strings.Contains(c.Invalid, "bank.service.d/1.conf") || !strings.Contains(c.Invalid, "65534") {
		t.Errorf("claimed %+v", c)
	}
}

func TestClaimsOutliveTheBus(t *testing.T) {
	m := bootSystemd(t)
	m.unit("web.service", sleeper, "[X-NodeProxy]", "Service=web")
	m.unit("late.service", sleeper, "[X-NodeProxy]", "Service=late")
	m.do("start", "web.service")
	m.follow()
	m.await("system.slice/web.service=web")

	m.killBus()
	m.awaitProblem(func(err error) bool { return err != nil && strings.Contains(err.Error(), "systemctl status") })
	if len(m.claims) > 0 {
		t.Errorf("claimed without a bus: %v", <-m.claims)
	}
	m.holding.Store(false)
	m.awaitProblem(func(err error) bool { return err == nil })
	m.do("start", "late.service")
	m.await("system.slice/late.service=late", "system.slice/web.service=web")
}

func (m *managed) awaitProblem(ok func(error) bool) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); !ok(m.provider.Problem()); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("the provider says %v", m.provider.Problem())
		}
	}
}

// killBus ends the bus's daemon; until m.holding is false the provider cannot connect again.
func (m *managed) killBus() {
	m.t.Helper()
	m.holding.Store(true)
	m.must(os.WriteFile(filepath.Join(m.Root, "system.slice/dbus.service/cgroup.kill"), []byte("1"), 0))
}

func TestAForgedSignalTakesNothingAway(t *testing.T) {
	m := bootSystemd(t)
	m.unit("web.service", sleeper, "[X-NodeProxy]", "Service=web")
	m.unit("marker.service", sleeper, "[X-NodeProxy]", "Service=marker")
	m.do("start", "web.service")
	m.follow()
	m.await("system.slice/web.service=web")
	conn, err := m.Dial(within30(t))
	m.must(err)
	defer conn.Close()
	var names []string
	m.must(conn.BusObject().Call("org.freedesktop.DBus.ListNames", 0).Store(&names))
	for _, name := range names {
		if !strings.HasPrefix(name, ":") {
			continue
		}
		conn.Send(&dbus.Message{
			Type: dbus.TypeSignal, Flags: dbus.FlagNoReplyExpected,
			Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/systemd1")), dbus.FieldInterface: dbus.MakeVariant(systemdManager),
				dbus.FieldMember: dbus.MakeVariant("UnitRemoved"), dbus.FieldDestination: dbus.MakeVariant(name),
				dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf("", dbus.ObjectPath("/"))),
			},
			Body: []any{"web.service", dbus.ObjectPath("/org/freedesktop/systemd1/unit/web_2eservice")},
		}, nil)
	}
	m.must(conn.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err) // the signals are on their way
	m.do("start", "marker.service")
	m.await("system.slice/marker.service=marker", "system.slice/web.service=web")
}

func TestChurnOfUnitsIsFollowedToTheEnd(t *testing.T) {
	m := bootSystemd(t)
	m.unit("job@.service", sleeper, "[X-NodeProxy]", "Service=job")
	m.unit("plain@.service", sleeper)
	m.follow()
	m.await()
	for i := range 50 {
		m.do("start", fmt.Sprintf("plain@%d.service", i))
		m.do("start", fmt.Sprintf("job@%d.service", i))
		m.do("stop", fmt.Sprintf("job@%d.service", i))
		m.do("stop", fmt.Sprintf("plain@%d.service", i))
	}
	m.do("start", "job@last.service")
	m.await("system.slice/system-job.slice/job@last.service=job")
}

func TestAMissingBusIsAProblemAndNoClaim(t *testing.T) {
	s := NewSystemd("/sys/fs/cgroup", slog.New(slog.DiscardHandler))
	s.dial = func(context.Context) (*dbus.Conn, error) { return nil, syscall.ENOENT }
	m := &managed{labelled: &labelled{t: t, claims: make(chan []Claim, 1)}, provider: s}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(c []Claim) { m.claims <- c }) }()
	m.awaitProblem(func(err error) bool { return err != nil && strings.Contains(err.Error(), "workloads.systemd.enabled") })
	cancel()
	if err := <-done; err != nil || len(m.claims) > 0 {
		t.Errorf("%v, %d claims", err, len(m.claims))
	}
}

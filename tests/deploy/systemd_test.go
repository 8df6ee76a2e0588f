package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/systemdlab"
)

const (
	patience = 2 * time.Minute
	address  = "10.99.0.1" // of the machine

	network = "ip link set lo up; ip addr add " + address + "/32 dev lo\n"
)

const configuration = `
node { name = "node-1"  address = "10.99.0.1" }
source "file" { path = "/etc/nodeproxy/mesh.d" }
workloads { systemd { enabled = true } }
limits { drain = "2s" }
log { access = "all" }
`

const definitions = `
service { name = "api"  port = 8080  address = "10.99.0.1" }
service { name = "queue"  port = 8090  address = "10.99.0.1" }
service { name = "cart"  port = 8080  address = "10.98.0.2" }
service { id = "near"  name = "pair"  port = 8070  address = "10.99.0.1" }
service { id = "far"  name = "pair"  port = 8070  address = "10.98.1.2" }
`

const intentions = `
Kind = "service-intentions"
Name = "api"
Sources = [{ Name = "web"  Action = "allow" }]
`

// host is a machine with a real systemd. Its methods fail the test.
type host struct {
	*systemdlab.Systemd
	t   *testing.T
	log string // of the daemon
}

func newHost(t *testing.T) *host {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: boots systemd")
	}
	netlab.Lacks(t, systemdlab.Missing()...)
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := h.Run(context.Background(), "", "systemctl", "--no-pager", "status", "nodeproxy", "nodeproxy-boot")
			t.Log(out)
		}
		if text, _ := os.ReadFile(h.log); t.Failed() {
			t.Logf("the daemon's log:\n%s\nsystemd:\n%s", text, h.Log())
		}
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
		if leaks := lab.Leaks(); len(leaks) > 0 {
			t.Errorf("left behind: %v", leaks)
		}
	})
	h.Systemd, err = systemdlab.New(lab)
	h.must(err)
	h.log = filepath.Join(filepath.Dir(h.Units), "daemon.log")
	h.unit("api.service", "[Service]", "ExecStart="+built.app+" serve "+address+":8080")
	h.unit("web.service", "[Service]", "ExecStart=sleep infinity")
	h.unit("proxied.service", "[Service]", "ExecStart=sleep infinity")
	// A start can be held up; what it logs can be read; a watchdog that a test can wait for.
	h.unit("nodeproxy.service.d/test.conf", "[Service]", "StandardError=append:"+h.log, "WatchdogSec=3",
		`ExecStartPre=/bin/sh -c 'while [ -e /run/hold ]; do sleep 0.1; done'`)
	h.unit("nodeproxy-boot.service.d/test.conf", "[Service]", "StandardError=append:"+h.log)
	return h
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(h.t.Context(), patience, fmt.Errorf("not within %s", patience))
	h.t.Cleanup(cancel)
	return ctx
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// in returns h for a subtest.
func (h *host) in(t *testing.T) *host {
	sub := *h
	sub.t = t
	return &sub
}

func (h *host) unit(name string, lines ...string) {
	h.t.Helper()
	_, err := h.Unit(name, lines...)
	h.must(err)
}

// sh runs a command line as root of the machine.
func (h *host) sh(line string) string {
	h.t.Helper()
	out, err := h.Run(h.ctx(), "", "sh", "-ec", line)
	h.must(err)
	return strings.TrimSpace(out)
}

// dial connects from the cgroup of a unit, or of none, and returns what the application prints.
func (h *host) dial(unit, to string) string {
	h.t.Helper()
	out, err := h.Run(h.ctx(), unit, built.app, "dial", "-timeout", "5s", to, "peer")
	h.must(err)
	return out
}

func (h *host) reaches(unit, to string) {
	h.t.Helper()
	if out := h.dial(unit, to); !strings.Contains(out, "accept=") {
		h.t.Fatalf("%s does not reach %s: %s", unit, to, out)
	}
}

// comesToReach waits until an application listens, or an instance is healthy.
func (h *host) comesToReach(unit, to string) {
	h.t.Helper()
	h.eventually(unit+" reaches "+to, func() error {
		if out := h.dial(unit, to); !strings.Contains(out, "accept=") {
			return errors.New(out)
		}
		return nil
	})
}

func (h *host) getsNothing(unit, to string) {
	h.t.Helper()
	if out := h.dial(unit, to); strings.Contains(out, "accept=") {
		h.t.Fatalf("%q reaches %s: %s", unit, to, out)
	}
}

func (h *host) eventually(what string, check func() error) {
	h.t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	h.t.Fatalf("%s: %v", what, err)
}

// awaitStatus waits until the daemon tells the service manager that.
func (h *host) awaitStatus(text string) {
	h.t.Helper()
	h.eventually("the unit's status", func() error {
		if got := h.sh("systemctl show -P StatusText nodeproxy"); got != text {
			return fmt.Errorf("it is %q, want %q", got, text)
		}
		return nil
	})
}

func (h *host) status() *admin.Status {
	h.t.Helper()
	socket, err := h.Inside(admin.DefaultSocket)
	h.must(err)
	s, err := admin.NewClient(socket).Status(h.ctx())
	h.must(err)
	return s
}

func (h *host) virtual(service string) string {
	h.t.Helper()
	for _, svc := range h.status().Services {
		if svc.Name == service {
			return svc.Virtual[0]
		}
	}
	h.t.Fatalf("there is no service %s", service)
	return ""
}

// configure defines the mesh and labels units.
func (h *host) configure() {
	h.t.Helper()
	for path, text := range map[string]string{
		"/etc/nodeproxy/nodeproxy.hcl": configuration, "/etc/nodeproxy/mesh.d/nodes/node-1/api.hcl": definitions, "/etc/nodeproxy/mesh.d/config/api.hcl": intentions,
	} {
		h.sh("mkdir -p $(dirname " + path + "); cat >" + path + " <<'END'\n" + text + "END\n")
	}
}

func (h *host) label(unit string, lines ...string) {
	h.t.Helper()
	h.unit(unit+".d/mesh.conf", append([]string{"[X-NodeProxy]"}, lines...)...)
}

func deb(dir, version string) string {
	return filepath.Join(dir, "nodeproxy_"+version+"-1_"+runtime.GOARCH+".deb")
}

func TestThePackageOnARealSystemd(t *testing.T) {
	h := newHost(t)
	h.must(h.Boot(h.ctx(), network))
	run := func(name string, test func(h *host)) {
		if !t.Failed() {
			t.Run(name, func(t *testing.T) { test(h.in(t)) })
		}
	}
	run("installed, it does nothing", func(h *host) {
		h.sh("dpkg --force-unsafe-io -i " + deb(built.first, firstVersion))
		if got := h.sh("systemctl is-enabled nodeproxy nodeproxy-boot || true"); got != "disabled\ndisabled" {
			h.t.Errorf("enabled: %s", got)
		}
		if got := h.sh("systemctl is-active nodeproxy || true"); got != "inactive" {
			h.t.Errorf("active: %s", got)
		}
		h.sh("systemctl start nodeproxy-boot nodeproxy") // with the configuration that comes along
		h.awaitStatus("0 workloads, all protected")
		h.sh("systemctl stop nodeproxy-boot nodeproxy; nodeproxy cleanup")
	})
	var api string
	run("units are enrolled by a drop-in while they run", func(h *host) {
		h.configure()
		h.sh("systemctl enable --now nodeproxy; systemctl start api web proxied")
		h.comesToReach("", address+":8080")
		h.label("api.service", "Service=api")
		h.label("web.service", "Service=web")
		h.label("proxied.service", "Service=web", "SameNode=mtls")
		h.sh("systemctl daemon-reload")
		h.awaitStatus("3 workloads, all protected")
		api = h.virtual("api") + ":8080"
		h.comesToReach("web.service", api)
		h.getsNothing("", address+":8080")
		h.reaches("proxied.service", api)
		h.eventually("a connection by mTLS", func() error {
			log, _ := os.ReadFile(h.log)
			if !strings.Contains(string(log), "path=mtls") && !strings.Contains(string(log), "path=tunnel") {
				return errors.New("none is logged")
			}
			return nil
		})
		if got := h.sh("systemctl show -P ControlGroup nodeproxy"); got != "/nodeproxy.slice/nodeproxy.service" {
			h.t.Errorf("the daemon is in %s", got)
		}
	})
	run("a service that its socket starts is reached, and started, through the mesh alone", activatedBySocket)
	run("services in network namespaces of their own are protected there", func(h *host) { inOwnNamespaces(h, api) })
	run("a unit that is being stopped is called only if there is no other", unitIsStopped)
	run("an upgrade keeps live connections, and fails no new one", func(h *host) {
		live, err := h.Start("web.service", built.app, "dial", "-timeout", "10m", api, "stream")
		h.must(err)
		defer live.Kill()
		h.must(live.WaitOutput(h.ctx(), "\n"))
		main := h.sh("systemctl show -P MainPID nodeproxy")
		if failed := h.underLoad(api, func() { h.sh("dpkg --force-unsafe-io -i " + deb(built.second, secondVersion)) }); failed > 0 {
			h.t.Errorf("%d calls failed", failed)
		}
		h.eventually("the older daemon is gone, and the next is the unit's main process", func() error {
			if got := h.sh("systemctl show -P MainPID nodeproxy; cat /sys/fs/cgroup/nodeproxy.slice/nodeproxy.service/cgroup.procs"); got == "0" || strings.Contains(got, main) || strings.Count(got, "\n") != 1 {
				return errors.New(got)
			}
			return nil
		})
		if got := h.sh("systemctl show -P NRestarts -P SubState nodeproxy"); got != "0\nrunning" {
			h.t.Errorf("restarts and state of the unit: %s", got)
		}
		if got := h.status().Version; got != secondVersion {
			h.t.Errorf("version %s runs", got)
		}
		before := len(live.Output())
		h.eventually("the connection goes on", func() error {
			if len(live.Output()) <= before+1000 {
				return fmt.Errorf("it ended: %.300s", live.Output())
			}
			return nil
		})
		h.awaitStatus("3 workloads, all protected")
		h.reaches("web.service", api)
		h.getsNothing("", address+":8080")
	})
	run("a reload with a configuration that is wrong says so, and the daemon goes on", func(h *host) {
		h.sh("cp /etc/nodeproxy/nodeproxy.hcl /run/good; echo 'limit {}' >>/etc/nodeproxy/nodeproxy.hcl")
		if out, err := h.Run(h.ctx(), "", "systemctl", "reload", "nodeproxy"); err == nil {
			h.t.Errorf("it is taken: %s", out)
		}
		h.sh("cp /run/good /etc/nodeproxy/nodeproxy.hcl")
		h.reaches("web.service", api)
		h.sh("systemctl reload nodeproxy")
		h.awaitStatus("3 workloads, all protected")
		h.reaches("web.service", api)
	})
	run("a restart fails no new connection", func(h *host) { restarts(h, api) })
	run("a restart answers the name queries that are on their way", queriesOnTheirWay)
	run("a crash fails what the daemon carried, and no new connection", func(h *host) { crashesUnderLoad(h, api) })
	run("what is kept of a namespace that goes during a restart is closed", namespaceGoesMeanwhile)
	run("while its program is not there systemd tries on, and what waits is served at last", func(h *host) { programIsGone(h, api) })
	run("a stop ends what waits for a daemon", func(h *host) { stopEndsWhatWaits(h, api) })
	run("a downgrade to another map ABI is refused", func(h *host) {
		h.sh("mkdir /sys/fs/bpf/nodeproxy/node-1/v99")
		out, err := h.Run(h.ctx(), "", "dpkg", "--force-unsafe-io", "-i", deb(built.first, firstVersion))
		if err == nil || !strings.Contains(out, "node-1/v99 is of map ABI v99, and this version has v") {
			h.t.Errorf("%v: %s", err, out)
		}
		h.sh("rmdir /sys/fs/bpf/nodeproxy/node-1/v99")
		if got := h.status().Version; got != secondVersion {
			h.t.Errorf("version %s runs", got)
		}
		h.reaches("web.service", api)
	})
	run("after a crash it is started again, and nothing passes between", func(h *host) {
		h.sh("touch /run/hold; systemctl kill --signal KILL --kill-who main nodeproxy")
		h.eventually("it starts again", func() error {
			if got := h.sh("systemctl show -P SubState nodeproxy"); got != "start-pre" {
				return errors.New(got)
			}
			return nil
		})
		h.getsNothing("proxied.service", api)
		h.getsNothing("", address+":8080")
		h.eventually("what was granted rests with the heartbeat", func() error {
			if out := h.dial("web.service", api); strings.Contains(out, "accept=") {
				return errors.New(out)
			}
			return nil
		})
		h.sh("rm /run/hold")
		h.awaitStatus("3 workloads, all protected")
		h.reaches("web.service", api)
		h.reaches("proxied.service", api)
	})
	run("a daemon that hangs is ended by the watchdog", func(h *host) {
		before := h.sh("systemctl show -P NRestarts nodeproxy")
		h.sh("systemctl kill --signal STOP --kill-who main nodeproxy")
		h.eventually("it is started again", func() error {
			if h.sh("systemctl show -P NRestarts nodeproxy") == before {
				return errors.New("it was not started again")
			}
			return nil
		})
		h.awaitStatus("3 workloads, all protected")
		h.reaches("web.service", api)
	})
	run("removed, nothing is left", func(h *host) {
		pins, err := h.Inside("/sys/fs/bpf/nodeproxy")
		h.must(err)
		pinned, err := netlab.Pinned(pins)
		h.must(err)
		if len(pinned) == 0 {
			h.t.Fatal("nothing is pinned before")
		}
		h.sh("dpkg -r nodeproxy")
		h.eventually("all is gone from the kernel", func() error {
			for _, o := range pinned {
				if o.Exists() {
					return fmt.Errorf("%s is there", o)
				}
			}
			return nil
		})
		h.reaches("", address+":8080")
		h.reaches("web.service", address+":8080")
		if got := h.sh("ls -d /sys/fs/bpf/nodeproxy* /sys/fs/cgroup/nodeproxy* /run/nodeproxy /usr/bin/nodeproxy /etc/systemd/system/*/nodeproxy* 2>/dev/null || true"); got != "" {
			h.t.Errorf("there remain %s", got)
		}
		h.sh("test -e /etc/nodeproxy/nodeproxy.hcl")
		h.sh("dpkg -P nodeproxy")
		h.sh("test ! -e /etc/nodeproxy/nodeproxy.hcl && test ! -e /var/lib/nodeproxy")
	})
}

func TestAtBootWorkloadsAreClosedUntilTheDaemonRuns(t *testing.T) {
	h := newHost(t)
	h.label("web.service", "Service=web")
	h.label("api.service", "Service=api")
	h.unit("nodeproxy.service.d/held.conf", "[Unit]", "After=network-pre.target")
	h.unit("lab.target.d/boot.conf", "[Unit]", "Wants=nodeproxy.service sysinit.target web.service api.service")
	h.unit("network-pre.target.d/note.conf", "[Unit]", "Description=the network")
	h.must(h.Boot(h.ctx(), network+`
dpkg --force-unsafe-io -i `+deb(built.first, firstVersion)+`
mkdir -p /etc/nodeproxy/mesh.d/nodes/node-1
cat >/etc/nodeproxy/nodeproxy.hcl <<'END'
`+configuration+`END
cat >/etc/nodeproxy/mesh.d/nodes/node-1/api.hcl <<'END'
`+definitions+`END
cat >/etc/nodeproxy/mesh.d/config/api.hcl <<'END'
`+intentions+`END
systemctl enable nodeproxy
touch /run/hold
`))
	h.eventually("web runs, and the daemon does not", func() error {
		got := h.sh("systemctl show -P SubState nodeproxy-boot web nodeproxy")
		if strings.Join(strings.Fields(got), " ") != "exited running start-pre" {
			return errors.New(got)
		}
		return nil
	})
	h.comesToReach("", address+":8080")
	h.getsNothing("web.service", address+":8080") // api's own address, in plaintext
	at := func(unit, moment string) string {
		return h.sh("systemctl show -P " + moment + "TimestampMonotonic " + unit)
	}
	for _, later := range []string{"network-pre.target", "sysinit.target", "web.service"} {
		if first, then := at("nodeproxy-boot", "ActiveEnter"), at(later, "ActiveEnter"); len(first) > len(then) || len(first) == len(then) && first >= then {
			t.Errorf("%s was up at %s, before what closes the workloads, at %s", later, then, first)
		}
	}
	h.sh("rm /run/hold")
	h.awaitStatus("2 workloads, all protected")
	h.comesToReach("web.service", address+":8080")
}

package deploy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"nodeproxy.io/tests/netlab"
)

// underLoad has two units call an address while change happens, one of them by mTLS, and returns how many calls failed.
func (h *host) underLoad(to string, change func()) (failed int) {
	h.t.Helper()
	h.sh("rm -f /run/enough")
	var all []*netlab.Process
	for _, unit := range []string{"web.service", "proxied.service"} {
		p, err := h.Start(unit, "sh", "-c", `while [ ! -e /run/enough ]; do sleep 0.1; done | "$0" load -n 500 -more -c 2 "$1"`, built.app, to)
		h.must(err)
		defer p.Kill()
		all = append(all, p)
	}
	h.sh("sleep 0.3")
	change()
	h.sh("touch /run/enough")
	for _, p := range all {
		h.must(p.Wait(h.ctx()))
		var n, lost int
		last := p.Output()[strings.LastIndex(p.Output(), "done"):]
		if _, err := fmt.Sscanf(last, "done %d failed %d\n", &n, &lost); err != nil || n < 500 {
			h.t.Fatalf("the load says %q", p.Output())
		}
		if failed += lost; lost > 0 {
			h.t.Logf("of %d calls: %s", n, p.Output())
		}
		if strings.Contains(p.Output(), "ECONNREFUSED") {
			h.t.Error("a connection was refused")
		}
	}
	return failed
}

// kept is how many files systemd keeps for the daemon.
func (h *host) kept() int {
	h.t.Helper()
	n, err := strconv.Atoi(h.sh("systemctl show -P NFileDescriptorStore nodeproxy"))
	h.must(err)
	return n
}

func restarts(h *host, api string) {
	held := h.kept()
	if held < 3 { // two listeners, IPv4 alone, and what goes with them
		h.t.Errorf("systemd keeps %d files", held)
	}
	h.sh("cp /usr/bin/nodeproxy /run/program; cp /run/program /usr/bin/nodeproxy.next; mv /usr/bin/nodeproxy.next /usr/bin/nodeproxy") // another file
	main := h.sh("systemctl show -P MainPID nodeproxy")
	if failed := h.underLoad(api, func() { h.sh("systemctl restart nodeproxy") }); failed > 0 {
		h.t.Errorf("%d calls failed", failed)
	}
	if now := h.sh("systemctl show -P MainPID nodeproxy"); now == main {
		h.t.Error("the daemon is the same")
	}
	h.awaitStatus("3 workloads, all protected")
	if now := h.kept(); now != held {
		h.t.Errorf("systemd keeps %d files, and kept %d before the restart", now, held)
	}
}

// queriesOnTheirWay has a name server that answers once the daemon is being restarted.
func queriesOnTheirWay(h *host) {
	h.sh("echo 'dns { enabled = true }' >>/etc/nodeproxy/nodeproxy.hcl; systemctl reload nodeproxy")
	h.awaitStatus("3 workloads, all protected")
	server, err := h.Start("", "sh", "-c", `while [ "$(systemctl show -P SubState nodeproxy)" = running ]; do sleep 0.05; done | "$0" late 127.0.0.99:53`, built.app)
	h.must(err)
	defer server.Kill()
	h.must(server.WaitOutput(h.ctx(), "ready udp"))
	h.must(server.WaitOutput(h.ctx(), "ready tcp"))
	var asking []*netlab.Process
	for _, network := range []string{"+notcp", "+tcp"} {
		p, err := h.Start("web.service", "dig", "@127.0.0.99", network, "+short", "+tries=1", "+time=30", "TXT", network[1:])
		h.must(err)
		defer p.Kill()
		asking = append(asking, p)
		h.must(server.WaitOutput(h.ctx(), "heard "+network[1:]))
	}
	h.sh("systemctl restart nodeproxy")
	for _, p := range asking {
		if err := p.Wait(h.ctx()); err != nil || p.Output() != "\"late\"\n" {
			h.t.Errorf("a query that the daemon had read is answered by %q, %v", p.Output(), err)
		}
	}
	h.awaitStatus("3 workloads, all protected")
}

func crashesUnderLoad(h *host, api string) {
	failed := h.underLoad(api, func() {
		before := h.sh("systemctl show -P NRestarts nodeproxy")
		h.sh("systemctl kill --signal KILL --kill-who main nodeproxy")
		h.eventually("it is started again", func() error {
			if h.sh("systemctl show -P NRestarts nodeproxy") == before {
				return errors.New("it was not")
			}
			return nil
		})
		h.awaitStatus("3 workloads, all protected")
	})
	if failed > 4 { // the calls of that moment, if all are carried
		h.t.Errorf("%d calls failed, more than the daemon could carry when it crashed", failed)
	}
}

func namespaceGoesMeanwhile(h *host) {
	held := h.kept()
	h.unit("passing.service", "[Service]", "PrivateNetwork=yes", "ExecStart=sleep infinity")
	h.label("passing.service", "Service=passing")
	h.sh("systemctl daemon-reload; systemctl start passing")
	h.awaitState("passing.service", "protected")
	h.eventually("its listeners are kept", func() error {
		if now := h.kept(); now <= held {
			return fmt.Errorf("%d files are kept, and were before", now)
		}
		return nil
	})
	h.restartHeld()
	h.sh("systemctl stop passing; rm -r " + h.Units + "/passing.*; systemctl daemon-reload; rm /run/hold")
	h.awaitStatus("3 workloads, all protected")
	h.eventually("nothing of it is kept", func() error {
		if now := h.kept(); now != held {
			return fmt.Errorf("%d files are kept, and %d before", now, held)
		}
		return nil
	})
}

// restartHeld restarts the daemon, which does not start before /run/hold is removed.
func (h *host) restartHeld() {
	h.t.Helper()
	h.sh("touch /run/hold; systemctl restart --no-block nodeproxy")
	h.eventually("it starts again", func() error {
		if got := h.sh("systemctl show -P SubState nodeproxy"); got != "start-pre" {
			return errors.New(got)
		}
		return nil
	})
}

func programIsGone(h *host, api string) {
	h.sh("mv /usr/bin/nodeproxy /run/program; systemctl kill --signal KILL --kill-who main nodeproxy")
	waits, err := h.Start("proxied.service", built.app, "dial", "-timeout", "10m", api, "peer")
	h.must(err)
	defer waits.Kill()
	h.must(waits.WaitOutput(h.ctx(), "connected"))
	h.eventually("new connections are refused", func() error {
		if out := h.dial("proxied.service", api); !strings.Contains(out, "refused") {
			return errors.New(out)
		}
		return nil
	})
	h.eventually("the start has failed more often than systemd allows by default", func() error {
		n, err := strconv.Atoi(h.sh("systemctl show -P NRestarts nodeproxy"))
		h.must(err)
		if n < 10 {
			return fmt.Errorf("%d restarts", n)
		}
		return nil
	})
	select {
	case <-waits.Done():
		h.t.Errorf("what waited is told %q", waits.Output())
	default:
	}
	h.sh("mv /run/program /usr/bin/nodeproxy")
	h.awaitStatus("3 workloads, all protected")
	h.must(waits.Wait(h.ctx()))
	if !strings.Contains(waits.Output(), "accept=") {
		h.t.Errorf("what waited is told %q", waits.Output())
	}
	h.reaches("proxied.service", api)
}

func stopEndsWhatWaits(h *host, api string) {
	h.restartHeld()
	waits, err := h.Start("proxied.service", built.app, "dial", "-timeout", "10m", api, "peer")
	h.must(err)
	defer waits.Kill()
	h.must(waits.WaitOutput(h.ctx(), "connected"))
	h.sh("systemctl stop nodeproxy")
	h.must(waits.Wait(h.ctx()))
	if !strings.Contains(waits.Output(), "end: reset") {
		h.t.Errorf("what waited is told %q", waits.Output())
	}
	if now := h.kept(); now != 0 {
		h.t.Errorf("systemd keeps %d files of a daemon that is stopped", now)
	}
	h.getsNothing("proxied.service", api)
	h.sh("rm /run/hold; systemctl start nodeproxy")
	h.awaitStatus("3 workloads, all protected")
	h.reaches("proxied.service", api)
}

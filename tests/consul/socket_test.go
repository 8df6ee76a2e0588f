package consul

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

func TestAnUpstreamsSocketIsTheWorkloadsOwn(t *testing.T) {
	m := newMesh(t)
	const api, spare, user = 8081, 8082, 4711
	m.instance(1, "api", "api-1", api, nil)
	m.instance(1, "spare", "spare-1", spare, nil)
	web, err := m.Nodes[0].Workload("web")
	m.must(err)
	batch := m.hosted(0, "batch")
	m.idle(batch)
	const mounted = "/mnt" // the workload sees a file system of its own there
	dir := filepath.Join(mounted, "upstreams")
	toAPI, toSpare, taken := filepath.Join(dir, "api.sock"), filepath.Join(dir, "spare.sock"), filepath.Join(dir, "taken.sock")

	app, err := web.Start(netlab.Command{Path: "/usr/bin/unshare", Args: []string{"--mount", "sh", "-c", fmt.Sprintf(
		"mount -t tmpfs none %s && mkdir -m 755 %s && chown %d %[2]s && exec setpriv --reuid %[3]d --regid %[3]d --clear-groups %[4]s serve :%[5]d", mounted, dir, user, programs.app, port)}})
	m.must(err)
	m.must(app.WaitOutput(m.ctx(), "ready"))
	inside := []string{"--mount", "--target", strconv.Itoa(app.PID()), programs.app}
	dial := func(w *netlab.Workload, args ...string) string {
		t.Helper()
		p, err := w.Start(netlab.Command{Path: "/usr/bin/nsenter", Args: append(append(inside[:len(inside):len(inside)], "dial"), args...)})
		m.must(err)
		m.must(p.Wait(m.ctx()))
		return p.Output()
	}
	holder, err := web.Start(netlab.Command{Path: "/usr/bin/nsenter", Args: append(inside[:len(inside):len(inside)], "serve", "-unix", taken)})
	m.must(err)
	m.must(holder.WaitOutput(m.ctx(), "ready"))
	m.must(os.Chown("/proc/"+strconv.Itoa(app.PID())+"/root"+taken, user, user))
	seen := func(path string) (fs.FileInfo, error) {
		return os.Stat("/proc/" + strconv.Itoa(app.PID()) + "/root" + path)
	}
	reaches := func(what string, path string, want func(string) bool) {
		t.Helper()
		m.await(what, func() error {
			if out := dial(web, path, "peer"); !want(out) {
				return errors.New(out)
			}
			return nil
		})
	}

	register := func(upstreams ...map[string]any) {
		t.Helper()
		s := Service("web", "web-1", web.IPv4.String(), port)
		s["Meta"] = map[string]string{"nodeproxy-upstreams": "spare:" + toSpare + ", spare:" + taken}
		s["Connect"].(map[string]any)["SidecarService"].(map[string]any)["Proxy"] = map[string]any{"Upstreams": upstreams}
		m.must(m.agents[0].Register(m.ctx(), s))
	}
	upstream := map[string]any{"DestinationName": "api", "LocalBindSocketPath": toAPI, "LocalBindSocketMode": "0666"}
	register(upstream)
	m.must(m.agents[0].Register(m.ctx(), Service("batch", "batch-1", batch.IPv4.String(), port+1)))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow", "batch": "allow"}))
	m.must(m.agents[0].Intentions(m.ctx(), "spare", map[string]string{"web": "allow"}))
	m.start([]string{"web", "batch"}, []string{"api", "spare"})
	enroll := func() {
		t.Helper()
		if out, err := m.cli(0, "enroll", web.Cgroup.Path(), "--service", "web", "--socket", m.Daemons[0].Socket()); err != nil {
			t.Fatalf("enroll: %v: %s", err, out)
		}
	}
	enroll()

	reaches("web reaches api at its socket", toAPI, at(api))
	reaches("web reaches spare at a socket that its meta names", toSpare, at(spare))
	for path, mode := range map[string]fs.FileMode{toAPI: 0o666, toSpare: 0o600} {
		if info, err := seen(path); err != nil || info.Mode().Perm() != mode || info.Sys().(*syscall.Stat_t).Uid != user {
			t.Errorf("%s is %v: %v", path, info, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is seen outside the workload: %v", path, err)
		}
	}
	_, err = m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if !strings.Contains(fmt.Sprint(s.Workloads), taken+": another process listens there") {
			return fmt.Errorf("that %s is taken is not told: %+v", taken, s.Workloads)
		}
		return nil
	})
	m.must(err)
	if out := dial(web, taken, "peer"); !reached(out) {
		t.Errorf("who listened there before does not any more: %s", out)
	}

	stranger, err := m.Nodes[0].Workload("stranger") // in no workload
	m.must(err)
	for _, other := range []*netlab.Workload{batch, stranger} { // the mode lets them in
		if out := dial(other, toAPI, "peer"); reached(out) || strings.Contains(out, "refused") {
			t.Errorf("%s at the socket of web: %s", other.Name, out)
		}
	}
	if text := m.metrics(0); !counts(text, "nodeproxy_denied_total", map[string]string{"reason": "unknown-origin"}) {
		t.Error("those are not counted")
	}

	stream, err := web.Start(netlab.Command{Path: "/usr/bin/nsenter", Args: append(inside[:len(inside):len(inside)], "dial", toAPI, "stream")})
	m.must(err)
	m.must(stream.WaitOutput(m.ctx(), "a line"))
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "deny"}))
	m.must(stream.Wait(m.ctx()))
	if out := dial(web, toAPI, "peer"); reached(out) {
		t.Errorf("web still reaches api: %s", out)
	}
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	reaches("web reaches api again", toAPI, at(api))

	m.must(os.Remove("/proc/" + strconv.Itoa(app.PID()) + "/root" + toAPI))
	reaches("a socket that was removed comes back", toAPI, at(api))
	m.Daemons[0].Process.Kill()
	m.must(m.Daemons[0].Start(m.ctx()))
	reaches("what a killed daemon left is replaced", toAPI, at(api))

	made, err := seen(toAPI)
	m.must(err)
	before, err := m.Daemons[0].Replace(m.ctx(), nil)
	m.must(err)
	m.must(before.Wait(m.ctx()))
	if out := dial(web, toAPI, "peer"); !at(api)(out) {
		t.Errorf("after a hand-over web does not reach api at its socket: %s", out)
	}
	if now, err := seen(toAPI); err != nil || !os.SameFile(made, now) {
		t.Errorf("the socket is not the one that was handed over: %v, %v", now, err)
	}
	isGone := func(what string, paths ...string) {
		t.Helper()
		m.await(what, func() error {
			for _, path := range paths {
				if _, err := seen(path); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("%s is there", path)
				}
			}
			return nil
		})
	}
	register()
	isGone("the socket goes with its upstream", toAPI)
	register(upstream)
	reaches("and comes with it", toAPI, at(api))
	if out, err := m.cli(0, "unenroll", web.Cgroup.Path(), "--socket", m.Daemons[0].Socket()); err != nil {
		t.Fatalf("unenroll: %v: %s", err, out)
	}
	isGone("all sockets go with the enrolment", toAPI, toSpare)
	if _, err := seen(taken); err != nil {
		t.Errorf("what was not ours is gone: %v", err)
	}
	enroll()
	reaches("web is enrolled again", toAPI, at(api))
	m.must(m.Daemons[0].Stop(m.ctx()))
	isGone("all sockets go with the daemon", toAPI, toSpare)
}

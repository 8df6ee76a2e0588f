package consul

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/systemdlab"
)

// units are those of a real systemd: api with a sidecar of nodeproxy's, shop with one of the operator's, web that calls them, and the
// daemon.
type units struct {
	*mesh
	host  *systemdlab.Systemd
	agent *Agent
	front *Front // before agent, for the daemon
}

const machine = "10.99.0.1" // the address of it all

// newUnits boots them, with more lines in the daemon's unit.
func newUnits(t *testing.T, more ...string) *units {
	t.Helper()
	require(t)
	netlab.Lacks(t, systemdlab.Missing()...)
	lab := netlab.ForTest(t)
	u := &units{mesh: &mesh{t: t}}
	var err error
	u.host, err = systemdlab.New(lab)
	u.must(err)
	for name, port := range map[string]string{"api": "8080", "shop": "8081"} {
		u.unit(name, "ExecStart="+programs.app+" serve :"+port, "ExecStop=sh -c 'until [ -e /run/enough ]; do sleep 0.1; done'", "[X-NodeProxy]", "Service="+name)
	}
	u.unit("web", "ExecStart=sleep infinity", "[X-NodeProxy]", "Service=web")
	config, log := filepath.Join(filepath.Dir(u.host.Units), "nodeproxy.hcl"), filepath.Join(filepath.Dir(u.host.Units), "daemon.log")
	u.unit("nodeproxy", append(more, "Type=notify", "FileDescriptorStoreMax=1000", "ExecStart="+programs.nodeproxy+" run --config "+config, "StandardError=append:"+log)...)
	u.must(u.host.Boot(u.ctx(), "ip link set lo up; ip addr add "+machine+"/32 dev lo"))
	t.Cleanup(func() {
		if text, _ := os.ReadFile(log); t.Failed() || strings.Contains(string(text), "DATA RACE") {
			t.Errorf("the daemon's log:\n%s\nsystemd's:\n%s", text, u.host.Log())
		}
	})
	u.agent, err = Start(u.ctx(), lab, Config{Node: "node-1", Address: machine, HCL: WithACLs, Token: Management, Systemd: u.host})
	u.must(err)
	u.front = NewFront(t, u.agent.Socket())
	u.must(u.agent.Register(u.ctx(), map[string]any{"Name": "web", "ID": "web-1", "Address": machine, "Port": 8090}))
	u.must(u.agent.Register(u.ctx(), map[string]any{"Name": "api", "ID": "api-1", "Address": machine, "Port": 8080}))
	u.must(u.agent.Register(u.ctx(), Service("shop", "shop-1", machine, 8081)))
	for _, name := range []string{"api", "shop"} {
		u.must(u.agent.Intentions(u.ctx(), name, map[string]string{"web": "allow"}))
	}
	token, err := u.agent.NewToken(u.ctx(), "nodeproxy", rules(t, "node-1", "web", "api", "shop"))
	u.must(err)
	u.must(os.WriteFile(config+".token", []byte(token), 0o600))
	u.must(os.WriteFile(config, fmt.Appendf(nil, "node { name = \"node-1\"  address = %q }\nsource \"consul\" { address = \"unix://%s\"  token_file = %q }\nworkloads { systemd { enabled = true } }\n", machine, u.front.Socket, config+".token"), 0o600))
	for _, name := range []string{"web", "api", "shop", "nodeproxy"} {
		u.must(u.host.Do(u.ctx(), "start", name+".service"))
	}
	return u
}

func (u *units) unit(name string, lines ...string) {
	u.t.Helper()
	_, err := u.host.Unit(name+".service", append([]string{"[Service]"}, lines...)...)
	u.must(err)
}

func (u *units) status() (*admin.Status, error) {
	socket, err := u.host.Inside(admin.DefaultSocket)
	if err != nil {
		return nil, err
	}
	return admin.NewClient(socket).Status(u.ctx())
}

// virtual is the virtual address of a service.
func (u *units) virtual(service string) string {
	u.t.Helper()
	var found string
	u.must(u.agent.Await(u.ctx(), "gives "+service+" a virtual address", func() error {
		status, err := u.status()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(status.Services, func(s admin.Service) bool { return s.Name == service && len(s.Virtual) > 0 })
		if i < 0 {
			return fmt.Errorf("services are %+v", status.Services)
		}
		found = status.Services[i].Virtual[0] + ":80"
		return nil
	}))
	return found
}

// passing waits until the sidecar of a service passes its checks, or does not.
func (u *units) passing(service string, want bool) {
	u.t.Helper()
	u.must(u.agent.Await(u.ctx(), fmt.Sprintf("passes %s: %v", service, want), func() error {
		var all []map[string]any
		err := u.agent.Do(u.ctx(), http.MethodGet, "/v1/health/connect/"+service+"?passing", nil, &all)
		if err == nil && (len(all) == 1) != want {
			err = fmt.Errorf("there are %v", all)
		}
		return err
	}))
}

func TestTheSidecarsOfAUnitThatIsBeingStoppedAreCritical(t *testing.T) {
	t.Parallel()
	u := newUnits(t)
	enough, err := u.host.Inside("/run/enough")
	u.must(err)
	var changed atomic.Pointer[string]
	u.front.Misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
		if req.Method == http.MethodPut {
			body, _ := io.ReadAll(req.Body)
			req.Body = io.NopCloser(bytes.NewReader(body))
			if text := req.URL.Path + " " + string(body); strings.Contains(text, "-sidecar-proxy") {
				changed.Store(&text)
			}
		}
		return false
	})
	for _, service := range []string{"api", "shop"} {
		u.passing(service, true)
		live := u.stream(service)
		stopped := make(chan error, 1)
		go func() { stopped <- u.host.Do(u.ctx(), "restart", service+".service") }()
		u.passing(service, false)
		before := strings.Count(live.Output(), "a line")
		u.must(u.agent.Await(u.ctx(), "the live connection goes on", func() error {
			if strings.Count(live.Output(), "a line") < before+100 {
				return errors.New("it does not")
			}
			return nil
		}))
		changed.Store(nil)
		u.must(u.host.Do(u.ctx(), "restart", "nodeproxy.service"))
		if text := changed.Load(); text != nil {
			t.Errorf("while %s ends a daemon that starts changes what is registered: %s", service, *text)
		}
		u.passing(service, false)
		u.must(os.WriteFile(enough, nil, 0o600))
		u.must(<-stopped)
		u.passing(service, true)
		u.must(os.Remove(enough))
	}
}

// stream is a live connection of web's.
func (u *units) stream(service string) *netlab.Process {
	u.t.Helper()
	to := u.virtual(service)
	u.must(u.agent.Await(u.ctx(), "web reaches "+service, func() error {
		out, err := u.host.Run(u.ctx(), "web.service", programs.app, "dial", to, "peer")
		if err == nil && !strings.Contains(out, "accept=") {
			err = errors.New(out)
		}
		return err
	}))
	live, err := u.host.Start("web.service", programs.app, "dial", "-timeout", "5m", to, "stream")
	u.must(err)
	u.t.Cleanup(live.Kill)
	u.must(live.WaitOutput(u.ctx(), "a line"))
	return live
}

// What waits since the daemon before is held for 10 s at most. Where the machine takes most of that it is tried again.
func TestWhatWaitsAtARestartIsServedOnceTheCertificatesAreThere(t *testing.T) {
	t.Parallel()
	u := newUnits(t, "ExecStartPre=sh -c 'rm -f /sys/fs/bpf/nodeproxy/node-1/v*/maps/snapshot'") // the certificates that the one before had
	u.stream("api").Kill()
	to := u.virtual("api")
	isLeaf := func(req *http.Request) bool { return strings.Contains(req.URL.Path, "/ca/leaf/") }
	asked := func() (n int) {
		u.front.Lock()
		defer u.front.Unlock()
		for path, times := range u.front.Requests {
			if strings.HasSuffix(path, "/ca/leaf/web") {
				n += times
			}
		}
		return n
	}
	askedAgain := func(times int) {
		t.Helper()
		n := asked() + times
		u.must(u.agent.Await(u.ctx(), "is asked for a certificate", func() error {
			if now := asked(); now < n {
				return fmt.Errorf("%d times, want %d", now, n)
			}
			return nil
		}))
	}
	for range 3 {
		u.front.Fail(http.StatusServiceUnavailable, isLeaf)
		began := time.Now()
		restarted := make(chan error, 1)
		go func() { restarted <- u.host.Do(u.ctx(), "restart", "nodeproxy.service") }()
		askedAgain(2) // the next daemon knows the mesh, and its workloads
		waits, err := u.host.Start("web.service", programs.app, "dial", "-timeout", "5m", to, "peer")
		u.must(err)
		t.Cleanup(waits.Kill)
		u.must(waits.WaitOutput(u.ctx(), "connected"))
		askedAgain(2)
		took := time.Since(began)
		u.front.Fail(0, nil)
		u.must(waits.Wait(u.ctx()))
		u.must(<-restarted)
		if took > 8*time.Second {
			t.Logf("the certificates came after %s: %s", took, waits.Output())
			continue
		}
		if !strings.Contains(waits.Output(), "accept=") {
			t.Errorf("what waited is told %q", waits.Output())
		}
		return
	}
	t.Error("the machine is too slow to tell")
}

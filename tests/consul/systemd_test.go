package consul

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/systemdlab"
)

// A unit with a sidecar of nodeproxy's, one with a sidecar of the operator's, and one that calls them.
func TestTheSidecarsOfAUnitThatIsBeingStoppedAreCritical(t *testing.T) {
	require(t)
	netlab.Lacks(t, systemdlab.Missing()...)
	t.Parallel()
	m := &mesh{t: t}
	lab := netlab.ForTest(t)
	host, err := systemdlab.New(lab)
	m.must(err)
	const address = "10.99.0.1"
	unit := func(name string, lines ...string) {
		t.Helper()
		_, err := host.Unit(name, lines...)
		m.must(err)
	}
	units := map[string]string{"api": "8080", "shop": "8081"}
	for name, port := range units {
		unit(name+".service", "[Service]", "ExecStart="+programs.app+" serve :"+port, "ExecStop=sh -c 'until [ -e /run/enough ]; do sleep 0.1; done'", "[X-NodeProxy]", "Service="+name)
	}
	unit("web.service", "[Service]", "ExecStart=sleep infinity", "[X-NodeProxy]", "Service=web")
	config, log := filepath.Join(filepath.Dir(host.Units), "nodeproxy.hcl"), filepath.Join(filepath.Dir(host.Units), "daemon.log")
	unit("nodeproxy.service", "[Service]", "ExecStart="+programs.nodeproxy+" run --config "+config, "StandardError=append:"+log)
	m.must(host.Boot(m.ctx(), "ip link set lo up; ip addr add "+address+"/32 dev lo"))
	t.Cleanup(func() {
		if text, _ := os.ReadFile(log); t.Failed() || strings.Contains(string(text), "DATA RACE") {
			t.Errorf("the daemon's log:\n%s\nsystemd's:\n%s", text, host.Log())
		}
	})
	agent, err := Start(m.ctx(), lab, Config{Node: "node-1", Address: address, HCL: WithACLs, Token: Management, Systemd: host})
	m.must(err)
	m.must(agent.Register(m.ctx(), map[string]any{"Name": "web", "ID": "web-1", "Address": address, "Port": 8090}))
	m.must(agent.Register(m.ctx(), map[string]any{"Name": "api", "ID": "api-1", "Address": address, "Port": 8080}))
	m.must(agent.Register(m.ctx(), Service("shop", "shop-1", address, 8081)))
	for name := range units {
		m.must(agent.Intentions(m.ctx(), name, map[string]string{"web": "allow"}))
	}
	token, err := agent.NewToken(m.ctx(), "nodeproxy", rules(t, "node-1", "web", "api", "shop"))
	m.must(err)
	m.must(os.WriteFile(config+".token", []byte(token), 0o600))
	m.must(os.WriteFile(config, fmt.Appendf(nil, "node { name = \"node-1\"  address = %q }\nsource \"consul\" { token_file = %q }\nworkloads { systemd { enabled = true } }\n", address, config+".token"), 0o600))
	for _, name := range []string{"nodeproxy", "web", "api", "shop"} {
		m.must(host.Do(m.ctx(), "start", name+".service"))
	}
	passing := func(service string, want bool) {
		t.Helper()
		m.must(agent.Await(m.ctx(), fmt.Sprintf("passes %s: %v", service, want), func() error {
			var all []map[string]any
			err := agent.Do(m.ctx(), http.MethodGet, "/v1/health/connect/"+service+"?passing", nil, &all)
			if err == nil && (len(all) == 1) != want {
				err = fmt.Errorf("there are %v", all)
			}
			return err
		}))
	}
	socket, err := host.Inside(admin.DefaultSocket)
	m.must(err)
	stream := func(service string) *netlab.Process {
		t.Helper()
		var live *netlab.Process
		m.must(agent.Await(m.ctx(), "web reaches "+service, func() error {
			status, err := admin.NewClient(socket).Status(m.ctx())
			if err != nil {
				return err
			}
			i := slices.IndexFunc(status.Services, func(s admin.Service) bool { return s.Name == service && len(s.Virtual) > 0 })
			if i < 0 {
				return fmt.Errorf("services are %+v", status.Services)
			}
			if live, err = host.Start("web.service", programs.app, "dial", "-timeout", "5m", status.Services[i].Virtual[0]+":80", "stream"); err != nil {
				return err
			}
			t.Cleanup(live.Kill)
			return live.WaitOutput(m.ctx(), "a line")
		}))
		return live
	}
	enough, err := host.Inside("/run/enough")
	m.must(err)
	for service := range units {
		passing(service, true)
		live := stream(service)
		stopped := make(chan error, 1)
		go func() { stopped <- host.Do(m.ctx(), "restart", service+".service") }()
		passing(service, false)
		before := strings.Count(live.Output(), "a line")
		m.must(agent.Await(m.ctx(), "the live connection goes on", func() error {
			if strings.Count(live.Output(), "a line") < before+100 {
				return errors.New("it does not")
			}
			return nil
		}))
		m.must(os.WriteFile(enough, nil, 0o600))
		m.must(<-stopped)
		passing(service, true)
		m.must(os.Remove(enough))
	}
}

package consul

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/netlab"
)

// Each way to ask for an identity that is another's, at once, on a node whose token and providers would let bank be there.
func TestNoTheftHasConsulAskedForACertificate(t *testing.T) {
	m := marked(t)
	netlab.Lacks(t, enginelab.Missing()...)
	node, d := m.Nodes[1], m.Daemons[1]
	m.fronts[1] = NewFront(t, m.agents[1].Socket())
	engine, err := enginelab.New(m.Lab, node)
	m.must(err)
	m.must(engine.Start(m.ctx()))
	m.must(engine.Import(m.ctx(), "app", programs.app))
	d.Labels += fmt.Sprintf("  xattr {\n    enabled = true\n  }\n  containers {\n    enabled = true\n    allow   = [\"marker\"]\n    socket  = %q\n  }\n", engine.Socket)
	k := (&agentless{mesh: m}).withPods("bank")
	k.do("create", "namespace", "street")
	m.start(nil, []string{"bank", "marker"})

	cgroup := func(name string) *netlab.Cgroup {
		c, err := node.Cgroup.Child(name)
		m.must(err)
		return c
	}
	start := func(in *netlab.Cgroup, path string, args ...string) {
		p, err := m.Start(netlab.Command{Path: path, Args: args, Cgroup: in, Namespace: node.Namespace})
		m.must(err)
		m.must(p.WaitOutput(m.ctx(), "ready"))
	}
	delegated := cgroup("delegated")
	m.must(os.Chown(delegated.Path(), 65534, 65534))
	m.must(unix.Lsetxattr(delegated.Path(), "user.nodeproxy.service", []byte("bank"), 0))
	start(delegated, programs.app, "serve", fmt.Sprintf("%s:7000", node.IPv4))
	m.enlist("bank", "squatted", 7000, "nodeproxy", "enabled")
	start(cgroup("outside"), "unshare", "--user", "--map-root-user", "--net", "sh", "-c",
		`ip link set lo up && ip address add "$1/32" dev lo && exec "$0" serve "$1:7001"`, programs.app, node.IPv4.String())
	m.enlist("bank", "outside", 7001, "nodeproxy", "enabled")
	k.thief("street", "passer-by", "bank", "")
	k.thief("shop", "clerk", "web", "")
	k.thief("shop", "forger", "web", "bank")
	_, err = engine.Docker(m.ctx(), "create", "--name", "robber", "--label", "nodeproxy.io/service=bank", "app", "/app")
	m.must(err)

	status, err := d.Await(m.ctx(), func(s *admin.Status) error {
		why := make(map[string]string)
		for _, r := range s.Refused {
			why[r.Name] = r.Why
		}
		for name, part := range map[string]string{
			"instance squatted": "is not root's", "instance outside": "another user namespace", "container robber": "workloads.containers.allow",
			"pod street/passer-by": `namespace "street"`, "pod shop/clerk": `service account "web"`, "pod shop/forger": `service account "web"`,
		} {
			if !strings.Contains(why[name], part) {
				return fmt.Errorf("%s is not refused with %q: refused are %+v", name, part, s.Refused)
			}
		}
		return nil
	})
	m.must(err)
	if n := len(status.Refused); n != 6 || len(status.Workloads) > 0 {
		t.Errorf("%d claims are refused, workloads are %+v", n, status.Workloads)
	}
	marker := cgroup("marker")
	m.must(unix.Lsetxattr(marker.Path(), "trusted.nodeproxy.service", []byte("marker"), 0))
	_, err = d.Await(m.ctx(), func(s *admin.Status) error {
		if len(s.Certificates) != 1 || s.Certificates[0].Service != "marker" || s.Certificates[0].Serial == "" {
			return fmt.Errorf("certificates are %+v", s.Certificates)
		}
		for _, p := range s.Problems {
			if p.Kind == "unknown-service" && p.Service == "marker" && strings.Contains(p.Text, "register it") {
				return nil
			}
		}
		return fmt.Errorf("nothing says that nobody can call marker: %+v", s.Problems)
	})
	m.must(err)
	m.fronts[1].Lock()
	defer m.fronts[1].Unlock()
	const leaves = "/v1/agent/connect/ca/leaf/"
	if m.fronts[1].Requests[leaves+"marker"] == 0 {
		t.Error("it is not this Consul that is asked")
	}
	for path := range m.fronts[1].Requests {
		if service, asked := strings.CutPrefix(path, leaves); asked && service != "marker" {
			t.Errorf("Consul was asked for a certificate of %s", service)
		}
	}
}

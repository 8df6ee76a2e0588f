package deploy

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"nodeproxy.io/tests/netlab"
)

func activatedBySocket(h *host) {
	h.unit("queue.socket", "[Unit]", "DefaultDependencies=no", "[Socket]", "ListenStream="+address+":8090")
	h.unit("queue.service", "[Unit]", "DefaultDependencies=no", "[Service]", "ExecStart="+built.app+" serve inherited")
	h.label("queue.service", "Service=queue")
	h.intend("queue", "web")
	h.sh("systemctl daemon-reload; systemctl start queue.socket")
	h.awaitState("queue.socket", "protected")
	h.getsNothing("", address+":8090")
	h.getsNothing("api.service", h.virtual("queue")+":8090")
	if got := h.sh("systemctl is-active queue || true"); got != "inactive" {
		h.t.Errorf("a stranger, or who may not call it, had it started: it is %s", got)
	}
	h.comesToReach("web.service", h.virtual("queue")+":8090")
	h.awaitState("queue.service", "protected")
	h.reaches("proxied.service", h.virtual("queue")+":8090")
	h.getsNothing("", address+":8090")
	h.sh("systemctl stop queue.socket queue.service; rm -r " + h.Units + "/queue.*; systemctl daemon-reload")
}

func inOwnNamespaces(h *host, api string) {
	h.sh(`ip netns add cart; ip link add cart0 type veth peer name eth0 netns cart; ip addr add 10.98.0.1/24 dev cart0; ip link set cart0 up
ip -n cart addr add 10.98.0.2/24 dev eth0; ip -n cart link set eth0 up; ip -n cart link set lo up; ip -n cart route add default via 10.98.0.1`)
	h.unit("cart.service", "[Service]", "NetworkNamespacePath=/run/netns/cart", "ExecStart="+built.app+" serve :8080")
	h.unit("lonely.service", "[Service]", "PrivateNetwork=yes", "ExecStart="+built.app+" serve :8080")
	h.label("cart.service", "Service=cart")
	h.label("lonely.service", "Service=lonely")
	h.intend("cart", "web")
	h.intend("api", "web", "cart", "lonely")
	h.sh("systemctl daemon-reload; systemctl start cart lonely")
	h.awaitState("cart.service", "protected")
	h.awaitState("lonely.service", "protected")
	h.comesToReach("web.service", h.virtual("cart")+":8080")
	h.getsNothing("", "10.98.0.2:8080")
	within := func(unit, namespace, to string) string {
		out, err := h.Run(h.ctx(), unit, "nsenter", "--net="+namespace, built.app, "dial", "-timeout", "5s", to, "peer")
		h.must(err)
		return out
	}
	h.eventually("cart reaches api", func() error {
		if out := within("cart.service", "/run/netns/cart", api); !strings.Contains(out, "accept=10.98.0.2:") {
			return errors.New(out)
		}
		return nil
	})
	lonely := "/proc/" + h.sh("systemctl show -P MainPID lonely") + "/ns/net"
	if out := within("lonely.service", lonely, api); strings.Contains(out, "accept=") {
		h.t.Errorf("a service without a network is called from: %s", out)
	}
	h.sh("systemctl stop cart lonely; rm -r " + h.Units + "/cart.* " + h.Units + "/lonely.*; systemctl daemon-reload; ip netns del cart")
	h.intend("api", "web")
}

// unitIsStopped has a unit of the node and one in a network namespace of its own, called by the kernel's path and by the daemon's.
func unitIsStopped(h *host) {
	h.sh(`ip netns add far; ip link add far0 type veth peer name eth0 netns far; ip addr add 10.98.1.1/24 dev far0; ip link set far0 up
ip -n far addr add 10.98.1.2/24 dev eth0; ip -n far link set eth0 up; ip -n far link set lo up; ip -n far route add default via 10.98.1.1; rm -f /run/enough`)
	const served = "ExecStart=%s serve :8070\nStandardOutput=append:/run/%s.log\nExecStop=sh -c 'until [ -e /run/enough ]; do sleep 0.1; done'\n[X-NodeProxy]\nService=pair\n"
	h.unit("near.service", "[Service]", fmt.Sprintf(served, built.app, "near"))
	h.unit("far.service", "[Service]", "NetworkNamespacePath=/run/netns/far", fmt.Sprintf(served, built.app, "far"))
	h.intend("pair", "web")
	h.sh("systemctl daemon-reload; systemctl start near far")
	h.awaitState("near.service", "protected")
	h.awaitState("far.service", "protected")
	h.sh("timeout 60 sh -c 'until grep -q ready /run/near.log && grep -q ready /run/far.log; do sleep 0.1; done'")
	pair, callers := h.virtual("pair")+":8070", []string{"web.service", "proxied.service"}
	answered := func(unit string) (n int) {
		_, err := fmt.Sscan(h.sh("grep -c ' by peer: ' /run/"+unit+".log || true"), &n)
		h.must(err)
		return n
	}
	noneFails := func() {
		for _, caller := range callers {
			out, err := h.Run(h.ctx(), caller, built.app, "load", "-n", "50", pair)
			h.must(err)
			if out != "done 50 failed 0\n" {
				h.t.Errorf("calls of %s: %s", caller, out)
			}
		}
	}
	h.eventually("both are called", func() error {
		noneFails()
		if near, far := answered("near"), answered("far"); near == 0 || far == 0 {
			return fmt.Errorf("%d and %d calls", near, far)
		}
		return nil
	})
	lines := make(map[*netlab.Process]int)
	for _, caller := range slices.Repeat(callers, 2) { // each instance gets some
		live, err := h.Start(caller, built.app, "dial", "-timeout", "5m", pair, "stream")
		h.must(err)
		defer live.Kill()
		h.must(live.WaitOutput(h.ctx(), "a line"))
		lines[live] = 0
	}
	h.sh("systemctl stop --no-block far")
	h.eventually("it is known that far ends", func() error {
		before := answered("far")
		if noneFails(); answered("far") > before {
			return errors.New("it is called")
		}
		return nil
	})
	before := answered("far")
	noneFails()
	if n := answered("far") - before; n > 0 {
		h.t.Errorf("%d of 100 calls went to the unit that is being stopped", n)
	}
	h.sh("systemctl stop --no-block near")
	h.eventually("all end, and far is called again", func() error {
		if noneFails(); answered("far") == before {
			return errors.New("it is not")
		}
		return nil
	})
	for live := range lines {
		lines[live] = strings.Count(live.Output(), "a line")
	}
	h.eventually("live connections go on", func() error {
		for live, n := range lines {
			if strings.Count(live.Output(), "a line") < n+100 {
				return fmt.Errorf("one ended: %.300s", live.Output())
			}
		}
		return nil
	})
	h.sh("touch /run/enough; systemctl stop near far; rm -r " + h.Units + "/near.* " + h.Units + "/far.*; systemctl daemon-reload; ip netns del far")
	h.awaitStatus("3 workloads, all protected")
}

// intend lets sources, and nobody else, call a service.
func (h *host) intend(service string, sources ...string) {
	h.t.Helper()
	text := "Kind = \"service-intentions\"\nName = \"" + service + "\"\nSources = [{ Name = \"" + strings.Join(sources, "\"  Action = \"allow\" }, { Name = \"") + "\"  Action = \"allow\" }]\n"
	h.sh("cat >/etc/nodeproxy/mesh.d/config/" + service + ".hcl <<'END'\n" + text + "END\n")
}

// awaitState waits until the daemon says that of a unit's cgroup.
func (h *host) awaitState(unit, state string) {
	h.t.Helper()
	h.eventually(unit+" is "+state, func() error {
		s := h.status()
		for _, w := range s.Workloads {
			if filepath.Base(w.Cgroup) == unit && w.State == state {
				return nil
			}
		}
		return fmt.Errorf("workloads are %+v, refused %+v, problems %+v", s.Workloads, s.Refused, s.Problems)
	})
}

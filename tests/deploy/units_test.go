package deploy

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
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

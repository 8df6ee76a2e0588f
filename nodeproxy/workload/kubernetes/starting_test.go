package kubernetes

import (
	"fmt"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func testStarting(t *testing.T, c *cluster) {
	const unknown = "11111111-2222-3333-4444-555555555555"
	c.role("gets", `{"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["get"]}`)
	held := c.pod("shop", "starting", "web", labelled("mesh=enabled"))
	plain := c.pod("shop", "plain", "web")
	watched := c.pod("shop", "watched", "web", labelled("mesh=observe"))
	refused := c.pod("shop", "pretender", "other", labelled("mesh=enabled"))

	path := ""
	within(t, patience, "it is known where it starts", func() bool {
		at, meshed, err := c.Starting(held.Namespace, held.Name, string(held.UID))
		path = at
		return meshed && err == nil
	})
	if !strings.HasSuffix(path, "/besteffort/pod"+string(held.UID)) {
		t.Errorf("its cgroup is %s", path)
	}
	within(t, patience, "the cgroup is made that the kubelet has not", func() bool {
		_, err := os.Stat(path)
		return err == nil
	})
	for _, p := range []*corev1.Pod{plain, watched, refused} {
		within(t, patience, p.Name+" is not held", func() bool {
			_, meshed, err := c.Starting(p.Namespace, p.Name, string(p.UID))
			return !meshed && err == nil
		})
	}
	if _, meshed, err := c.Starting("shop", held.Name, unknown); !meshed || err == nil {
		t.Errorf("a pod of which nobody has told yet: %v, %v", meshed, err)
	}
	for _, of := range [][2]string{{"elsewhere", unknown}, {"shop", "0123456789abcdef0123456789abcdef"}} {
		if _, meshed, err := c.Starting(of[0], "any", of[1]); meshed || err != nil {
			t.Errorf("pod %s of namespace %s: %v, %v", of[1], of[0], meshed, err)
		}
	}
	c.asked(t, held, true, true)
	c.asked(t, plain, false, true)
	c.asked(t, watched, false, true)
	c.asked(t, refused, false, true)
	c.granted(t, held, "web")
	c.stopServer()
	c.asked(t, held, true, true)
	c.asked(t, plain, false, false)
	c.startServer()
	for _, p := range []*corev1.Pod{held, plain, watched, refused} {
		c.remove(p)
	}
	within(t, patience, "the API server is followed again", func() bool { return c.Problem() == nil })
}

// asked asserts what is known of a pod without a daemon.
func (c *cluster) asked(t *testing.T, p *corev1.Pod, want, known bool) {
	t.Helper()
	access := Access{c.kubeconfig, c.stateFile(), c.cfg.Namespaces}
	within(t, patience, fmt.Sprintf("%s is to be in the mesh: %v, known: %v", p.Name, want, known), func() bool { // rights take a moment
		meshed, err := access.Meshed(t.Context(), p.Namespace, p.Name, string(p.UID))
		return meshed == want && (err == nil) == known
	})
}

package kubernetes

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"

	"nodeproxy.io/nodeproxy/workload"
)

func (c *cluster) daemonSet(t *testing.T, uninstalled, known bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	removed, err := c.Removed(ctx)
	if removed != uninstalled || (err == nil) != known {
		t.Errorf("removed = %v, %v; want %v, known: %v", removed, err, uninstalled, known)
	}
}

func testDaemonSet(t *testing.T, c *cluster) {
	const path = "/apis/apps/v1/namespaces/elsewhere/daemonsets"
	create := func() {
		t.Helper()
		c.do(c.core.Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body([]byte(`{"apiVersion": "apps/v1", "kind": "DaemonSet",
"metadata": {"name": "nodeproxy", "finalizers": ["test.nodeproxy.io/held"]}, "spec": {"selector": {"matchLabels": {"a": "b"}},
"template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "nodeproxy", "image": "nodeproxy"}]}}}}`)), nil)
	}
	told := func(gone bool) {
		t.Helper()
		within(t, patience, "the API server tells of the DaemonSet", func() bool { return c.own.gone() == gone })
	}
	remove := func() {
		t.Helper()
		c.do(c.core.Delete().AbsPath(path, "nodeproxy"), nil)
	}
	create()
	told(false)
	c.daemonSet(t, false, true)
	remove() // it is held
	told(true)
	c.daemonSet(t, true, true)
	c.do(c.core.Patch("application/merge-patch+json").AbsPath(path, "nodeproxy").Body([]byte(`{"metadata": {"finalizers": null}}`)), nil)
	c.daemonSet(t, true, true)

	create()
	told(false)
	c.stopServer()
	c.daemonSet(t, false, false)
	c.startServer()
	c.daemonSet(t, false, true)
	within(t, patience, "all is followed again", func() bool { return c.Problem() == nil })

	// Who removes all at once may remove the rights first. It is forbidden to ask, and it was told: by a watch that is open, as it is
	// once a second change arrives, for the first may have been listed.
	for _, n := range []string{"1", "2"} {
		c.do(c.core.Patch("application/merge-patch+json").AbsPath(path, "nodeproxy").Body([]byte(`{"metadata": {"labels": {"n": "`+n+`"}}}`)), nil)
		within(t, patience, "a change arrives", func() bool {
			known := list[appsv1.DaemonSet](c.own.told)
			return len(known) == 1 && known[0].Labels["n"] == n
		})
	}
	c.do(c.core.Delete().AbsPath(rbac, "clusterrolebindings", "daemonset"), nil)
	within(t, patience, "it may not ask", func() bool {
		_, err := c.Removed(t.Context())
		return err != nil
	})
	remove()
	told(true)
	c.daemonSet(t, true, true)
}

// Where the DaemonSet alone may not be followed, as it is now, the pods are, and status says what that costs.
func testDaemonSetForbidden(t *testing.T, c *cluster) {
	next, err := New(c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan struct{}, 1)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { next.FollowDaemonSet(ctx) })
	running.Go(func() {
		err := next.Run(ctx, func([]workload.Claim) {
			if next.Problem() != nil {
				t.Error("there is a problem before anything is claimed: nobody waits for the pods then")
			}
			told <- struct{}{}
		})
		if err != nil {
			t.Error(err)
		}
	})
	select {
	case <-told:
	case <-time.After(patience):
		t.Fatal("it claims nothing")
	}
	within(t, patience, "it says what it costs", func() bool {
		err := next.Problem()
		return err != nil && strings.Contains(err.Error(), "what is pinned may stay when it is removed")
	})
}

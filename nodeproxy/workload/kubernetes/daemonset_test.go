package kubernetes

import (
	"context"
	"testing"
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

	// Who removes all at once may remove the rights first. It is forbidden to ask, and it was told.
	within(t, patience, "it is followed again", func() bool { return c.Problem() == nil })
	c.do(c.core.Delete().AbsPath(rbac, "clusterrolebindings", "daemonset"), nil)
	within(t, patience, "it may not ask", func() bool {
		_, err := c.Removed(t.Context())
		return err != nil
	})
	remove()
	told(true)
	c.daemonSet(t, true, true)
}

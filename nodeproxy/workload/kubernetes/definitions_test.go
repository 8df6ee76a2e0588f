package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"nodeproxy.io/nodeproxy/catalog"
)

func testDefinitions(t *testing.T, c *cluster) {
	expect := func(what string, holds func(map[string]catalog.Definition, []catalog.Problem) bool) {
		t.Helper()
		var got catalog.Definitions
		defer func() {
			if t.Failed() {
				t.Logf("definitions: %+v", got)
			}
		}()
		within(t, patience, what, func() bool {
			c.mu.Lock()
			got = c.defs
			c.mu.Unlock()
			byID := make(map[string]catalog.Definition)
			for _, def := range got.All {
				byID[def.ID] = def
			}
			return holds(byID, got.Problems)
		})
	}
	ports := func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "admin", ContainerPort: 9000}, {Name: "http", ContainerPort: 8080}}
	}
	p := c.pod("shop", "web-5", "web", labelled("mesh=enabled"), ports, annotated("port=http", "tags=blue,v2", "meta-team=checkout"))
	plain := c.pod("shop", "web-6", "web", labelled("mesh=enabled"), ports, annotated("consul.hashicorp.com/service-tags=green"))
	wrong := c.pod("shop", "web-7", "web", labelled("mesh=enabled"), ports, annotated("port=https"))
	observed := c.pod("shop", "web-8", "web", labelled("mesh=observe"), ports)
	thief := c.pod("shop", "web-9", "intruder", labelled("mesh=enabled"), ports)
	for i, p := range []*corev1.Pod{p, plain, wrong, observed, thief} {
		c.patchStatus(p, fmt.Sprintf(`{"status": {"phase": "Running", "podIP": "10.1.0.%d", "podIPs": [{"ip": "10.1.0.%d"}], "conditions": [{"type": "Ready", "status": "False", "message": "starting"}]}}`, i+1, i+1))
	}
	expect("two are defined, one is a problem", func(byID map[string]catalog.Definition, problems []catalog.Problem) bool {
		return len(byID) == 2 && len(problems) == 1 && strings.Contains(problems[0].Text, `pod shop/web-7 has port "https"`)
	})
	expect("as their annotations say", func(byID map[string]catalog.Definition, _ []catalog.Problem) bool {
		first, second := byID["web-5-web"], byID["web-6-web"]
		return first.Port == 8080 && first.Address.String() == "10.1.0.1" && slices.Equal(first.Tags, []string{"blue", "v2"}) && first.Meta["team"] == "checkout" &&
			first.Meta["k8s-namespace"] == "shop" && !first.Healthy() && strings.Contains(first.Checks[0].Output, "starting") &&
			second.Port == 9000 && slices.Equal(second.Tags, []string{"green"})
	})
	c.patchStatus(p, `{"status": {"conditions": [{"type": "Ready", "status": "True"}]}}`)
	expect("it is ready", func(byID map[string]catalog.Definition, _ []catalog.Problem) bool {
		def, ok := byID["web-5-web"]
		return ok && def.Healthy()
	})
	c.do(c.core.Delete().Namespace("shop").Resource("pods").Name("web-5"), nil)
	expect("it is critical while it is deleted", func(byID map[string]catalog.Definition, _ []catalog.Problem) bool {
		def, ok := byID["web-5-web"]
		return ok && !def.Healthy()
	})
	c.granted(t, p, "web")
	for _, p := range []*corev1.Pod{p, plain, wrong, observed, thief} {
		c.remove(p)
	}
	expect("none is left", func(byID map[string]catalog.Definition, problems []catalog.Problem) bool {
		return len(byID)+len(problems) == 0
	})
}

package kubernetes

import (
	"testing"
)

func TestPodsOfANode(t *testing.T) {
	m := newMesh(t, false)
	m.install()
	m.intentions("api", map[string]string{"web": "allow", "edge": "allow"})
	m.create(pod{name: "web", account: "web", labels: meshed}, pod{name: "api", account: "api", labels: meshed},
		pod{name: "other", account: "other", labels: meshed}, pod{name: "stranger", account: "default"})
	m.protected("shop/web", "shop/api", "shop/other")
	vip, api := m.vip("api", 1), m.at("shop", "api")

	t.Run("an allowed pod reaches another, a denied one and a stranger do not", func(t *testing.T) {
		m := m.within(t)
		m.reaches("shop/web", vip)
		m.refused("shop/other", vip)
		m.refused("shop/stranger", api)
	})
}

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"nodeproxy.io/tests/meshlab"
)

func TestCallsFollowServiceResolvers(t *testing.T) {
	m := newMesh(t)
	web, batch := m.place(0, "web"), m.place(0, "batch")
	m.place(1, "spare")
	api, err := m.Nodes[1].Workload("api")
	m.must(err)
	m.Daemons[1].Enroll(api, "api")
	m.serve(api, ":9001")
	m.serve(api, ":9002")
	instance := func(n int) string {
		return meshlab.Service("api", fmt.Sprintf("api-%d", n), api.IPv4.String(), uint16(9000+n), fmt.Sprintf("meta { version = \"v%d\" }", n))
	}
	m.must(m.Define(1, "api", instance(1)+instance(2)))
	m.must(m.ConfigEntry("resolver-api", `Kind = "service-resolver"
Name = "api"
DefaultSubset = "old"
Subsets = {
  old = { Filter = "Service.Meta.version == v1" }
  new = { Filter = "Service.Meta.version == v2" }
}
Failover = {
  "*" = { Service = "spare" }
}
`))
	m.must(m.ConfigEntry("resolver-alias", `Kind = "service-resolver"
Name = "alias"
Redirect {
  Service       = "api"
  ServiceSubset = "new"
}
`))
	m.allow("api", "web")
	m.allow("spare", "web")
	m.start()
	answers := func(service string, local int) {
		t.Helper()
		m.eventually(fmt.Sprintf("%s is answered at port %d", service, local), func() error {
			if out := m.dial(web, m.vip(service), "peer"); !strings.Contains(out, fmt.Sprintf(":%d\n", local)) {
				return fmt.Errorf("it is not: %s", out)
			}
			return nil
		})
	}
	answers("api", 9001)
	answers("alias", 9002)
	for range 10 {
		if out := m.dial(web, m.vip("alias"), "peer"); !strings.Contains(out, ":9002\n") {
			t.Fatalf("alias is not the subset: %s", out)
		}
	}
	m.getsNothing(batch, m.vip("alias"))
	m.must(m.Define(1, "api", instance(2)))
	answers("api", port)
	m.getsNothing(batch, m.vip("api"))
}

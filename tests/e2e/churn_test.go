package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/tests/netlab"
)

func TestChurnOfLabelledWorkloadsLeavesNothingBehind(t *testing.T) {
	m, web, _ := labelled(t)
	m.label(web.Cgroup, "service", "web")
	m.awaitWorkload(web.Cgroup, "web", "protected")
	m.settle(0)
	top, err := m.Nodes[0].Cgroup.Child("churn")
	m.must(err)
	const lives, rate, atOnce = 200, 50, 25 // starts, and as many ends, a second
	var alive []*netlab.Cgroup
	end := func(n int) {
		for len(alive) > n {
			m.must(alive[0].Remove())
			alive = alive[1:]
		}
	}
	began := time.Now()
	turns := time.NewTicker(time.Second / rate)
	defer turns.Stop()
	for i := range lives {
		<-turns.C
		c, err := top.Child(fmt.Sprintf("w%d", i))
		m.must(err)
		m.label(c, "service", "web")
		m.sleeper(c, web.Namespace)
		alive = append(alive, c)
		end(atOnce)
		if i%rate != 0 {
			continue
		}
		status, err := m.Daemons[0].Admin().Status(m.ctx())
		m.must(err)
		for _, w := range status.Workloads {
			lives := slices.ContainsFunc(alive, func(c *netlab.Cgroup) bool { return c.Path() == w.Cgroup })
			if lives && (w.State == "unprotected" || w.State == "waiting") {
				t.Errorf("a workload is %s: %+v", w.State, w)
			}
		}
	}
	t.Logf("%d lives in %s", lives, time.Since(began))
	for _, c := range alive {
		m.awaitWorkload(c, "web", "protected")
	}
	end(0)
	_, err = m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		for _, w := range s.Workloads {
			if strings.HasPrefix(w.Cgroup, top.Path()+"/") {
				return fmt.Errorf("there is still %s", w.Cgroup)
			}
		}
		return nil
	})
	m.must(err)
	m.reaches(web, m.vip("api"))
}

func TestWhoGetsTheAddressOfAnotherGetsNoIdentity(t *testing.T) {
	m, _, _ := labelled(t)
	m.baselines[0] = nil
	bank, err := m.Nodes[1].Workload("bank")
	m.must(err)
	m.Daemons[1].Enroll(bank, "bank")
	m.define(1, "bank", port, bank.IPv4)
	m.serve(bank, ":8080")
	m.allow("bank", "web")
	m.stop(1)
	m.must(m.Daemons[1].Start(m.ctx()))
	m.settle(0)
	const link = "recycled"
	address, gateway := netip.MustParsePrefix("10.1.200.2/24"), netip.MustParsePrefix("10.1.200.1/24")
	for i, service := range []string{"web", "", "web", "other", "web"} {
		ns, err := m.Lab.Namespace()
		m.must(err)
		m.must(netlab.Join(m.Nodes[0].Namespace, link, ns, netlab.Uplink))
		m.must(m.Nodes[0].Namespace.Address(link, gateway))
		m.must(ns.Address(netlab.Uplink, address))
		m.must(ns.Route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway.Addr()))
		cgroup, err := m.Nodes[0].Cgroup.Child(fmt.Sprintf("holder-%d", i))
		m.must(err)
		holder := &netlab.Workload{Name: service, Node: m.Nodes[0], Namespace: ns, Cgroup: cgroup, IPv4: address.Addr()}
		if service != "" {
			m.label(cgroup, "service", service)
			m.sleeper(cgroup, ns)
			m.awaitWorkload(cgroup, service, "protected")
		}
		for _, to := range []string{m.vip("bank"), at(bank.IPv4, port)} {
			if service == "web" {
				m.comesToReach(holder, to)
			} else {
				m.getsNothing(holder, "-timeout", "2s", to)
			}
		}
		if service == "other" && m.denials(0, catalog.ReasonIntention) == 0 {
			t.Error("it was not as itself that it was denied")
		}
		m.must(cgroup.Remove())
		m.must(m.Nodes[0].Namespace.Remove(link)) // the daemon may hold the namespace a while longer
	}
}

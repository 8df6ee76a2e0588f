package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/meshlab"
	"nodeproxy.io/tests/netlab"
)

// netfilter runs programs that write rules into a workload's network namespace.
func (m *mesh) netfilter(w *netlab.Workload, commands ...string) {
	m.t.Helper()
	for _, c := range commands {
		words := strings.Fields(c)
		_, err := m.Lab.Run(m.ctx(), netlab.Command{Path: "/usr/sbin/" + words[0], Args: words[1:], Namespace: w.Namespace})
		m.must(err)
	}
}

// nftRules writes a rule as "nft" does, which redirects what is sent from a namespace, or one that only counts it.
func (m *mesh) nftRules(w *netlab.Workload, redirects bool) {
	m.t.Helper()
	m.must(w.Namespace.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "mine"})
		chain := conn.AddChain(&nftables.Chain{Name: "sent", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
		exprs := []expr.Any{&expr.Counter{}}
		if redirects {
			exprs = []expr.Any{ // tcp dport 15001 redirect
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{6}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x3a, 0x99}},
				&expr.Redir{},
			}
		}
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		return conn.Flush()
	}))
}

func TestANamespaceThatAnotherProxyRedirectsIsLeftToIt(t *testing.T) {
	m := newMesh(t)
	cases := map[string]struct {
		set    func(w *netlab.Workload)
		remove []string // commands
		rule   string   // "": it is enrolled
	}{
		"consul": {
			set: func(w *netlab.Workload) {
				m.netfilter(w, "iptables-nft -t nat -N CONSUL_PROXY_OUTPUT", "iptables-nft -t nat -N CONSUL_PROXY_REDIRECT",
					"iptables-nft -t nat -A CONSUL_PROXY_REDIRECT -p tcp -j REDIRECT --to-port 15001",
					"iptables-nft -t nat -A OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT", "iptables-nft -t nat -A CONSUL_PROXY_OUTPUT -m owner --uid-owner 5995 -j RETURN",
					"iptables-nft -t nat -A CONSUL_PROXY_OUTPUT -j CONSUL_PROXY_REDIRECT")
			},
			remove: []string{"iptables-nft -t nat -F", "iptables-nft -t nat -X"}, rule: "nftables table ip nat, chain CONSUL_PROXY_",
		},
		"istio": {
			set: func(w *netlab.Workload) {
				m.netfilter(w, "ip6tables-nft -t nat -N ISTIO_OUTPUT", "ip6tables-nft -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT", "ip6tables-nft -t nat -A ISTIO_OUTPUT -j REDIRECT")
			},
			rule: "nftables table ip6 nat, chain ISTIO_OUTPUT",
		},
		"legacy": {
			set: func(w *netlab.Workload) {
				m.netfilter(w, "iptables-legacy -t nat -N ISTIO_REDIRECT", "iptables-legacy -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-port 15001", "iptables-legacy -t nat -A OUTPUT -p tcp -j ISTIO_REDIRECT")
			},
			remove: []string{"iptables-legacy -t nat -F"}, rule: "iptables table nat, chain ISTIO_REDIRECT",
		},
		"legacy6": {
			set: func(w *netlab.Workload) {
				m.netfilter(w, "ip6tables-legacy -t nat -N mine", "ip6tables-legacy -t nat -A mine -p tcp -j REDIRECT --to-port 15001", "ip6tables-legacy -t nat -A OUTPUT -j mine")
			},
			rule: "ip6tables table nat, chain mine, target REDIRECT",
		},
		"nft": {set: func(w *netlab.Workload) { m.nftRules(w, true) }, rule: "nftables table inet mine, chain sent, a redirect"},
		// What is not another proxy's: rules for what comes in, address translation, what is left of a proxy's chains.
		"inbound": {set: func(w *netlab.Workload) {
			m.netfilter(w, "iptables-nft -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-port 8080", "iptables-nft -t nat -A OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to-destination 127.0.0.1:5353")
		}},
		"leftover": {set: func(w *netlab.Workload) {
			m.netfilter(w, "iptables-legacy -t nat -N CONSUL_PROXY_OUTPUT", "iptables-legacy -t nat -N mine", "iptables-legacy -t nat -A mine -p tcp -j REDIRECT", "iptables-legacy -t nat -A PREROUTING -j mine", "iptables-nft -t nat -N ISTIO_OUTPUT")
		}},
		"counting": {set: func(w *netlab.Workload) { m.nftRules(w, false) }},
	}
	places := make(map[string]*netlab.Workload)
	for name, c := range cases {
		w := m.place(0, name)
		c.set(w)
		places[name] = w
	}
	m.must(m.Intentions("*", meshlab.Allow("*")))
	m.must(m.Daemons[0].Start(m.ctx()))
	m.eventually("each workload is what its namespace allows", func() error {
		status, err := m.Daemons[0].Admin().Status(m.ctx())
		if err != nil {
			return err
		}
		for name, c := range cases {
			if err := isLeft(status, places[name], c.rule); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
	for name, c := range cases {
		if len(c.remove) == 0 {
			continue
		}
		m.netfilter(places[name], c.remove...)
		m.awaitWorkload(places[name].Cgroup, name, "protected")
	}
}

// TestRulesOfAnotherProxyThatComeAfterTheEnrolmentAreNamedAndOpenNothing sets rules as consul-cni does, and one that takes even
// what goes to the daemon, in namespaces of workloads that are enrolled.
func TestRulesOfAnotherProxyThatComeAfterTheEnrolmentAreNamedAndOpenNothing(t *testing.T) {
	m := newMesh(t)
	m.place(1, "api")
	cni, legacy, all := m.place(0, "cni"), m.place(0, "legacy"), m.place(0, "all")
	m.must(m.Intentions("*", meshlab.Allow("*")))
	for _, w := range []*netlab.Workload{cni, legacy} {
		m.serve(w, "127.0.0.1:15001") // the other proxy
	}
	m.start()
	stranger := m.stranger(0)
	for _, c := range []struct {
		w            *netlab.Workload
		iptables     string
		before       string // what it leaves alone
		rule, metric string
	}{
		{cni, "iptables-nft", "-d 127.0.0.1/32 -j RETURN", "nftables table ip nat, chain CONSUL_PROXY_REDIRECT", "CONSUL_PROXY_"},
		{legacy, "iptables-legacy", "-d 127.0.0.1/32 -j RETURN", "iptables table nat, chain CONSUL_PROXY_REDIRECT", "CONSUL_PROXY_"},
		{all, "iptables-nft", "-d 192.0.2.1/32 -j RETURN", "nftables table ip nat, chain OUTPUT, target REDIRECT", "redirect"},
	} {
		chain := "CONSUL_PROXY_REDIRECT"
		if c.metric == "redirect" {
			chain = "OUTPUT"
		} else {
			m.netfilter(c.w, c.iptables+" -t nat -N "+chain, c.iptables+" -t nat -A OUTPUT -p tcp -j "+chain)
		}
		m.netfilter(c.w, c.iptables+" -t nat -A "+chain+" "+c.before, c.iptables+" -t nat -A "+chain+" -p tcp -j REDIRECT --to-port 15001")
		got := m.awaitWorkload(c.w.Cgroup, c.w.Name, "unprotected")
		if !strings.Contains(got.Detail, c.rule) || !strings.Contains(got.Detail, "set since it was enrolled") {
			t.Errorf("%s: status says %q, want %q", c.w.Name, got.Detail, c.rule)
		}
		if n := m.metric(0, "nodeproxy_foreign_redirects", fmt.Sprintf("source_service=%q", c.w.Name), fmt.Sprintf("rule=%q", c.metric)); n != 1 {
			t.Errorf("%s: the metric is %v, want 1: %s", c.w.Name, n, m.series(0, "nodeproxy_foreign_redirects"))
		}
		m.getsNothing(stranger, at(c.w.IPv4, port)) // it is still guarded
		m.getsNothing(c.w, m.vip("api"))            // what reaches the other proxy, where there is one, is TLS
		m.netfilter(c.w, c.iptables+" -t nat -F")
		m.awaitWorkload(c.w.Cgroup, c.w.Name, "protected")
		m.comesToReach(c.w, m.vip("api"))
	}
	if series := m.series(0, "nodeproxy_foreign_redirects"); series != "" {
		t.Errorf("with no rule left there is %s", series)
	}
}

// isLeft says whether a workload is unprotected because of a rule, or protected where there is none.
func isLeft(status *admin.Status, w *netlab.Workload, rule string) error {
	for _, got := range status.Workloads {
		if got.Cgroup != w.Cgroup.Path() {
			continue
		}
		if rule == "" && got.State != "protected" || rule != "" && (got.State != "unprotected" || !strings.Contains(got.Detail, rule)) {
			return fmt.Errorf("it is %q: %s", got.State, got.Detail)
		}
		return nil
	}
	return fmt.Errorf("it is not in status")
}

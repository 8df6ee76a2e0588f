package redirect_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// TestAsManyRulesAsAWorkloadLikesCostTheLookNoMoreThanItsBound writes a chain of rules that do nothing before the one that
// redirects: a short one is read to its end, a long one is not.
func TestAsManyRulesAsAWorkloadLikesCostTheLookNoMoreThanItsBound(t *testing.T) {
	n := newNode(t)
	const redirects = "nftables table ip mine, chain sent?, a redirect"
	p := n.pod()
	sent := sentChain(t, p.netns)
	rule := eventuallyForeign(t, p.ns, func(rule redirect.ForeignRule, err error) bool { return err == nil })
	if rule != (redirect.ForeignRule{}) {
		t.Fatalf("an empty chain is taken for %+v", rule)
	}
	appendRules(t, p.netns, sent, 5_000, &expr.Counter{})
	appendRules(t, p.netns, sent, 1, &expr.Redir{})
	rule = eventuallyForeign(t, p.ns, func(rule redirect.ForeignRule, _ error) bool { return rule.Where != "" })
	if want := (redirect.ForeignRule{Kind: "redirect", Where: redirects}); rule != want {
		t.Errorf("behind 5,000 rules %+v is found, want %+v", rule, want)
	}

	p = n.pod()
	sent = sentChain(t, p.netns)
	appendRules(t, p.netns, sent, 21_000, &expr.Counter{})
	appendRules(t, p.netns, sent, 1, &expr.Redir{})
	began := time.Now()
	rule, err := p.ns.ForeignRedirect()
	if err == nil || rule != (redirect.ForeignRule{}) || !strings.Contains(err.Error(), "more than 20000 chains and rules") && !strings.Contains(err.Error(), "longer than 100ms") {
		t.Errorf("21,000 rules: %+v, %v", rule, err)
	}
	t.Logf("21,000 rules: %v after %s", err, time.Since(began))
}

// sentChain makes the chain that what is sent from ns passes, with a name that is not for terminals.
func sentChain(t *testing.T, ns *netlab.Namespace) *nftables.Chain {
	t.Helper()
	chain := &nftables.Chain{Name: "sent\a", Table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "mine"}, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest}
	inNft(t, ns, func(conn *nftables.Conn) {
		conn.AddTable(chain.Table)
		conn.AddChain(chain)
	})
	return chain
}

func appendRules(t *testing.T, ns *netlab.Namespace, chain *nftables.Chain, count int, e expr.Any) {
	t.Helper()
	for count > 0 {
		batch := min(count, 100) // the acknowledgements of more do not fit
		inNft(t, ns, func(conn *nftables.Conn) {
			for range batch {
				conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: []expr.Any{e}})
			}
		})
		count -= batch
	}
}

func inNft(t *testing.T, ns *netlab.Namespace, f func(*nftables.Conn)) {
	t.Helper()
	err := ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		f(conn)
		return conn.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func eventuallyForeign(t *testing.T, ns *redirect.Namespace, done func(redirect.ForeignRule, error) bool) redirect.ForeignRule {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		rule, err := ns.ForeignRedirect()
		if done(rule, err) {
			return rule
		}
		if time.Now().After(deadline) {
			t.Fatalf("last: %+v, %v", rule, err)
		}
	}
}

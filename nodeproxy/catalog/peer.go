package catalog

import "nodeproxy.io/policy"

// Peer is another cluster, with a trust domain and roots of its own, that exports services to this one or imports some.
type Peer struct {
	Name        string // as this cluster calls it
	TrustDomain string
	Roots       [][]byte // certificates in DER: every root to trust for TrustDomain, and for nothing else
}

// Peered is how a service of a peer is called: its gateways pass TLS on by SNI, and the intentions of the peer decide.
type Peered struct {
	Peer     string
	SNI      string
	Identity policy.Identity
}

// isAway says whether t is in another datacenter or cluster.
func (t *Target) isAway() bool { return t.Datacenter != "" || t.Peered != nil }

func (t *Target) peer() string {
	if t.Peered == nil {
		return ""
	}
	return t.Peered.Peer
}

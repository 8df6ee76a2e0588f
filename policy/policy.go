// Package policy decides whether one identity may connect to another, by Consul's intentions. It is pure: no I/O, no
// clock, no mutable state. A Policy is compiled once per snapshot and shared by any number of goroutines.
//
// It decides at L4. What cannot be checked there (Permissions, JWT) is a deny, never an allow.
package policy

// Action is what an intention does.
type Action uint8

const (
	Deny Action = iota
	Allow
)

func (a Action) String() string {
	if a == Allow {
		return "allow"
	}
	return "deny"
}

// Wildcard matches every service name.
const Wildcard = "*"

// Intention is one source → destination rule, as in Consul's service-intentions config entry.
type Intention struct {
	Source      string // service name or Wildcard
	Destination string // service name or Wildcard
	Action      Action
	Permissions bool // HTTP permissions are present: deny at L4
	JWT         bool // a JWT is required: deny at L4 for an http-like destination

	SourceNamespace string // "" is "default"
	SourcePartition string // "" is "default"
	SourcePeer      string // "" is this cluster
	SourceDomain    string // the trust domain of SourcePeer; "" where it is not known: the intention matches nobody

	Origin string // where it is written, for people: "intentions.hcl:12" or the config entry's name
}

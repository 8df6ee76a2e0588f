package catalog

import "net/netip"

// Definitions are the instances of a node as its operator writes them down, for a source that has no agent which knows them.
type Definitions struct {
	All      []Definition
	Problems []Problem
	Err      error // what is wrong with what is written: All is then the last that was right
}

// Definition is one instance, and how its checks go.
type Definition struct {
	ID, Service string

	Address netip.Addr // zero: the node's
	Port    uint16     // 0: it has none
	Socket  string     // a path, for a Port
	Native  bool       // it speaks Connect mTLS itself

	Mesh     netip.AddrPort // where mTLS is spoken for it: a zero address is the instance's, port 0 is to be given
	Delivery netip.AddrPort // where it listens; zero: wherever its workload does

	Tags   []string
	Meta   map[string]string
	Checks []CheckResult
}

// CheckResult is what a check of an instance last said.
type CheckResult struct {
	Name    string
	Passing bool
	Output  string // why it does not pass
}

// Healthy says whether all checks of the instance pass.
func (d *Definition) Healthy() bool {
	for _, c := range d.Checks {
		if !c.Passing {
			return false
		}
	}
	return true
}

package policy

// Identity is who a certificate says its holder is: the parts of a Connect SPIFFE ID of service form.
type Identity struct {
	TrustDomain string
	Partition   string // "" is the default partition, whose IDs have no /ap/ segment
	Namespace   string
	Datacenter  string
	Service     string
}

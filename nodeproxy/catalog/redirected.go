package catalog

// Redirected says whether a plain connection of a workload to the instance's Address goes by way of the mesh.
func (i *Instance) Redirected() bool {
	ip := i.Address.Addr()
	return !i.Native && i.Mesh.IsValid() && i.Address.IsValid() &&
		!ip.IsLoopback() && !ip.IsUnspecified() && !ip.IsLinkLocalUnicast() && !ip.IsMulticast()
}

package meshlab

import (
	"slices"

	"nodeproxy.io/tests/netlab"
)

// Pinned lists what the daemons have pinned. It can be asked while the mesh is open.
func (m *Mesh) Pinned() ([]netlab.BPFObject, error) {
	var all []netlab.BPFObject
	for _, d := range m.Daemons {
		objects, err := netlab.Pinned(d.Pins)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if !slices.Contains(all, o) {
				all = append(all, o)
			}
		}
	}
	return all, nil
}
